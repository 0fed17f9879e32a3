"""Rows of token ids -> padded batches; the layout itself is `latent_sft.method.layout`.

At the end the batches of the two stages of an encoder and a student; other batches stand in their methods' modules.

A batch is a dictionary of CPU tensors. Labelled positions are listed flat (`target_index` into the `[B*T]` positions,
`targets`, `target_weights`, each `[M]`), so that a model computes logits only where a label is. `count_<term>` is the
denominator of a loss term, a scalar; the trainer gives the model its sum over the global batch.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latent_sft.data.lengths import Lengths, count_tokens, single
from latent_sft.errors import DataError
from latent_sft.method import layout
from latent_sft.method.layout import IGNORE, Row
from latent_sft.method.spans import span_labels
from latent_sft.method.types import LatentSpec, Superposition

Batch = dict[str, Tensor]
TokenRow = Mapping[str, Any]
LabelOf = Callable[[str, str], Superposition]  # (row id, row hash) -> stored latents of that row


def stacked(labels: Sequence[Superposition]) -> tuple[Tensor, Tensor]:
    """Return ids and weights `[B, N, K]` of rows of superpositions, padded to the longest row."""
    width, kept = max(len(label.ids) for label in labels), labels[0].ids.shape[-1]
    ids = torch.zeros(len(labels), width, kept, dtype=torch.long)
    weights = torch.zeros(len(labels), width, kept)
    for b, label in enumerate(labels):
        ids[b, : len(label.ids)], weights[b, : len(label.ids)] = label
    return ids, weights


def padded(rows: Sequence[Row], pad_id: int) -> tuple[Batch, list[list[int]]]:
    """Right-pad rows as they are; the second value is where each place of a row went in the flat batch."""
    length = max(len(row.ids) for row in rows)
    slots = [[*range(len(row.ids)), *[-1] * (length - len(row.ids))] for row in rows]
    return filled(rows, slots, pad_id), [[b * length + t for t in range(len(row.ids))] for b, row in enumerate(rows)]


def two_track(rows: Sequence[Row], pad_id: int) -> tuple[Batch, list[list[int]]]:
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
    batch = filled(rows, slots, pad_id)
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


def filled(rows: Sequence[Row], slots: list[list[int]], pad_id: int) -> Batch:
    """Return `ids, kind, branch, position` `[B, T]`; slot t of a row holds its token `slots[t]`, -1 padding."""

    def fill(name: str, value: int) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([[v[t] if t >= 0 else value for t in order] for v, order in zip(lists, slots, strict=True)])

    return {
        "ids": fill("ids", pad_id),
        "kind": fill("kind", 0),
        "branch": fill("branch", -1),
        "position": fill("position", 0),
    }


def targets_of(rows: Sequence[Row], place: list[list[int]]) -> Batch:
    """Return labelled positions; `place` says where each place of a row went in the flat batch."""
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


def count_of(rows: Sequence[Row], loss_reduction: str) -> Tensor:
    """Return the denominator of the cross-entropy."""
    return torch.tensor(float(sum(layout.loss_count(r, loss_reduction) for r in rows)))


def stage1_batch(
    rows: Sequence[TokenRow],
    spec: LatentSpec,
    *,
    loss_reduction: str,
    label_of: LabelOf | None = None,
    suffix: bool = False,
    filler: bool = False,
    span_rho: float = 0.0,
) -> Batch:
    """Batch for the encoder and the stage-1 decoder, both in two-track order (`layout.two_track`).

    Keys without prefix belong to the decoder, `encoder_*` to the encoder; `latent_mask` `[B, N]` says which latents are
    real. Where `label_of` gives the latents of a frozen encoder, `latent_ids` and `latent_weights` `[B, N, K]` take the
    place of the encoder's half.

    Args:
        rows: tokenised rows, for `suffix` with `phase`, the seed of their cuts.
        spec: settings.
        loss_reduction: of the cross-entropy, see `TrainConfig`.
        label_of: (row id, row hash) -> stored superpositions `[N, K]`.
        suffix: the decoder recovers everything behind z_I, with I drawn uniformly from 1..N for each row.
        filler: a latent of the prompt alone stands in front of the others.
        span_rho: of the code words that the latents are drawn to (`_span_part`); 0 adds none.
    """
    segments = _segments(rows, filler)
    laid = []
    for r, s in zip(rows, segments, strict=True):
        ends = (spec.end_think_ids, r["answer"], loss_reduction)
        if suffix:
            cut = random.Random(f"{r.get('phase', 0)}/{r['id']}").randint(min(1, len(s)), len(s))
            laid.append(layout.suffix_row(r["prompt"], cut, s[cut:], *ends))
        else:
            laid.append(layout.decoder_row(r["prompt"], s, *ends))
    tracks, place = two_track(laid, spec.pad_id)
    batch = {**tracks, **targets_of(laid, place), "count_ce": count_of(laid, loss_reduction)}
    if label_of is None:
        spans = _span_part(segments, span_rho) if span_rho else {}
        return {**batch, **_encoder_part(rows, segments, spec), **spans}
    labels = [label_of(r["id"], r["hash"]) for r in rows]
    latent_ids, latent_weights = stacked(labels)
    mask = torch.tensor([[i < len(s) for i in range(latent_ids.shape[1])] for s in segments])
    return {**batch, "latent_ids": latent_ids, "latent_weights": latent_weights, "latent_mask": mask}


def encoder_batch(rows: Sequence[TokenRow], spec: LatentSpec, filler: bool = False) -> Batch:
    """The encoder's half of `stage1_batch`, for labels and oracle latents."""
    return _encoder_part(rows, _segments(rows, filler), spec)


