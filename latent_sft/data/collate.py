"""Tokenised rows -> padded batches. One function a model; the layout itself is `latent_sft.method.layout`.

A batch is a dictionary of CPU tensors. Labelled positions are listed flat (`target_index` into the `[B*T]` positions,
`targets`, `target_weights`, each `[M]`), so that a model computes logits only where a label is. `counts` `[2]` holds
the denominators of the cross-entropy and of the KL; the trainer sums it over the global batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latent_sft.method import layout
from latent_sft.method.layout import IGNORE, Row
from latent_sft.method.types import LatentSpec, Superposition

Batch = dict[str, Tensor]
TokenRow = Mapping[str, Any]
LabelOf = Callable[[str, str], Superposition]  # (row id, row hash) -> stored latents of that row


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
    padded, place = _padded(laid, spec.pad_id)
    return {**padded, **_targets(laid, place), "counts": _counts(laid, normalisation, 0)}


def stage1_batch(
    rows: Sequence[TokenRow], spec: LatentSpec, *, normalisation: str, label_of: LabelOf | None = None
) -> Batch:
    """Batch for the encoder and the stage-1 decoder, both in two-track order (`layout.two_track`).

    Keys without prefix belong to the decoder, `encoder_*` to the encoder; `latent_mask` `[B, N]` says which latents are
    real. Where `label_of` gives the latents of a frozen encoder, `latent_ids` and `latent_weights` `[B, N, K]` take the
    place of the encoder's half.
    """
    segments = [layout.split_cot(r["cot"], r["segment_lengths"]) for r in rows]
    laid = [
        layout.decoder_row(r["prompt"], s, spec.end_think_ids, r["answer"], normalisation)
        for r, s in zip(rows, segments, strict=True)
    ]
    tracks, place = _two_track(laid, spec.pad_id)
    batch = {**tracks, **_targets(laid, place), "counts": _counts(laid, normalisation, 0)}
    if label_of is None:
        return {**batch, **_encoder_part(rows, segments, spec)}
    labels = [label_of(r["id"], r["hash"]) for r in rows]
    latent_ids, latent_weights = _stacked(labels, spec.top_k)
    mask = torch.tensor([[i < len(s) for i in range(latent_ids.shape[1])] for s in segments])
    return {**batch, "latent_ids": latent_ids, "latent_weights": latent_weights, "latent_mask": mask}


def encoder_batch(rows: Sequence[TokenRow], spec: LatentSpec) -> Batch:
    """The encoder's half of `stage1_batch`, for labels and gold latents."""
    return _encoder_part(rows, [layout.split_cot(r["cot"], r["segment_lengths"]) for r in rows], spec)


def stage2_batch(
    rows: Sequence[TokenRow],
    spec: LatentSpec,
    *,
    label_of: LabelOf,
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
    padded, place = _padded(laid, spec.pad_id)
    batch = {**padded, **_targets(laid, place), "counts": _counts(laid, normalisation, len(rows))}
    latent_ids, latent_weights = _stacked(labels, spec.top_k)
    length, width = batch["ids"].shape[1], latent_ids.shape[1]
    kl_index, kl_latent, kl_weights = [], [], []
    for b, (row, label) in enumerate(zip(rows, labels, strict=True)):
        n = len(label.ids)
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
    tracks, _ = _two_track(laid, spec.pad_id)
    counts = torch.tensor([len(s) for s in segments])
    latent_mask = torch.arange(int(counts.max())) < counts[:, None]
    return {**{f"encoder_{k}": v for k, v in tracks.items()}, "latent_mask": latent_mask}


def _stacked(labels: Sequence[Superposition], top_k: int) -> tuple[Tensor, Tensor]:
    width = max(len(label.ids) for label in labels)
    ids = torch.zeros(len(labels), width, top_k, dtype=torch.long)
    weights = torch.zeros(len(labels), width, top_k)
    for b, label in enumerate(labels):
        ids[b, : len(label.ids)], weights[b, : len(label.ids)] = label
    return ids, weights


def _padded(rows: Sequence[Row], pad_id: int) -> tuple[Batch, list[list[int]]]:
    """Right-pad rows as they are; the second value is where each place of a row went in the flat batch."""
    length = max(len(row.ids) for row in rows)
    slots = [[*range(len(row.ids)), *[-1] * (length - len(row.ids))] for row in rows]
    return _filled(rows, slots, pad_id), [[b * length + t for t in range(len(row.ids))] for b, row in enumerate(rows)]


def _two_track(rows: Sequence[Row], pad_id: int) -> tuple[Batch, list[list[int]]]:
    """Main tracks padded to the longest, then G groups of R side tokens (the largest counts of the batch).

    Adds `time` `[B, T]`, the index in the row, and `anchor` `[B, G, R]`, the index in the main track that a side token
    hangs off: the last main-track token before its group (padded groups hang off token 0; nobody reads them).
    """
    split = [layout.two_track(row) for row in rows]
    main_length = max(len(main) for main, _ in split)
    num_groups = max(len(groups) for _, groups in split)
    width = max((len(group) for _, groups in split for group in groups), default=1)
    slots, anchors = [], []
    for main, groups in split:
        padded = [group + [-1] * (width - len(group)) for group in groups]
        padded += [[-1] * width] * (num_groups - len(groups))
        slots.append(main + [-1] * (main_length - len(main)) + [t for group in padded for t in group])
        anchor = [[bisect_left(main, group[0]) - 1] * width for group in groups]
        anchors.append(anchor + [[0] * width] * (num_groups - len(groups)))
    batch = _filled(rows, slots, pad_id)
    batch["time"] = torch.tensor(slots)
    batch["anchor"] = torch.tensor(anchors, dtype=torch.long).reshape(len(rows), num_groups, width)
    place = []
    for b, (row, order) in enumerate(zip(rows, slots, strict=True)):
        where = [0] * len(row.ids)
        for at, t in enumerate(order):
            if t >= 0:
                where[t] = b * len(order) + at
        place.append(where)
    return batch, place


def _filled(rows: Sequence[Row], slots: list[list[int]], pad_id: int) -> Batch:
    def fill(name: str, value: int) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([[v[t] if t >= 0 else value for t in order] for v, order in zip(lists, slots, strict=True)])

    return {
        "ids": fill("ids", pad_id),
        "kind": fill("kind", 0),
        "branch": fill("branch", -1),
        "position": fill("position", 0),
    }


def _targets(rows: Sequence[Row], place: list[list[int]]) -> Batch:
    index, targets, weights = [], [], []
    for row, where in zip(rows, place, strict=True):
        for t, token in enumerate(row.target):
            if token != IGNORE:
                index.append(where[t])
                targets.append(token)
                weights.append(row.weight[t])
    return {
        "target_index": torch.tensor(index, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "target_weights": torch.tensor(weights, dtype=torch.float32),
    }


def _counts(rows: Sequence[Row], normalisation: str, num_kl: int) -> Tensor:
    return torch.tensor([sum(layout.loss_count(r, normalisation) for r in rows), num_kl], dtype=torch.float32)
