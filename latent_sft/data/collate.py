"""Rows of token ids -> padded batches; the layout itself is `latent_sft.method.layout`, the batches are the methods'.

A batch is a dictionary of CPU tensors. Labelled positions are listed flat (`target_index` into the `[B*T]` positions,
`targets`, `target_weights`, each `[M]`), so that a model computes logits only where a label is. `count_<term>` is the
denominator of a loss term, a scalar; the trainer gives the model its sum over the global batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latent_sft.method import layout
from latent_sft.method.layout import IGNORE, Row
from latent_sft.method.types import Superposition

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