def _need_cot(row: TokenRow, found: int) -> None:
    if not found:
        raise DataError(
            f"row {row['id']}: field 'cot': empty; expected a chain of thought in every row that latents are trained "
            "on. Leave the row out, or train no-cot and cot alone."
        )


def _segments(rows: Sequence[TokenRow], filler: bool) -> list[list[list[int]]]:
    for row in rows:
        _need_cot(row, filler or len(row["cot"]))
    # what a filler stands for is the empty segment before the CoT
    return [[*[[]] * filler, *layout.split_cot(r["cot"], r["segment_lengths"])] for r in rows]


def _span_part(segments: list[list[list[int]]], rho: float) -> Batch:
    """Code words of the segments (`method.spans`), as the targets of their latents.

    `span_ids`, `span_masses` `[M, K]` are the words, `span_index` `[M]` the places of their latents in `[B*N]`,
    `span_weights` `[M]` those of a mean over the latents of a row; a filler has no word. Rows without any do not count.
    """
    width, longest = max(map(len, segments)), max([1, *(len(part) for s in segments for part in s)])
    words, index, weights = [], [], []
    for b, row in enumerate(segments):
        places = [i for i, part in enumerate(row) if part]
        words.append(span_labels([row[i] for i in places], rho, longest))
        index += [b * width + i for i in places]
        weights += [1 / len(places) for _ in places]
    return {
        "span_ids": torch.cat([word.ids for word in words]),
        "span_masses": torch.cat([word.weights for word in words]),
        "span_index": torch.tensor(index, dtype=torch.long),
        "span_weights": torch.tensor(weights),
        "count_span": torch.tensor(float(sum(any(row) for row in segments))),
    }


def stage2_batch(rows: Sequence[TokenRow], spec: LatentSpec, *, label_of: LabelOf, loss_reduction: str) -> Batch:
    """Batch for stage 2: `latent_ids`, `latent_weights` `[B, N, K]` hold the stored labels, `kl_*` where they are read.

    Args:
        rows: tokenised rows.
        spec: settings.
        label_of: (row id, row hash) -> stored superpositions `[N, K]`.
        loss_reduction: of the cross-entropy; the KL is a mean over latents, then over examples.
    """
    labels = [label_of(r["id"], r["hash"]) for r in rows]
    laid = [
        layout.stage2_row(r["prompt"], len(s.ids), spec.end_think_ids, r["answer"], loss_reduction)
        for r, s in zip(rows, labels, strict=True)
    ]
    filled, place = padded(laid, spec.pad_id)
    batch = {**filled, **targets_of(laid, place), "count_ce": count_of(laid, loss_reduction)}
    latent_ids, latent_weights = stacked(labels)
    length, width = batch["ids"].shape[1], latent_ids.shape[1]
    kl_index: list[int] = []
    kl_latent: list[int] = []
    kl_weights: list[float] = []
    for b, (row, label) in enumerate(zip(rows, labels, strict=True)):
        n = len(label.ids)
        _need_cot(row, n)
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
        "count_kl": torch.tensor(float(len(rows))),
    }


def _encoder_part(rows: Sequence[TokenRow], segments: list[list[list[int]]], spec: LatentSpec) -> Batch:
    stretched = spec.marker_positions == "stretched"
    laid = [
        layout.encoder_row(r["prompt"], s, spec.end_think_ids, stretched) for r, s in zip(rows, segments, strict=True)
    ]
    tracks, _ = two_track(laid, spec.pad_id)
    counts = torch.tensor([len(s) for s in segments])
    latent_mask = torch.arange(int(counts.max())) < counts[:, None]
    return {**{f"encoder_{k}": v for k, v in tracks.items()}, "latent_mask": latent_mask}


def stage1_lengths(data: Any, spec: LatentSpec, suffix: bool = False, filler: bool = False) -> Lengths:
    """Lengths of the longer of the stage-1 decoder's sequence and the encoder's, in two-track order.

    Padded apart: the main track of each, the number of chunks, their longest, and the number of markers. A chunk's last
    token is not in the batch, so a chunk of one token is none (`layout.two_track`). With `suffix` there are no chunks,
    and the main track is longest where the cut is the first.
    """
    segments = [[*[0] * filler, *lengths] for lengths in data["segment_lengths"]]
    latents = torch.tensor([len(s) for s in segments])
    chunks = torch.tensor([sum(length > 1 for length in s[1:]) for s in segments])
    chunk = torch.tensor([max((length - 1 for length in s[1:]), default=0) for s in segments])
    prompt, thoughts = count_tokens(data, "prompt"), latents
    if suffix:
        chunks, thoughts = torch.zeros_like(chunks), torch.tensor([len(s[:1]) + sum(s[1:]) for s in segments])
    main = prompt + thoughts + len(spec.end_think_ids) + count_tokens(data, "answer") - 1
    parts = torch.stack([main, chunks, chunk, prompt + count_tokens(data, "cot"), latents], dim=1)
    return Lengths(parts, _stage1_width)


def _stage1_width(parts: Tensor) -> Tensor:
    main, chunks, chunk, text, markers = parts.unbind(-1)
    return torch.maximum(main + chunks * chunk, text + markers)


def stage2_lengths(data: Any, spec: LatentSpec, filler: bool = False) -> Lengths:
    """Lengths of `[P, z_1..z_N, E, A]`."""
    latents = count_tokens(data, "segment_lengths") + int(filler)
    return single(count_tokens(data, "prompt") + latents + len(spec.end_think_ids) + count_tokens(data, "answer"))
