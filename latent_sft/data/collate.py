"""Tokenised rows -> padded batches. One function a model; the layout itself is `latent_sft.method.layout`.

A batch is a dictionary of CPU tensors. Labelled positions are listed flat (`target_index` into the `[B*T]` positions,
`targets`, `target_weights`, each `[M]`), so that a model computes logits only where a label is. `counts` `[2]` holds
the denominators of the cross-entropy and of the KL; the trainer sums it over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latent_sft.method import layout
from latent_sft.method.layout import IGNORE, Row
from latent_sft.method.types import LatentSpec, Superposition

Batch = dict[str, Tensor]
TokenRow = Mapping[str, Any]


def explicit_batch(
    rows: Sequence[TokenRow], spec: LatentSpec, *, with_cot: bool, normalisation: str, prompt_targets: bool = False
) -> Batch:
    """Batch for explicit CoT fine-tuning (`with_cot`) or No-CoT; `prompt_targets` labels the prompt as well."""
    laid = [
        layout.explicit_row(
            r["prompt"], r["cot"] if with_cot else [], spec.end_think_ids, r["answer"], normalisation, prompt_targets
        )
        for r in rows
    ]
    return {**_padded(laid, spec.pad_id), **_targets(laid), "counts": _counts(laid, normalisation, 0)}


def stage1_batch(rows: Sequence[TokenRow], spec: LatentSpec, *, normalisation: str) -> Batch:
    """Batch for the encoder and the stage-1 decoder.

    Keys without prefix belong to the decoder, `encoder_*` to the encoder, `marker_index` `[B, N]` says where the
    markers are in the encoder sequence (0 in padded slots) and `latent_mask` `[B, N]` which slots are real.
    """
    segments = [layout.split_cot(r["cot"], r["segment_lengths"]) for r in rows]
    laid = [
        layout.decoder_row(r["prompt"], s, spec.end_think_ids, r["answer"], normalisation)
        for r, s in zip(rows, segments, strict=True)
    ]
    batch = {**_padded(laid, spec.pad_id), **_targets(laid), "counts": _counts(laid, normalisation, 0)}
    return {**batch, **_encoder_part(rows, segments, spec)}


def encoder_batch(rows: Sequence[TokenRow], spec: LatentSpec) -> Batch:
    """The encoder's half of `stage1_batch`, for labels and gold latents."""
    return _encoder_part(rows, [layout.split_cot(r["cot"], r["segment_lengths"]) for r in rows], spec)


def stage2_batch(
    rows: Sequence[TokenRow],
    spec: LatentSpec,
    *,
    label_of: Callable[[str, str], Superposition],
    normalisation: str,
) -> Batch:
    """Batch for stage 2: `latent_ids`, `latent_weights` `[B, N, K]` hold the stored labels, `kl_*` where they are read.

    Args:
        rows: tokenised rows.
        spec: settings.
        label_of: (row id, row hash) -> stored superpositions `[N, K]`.
        normalisation: of the cross-entropy; the KL is a mean over latents, then over examples.
    """
    labels = [label_of(r["id"], r["hash"]) for r in rows]
    laid = [
        layout.stage2_row(r["prompt"], len(s.ids), spec.end_think_ids, r["answer"], normalisation)
        for r, s in zip(rows, labels, strict=True)
    ]
    batch = {**_padded(laid, spec.pad_id), **_targets(laid), "counts": _counts(laid, normalisation, len(rows))}
    length, width = batch["ids"].shape[1], max(len(s.ids) for s in labels)
    latent_ids = torch.zeros(len(rows), width, spec.top_k, dtype=torch.long)
    latent_weights = torch.zeros(len(rows), width, spec.top_k)
    kl_index, kl_latent, kl_weights = [], [], []
    for b, (row, label) in enumerate(zip(rows, labels, strict=True)):
        n = len(label.ids)
        latent_ids[b, :n], latent_weights[b, :n] = label
        first = b * length + len(row["prompt"]) - 1
        kl_index += range(first, first + n)
        kl_latent += range(b * width, b * width + n)
        kl_weights += [1.0 / n] * n
    return {
        **batch,
        "latent_ids": latent_ids,
        "latent_weights": latent_weights,
        "kl_index": torch.tensor(kl_index),
        "kl_latent": torch.tensor(kl_latent),
        "kl_weights": torch.tensor(kl_weights),
    }


def _encoder_part(rows: Sequence[TokenRow], segments: list[list[list[int]]], spec: LatentSpec) -> Batch:
    stretched = spec.marker_positions == "stretched"
    laid = [
        layout.encoder_row(r["prompt"], s, spec.end_think_ids, stretched) for r, s in zip(rows, segments, strict=True)
    ]
    width = max(len(s) for s in segments)
    marker_index = torch.zeros(len(rows), width, dtype=torch.long)
    latent_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(laid):
        at = [t for t, k in enumerate(row.kind) if k == layout.Kind.MARKER]
        marker_index[b, : len(at)] = torch.tensor(at)
        latent_mask[b, : len(at)] = True
    padded = {f"encoder_{k}": v for k, v in _padded(laid, spec.pad_id).items()}
    return {**padded, "marker_index": marker_index, "latent_mask": latent_mask}


def _padded(rows: Sequence[Row], pad_id: int) -> Batch:
    length = max(len(row.ids) for row in rows)

    def pad(name: str, value: int) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([v + [value] * (length - len(v)) for v in lists])

    return {
        "ids": pad("ids", pad_id),
        "kind": pad("kind", 0),
        "branch": pad("branch", -1),
        "position": pad("position", 0),
    }


def _targets(rows: Sequence[Row]) -> Batch:
    length = max(len(row.ids) for row in rows)
    index, targets, weights = [], [], []
    for b, row in enumerate(rows):
        for t, token in enumerate(row.target):
            if token != IGNORE:
                index.append(b * length + t)
                targets.append(token)
                weights.append(row.weight[t])
    return {
        "target_index": torch.tensor(index, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "target_weights": torch.tensor(weights, dtype=torch.float32),
    }


def _counts(rows: Sequence[Row], normalisation: str, num_kl: int) -> Tensor:
    return torch.tensor([sum(layout.loss_count(r, normalisation) for r in rows), num_kl], dtype=torch.float32)
