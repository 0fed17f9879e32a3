"""Tokenised rows -> padded batches of the methods that think in hidden states; the passes are `models.thought_passes`.

A row is cut where the passes are: prompt, latents (whose inputs only the model knows), and what is read after them.
Each part is padded on its own, on the right. `target_index` counts in `[B, 1 + S]`: column 0 stands for the state right
before a part (of the last latent or prompt token), the others for the part's own tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_sft.config.methods import CoconutConfig, KvDistillConfig
from latent_sft.data.collate import Batch, TokenRow
from latent_sft.errors import DataError
from latent_sft.method import layout
from latent_sft.method.layout import IGNORE, Kind, Row
from latent_sft.method.types import LatentSpec, ThoughtSpec


def distill_batch(
    rows: Sequence[TokenRow],
    spec: LatentSpec,
    thought_spec: ThoughtSpec,
    *,
    normalisation: str,
    drop_last_step: bool,
    kv: KvDistillConfig | None = None,
) -> Batch:
    """Batch for CODI, PCCoT and KaVa (`models.self_distill.SelfDistillModel`).

    The student reads `P, M latents, E, A` and is trained on A, since `</think>` follows a known number of latents; the
    teacher reads `P, C', E, A` and is trained on all but P.

    Args:
        rows: tokenised rows.
        spec: settings.
        thought_spec: M and T.
        normalisation: of both cross-entropies, see `TrainConfig`; `segment` is `sample` here.
        drop_last_step: C' is the CoT without its last step where it has two or more, and empty where it has one.
        kv: settings of the loss on keys and values; they decide which rows count for it. None is its defaults.

    Returns:
        `prompt_ids` `[B, P]`, `tail_ids` `[B, S]` (E, A), `teacher_ids` `[B, T]` (C', E, A), each with `_length`
        `[B]`; `trace_length` `[B]` (of C'), `answer_length` `[B]`, `row_seed` `[B]`; targets of the student, and of
        the teacher with `teacher_`; `kind` `[B, P + M + S + T]`; `counts` `[4]`: denominators of the student's
        cross-entropy, the teacher's, the distance of hidden states (rows), and that of keys and values (rows with
        anything to compare).

    Raises:
        DataError: steps have to be told apart and a row does not say where they end.
    """
    kv = kv or KvDistillConfig()
    end = list(spec.end_think_ids)
    traces = [_without_last_step(row) if drop_last_step else list(row["cot"]) for row in rows]
    students = [layout.explicit_row([*r["prompt"], *end], [], [], r["answer"], normalisation) for r in rows]
    teachers = [
        layout.explicit_row(r["prompt"], trace, end, r["answer"], normalisation)
        for r, trace in zip(rows, traces, strict=True)
    ]
    prompts = [list(r["prompt"]) for r in rows]
    starts = [len(p) for p in prompts]
    batch = {
        **_padded("prompt", prompts, spec.pad_id),
        **_padded("tail", [row.ids[n:] for row, n in zip(students, starts, strict=True)], spec.pad_id),
        **_padded("teacher", [row.ids[n:] for row, n in zip(teachers, starts, strict=True)], spec.pad_id),
        "trace_length": torch.tensor([len(trace) for trace in traces]),
        "answer_length": torch.tensor([len(r["answer"]) for r in rows]),
        "row_seed": torch.tensor([zlib.crc32(f"{r['hash']} {r['id']}".encode()) for r in rows]),
    }
    compared = [bool(trace) or kv.span == "delimiter" or kv.short == "zero" for trace in traces]
    counts = [
        sum(layout.loss_count(row, normalisation) for row in students),
        sum(layout.loss_count(row, normalisation) for row in teachers),
        len(rows),
        sum(compared),
    ]
    latents = torch.full((len(rows), thought_spec.num_latents), int(Kind.LATENT))
    return {
        **batch,
        **_targets("", students, starts, batch["tail_ids"].shape[1]),
        **_targets("teacher_", teachers, starts, batch["teacher_ids"].shape[1]),
        "kind": torch.cat([_kind(batch, "prompt"), latents, _kind(batch, "tail"), _kind(batch, "teacher")], dim=1),
        "counts": torch.tensor(counts, dtype=torch.float32),
    }


def coconut_batch(rows: Sequence[TokenRow], spec: LatentSpec, config: CoconutConfig, *, normalisation: str) -> Batch:
    """Batch for Coconut (`models.coconut.CoconutModel`): `P, latents, remaining steps, E, A`, trained on the latter.

    Args:
        rows: tokenised rows with `stage`: the first so many steps are latents, `latents_per_step` each; beyond
            `max_stage` no step is written any more. Without steps in the CoT, only stage 0 is possible.
        spec: settings.
        config: settings of Coconut.
        normalisation: of the cross-entropy, see `TrainConfig`; `segment` is `sample` here.

    Returns:
        `prompt_ids` `[B, P]`, `tail_ids` `[B, S]`, each with `_length` `[B]`; `thought_mask` `[B, N]`, the latents of
        each row out of the N passes that are made (as many in every batch of a stage, on every process); targets;
        `kind` `[B, P + N + S]`; `counts` `[1]`.

    Raises:
        DataError: a stage above 0 and a row that does not say where its steps end.
    """
    stages = [int(row["stage"]) for row in rows]
    end = list(spec.end_think_ids)
    laid = [
        layout.explicit_row(row["prompt"], _remaining(row, stage, config), end, row["answer"], normalisation)
        for row, stage in zip(rows, stages, strict=True)
    ]
    # a row can be drawn at any stage, and processes must agree on the number of passes
    widest = config.max_stage if config.uniform_prob else min(max(stages), config.max_stage)
    latents = torch.tensor([_num_latents(row, stage, config) for row, stage in zip(rows, stages, strict=True)])
    mask = torch.arange(config.latents_per_step * widest) < latents[:, None]
    starts = [len(row["prompt"]) for row in rows]
    batch = {
        **_padded("prompt", [list(row["prompt"]) for row in rows], spec.pad_id),
        **_padded("tail", [row.ids[n:] for row, n in zip(laid, starts, strict=True)], spec.pad_id),
        "thought_mask": mask,
    }
    count = sum(layout.loss_count(row, normalisation) for row in laid)
    return {
        **batch,
        **_targets("", laid, starts, batch["tail_ids"].shape[1]),
        "kind": torch.cat([_kind(batch, "prompt"), mask * int(Kind.LATENT), _kind(batch, "tail")], dim=1),
        "counts": torch.tensor([count], dtype=torch.float32),
    }


def step_lengths(row: TokenRow) -> list[int]:
    """Return the tokens of each step of the CoT; none for an empty CoT.

    Raises:
        DataError: the row does not say where its steps end.
    """
    lengths = list(row["step_lengths"])
    if sum(lengths) != len(row["cot"]):
        raise DataError(
            f"row {row['id']}: its steps are not parts of its CoT, so none can be left out or become latents. Give the "
            "CoT as a list of steps (data.fields.steps), or set drop_last_step=false (Coconut cannot do without)."
        )
    return lengths


def num_latents(steps: int, stage: int, config: CoconutConfig) -> int:
    """Return the latents of an example with so many steps at a stage of Coconut.

    >>> num_latents(2, 4, CoconutConfig(latents_per_step=2, max_stage=3))
    6
    >>> num_latents(2, 4, CoconutConfig(latents_per_step=2, max_stage=3, pad_latents=False))
    4
    """
    replaced = min(stage, config.max_stage)
    return config.latents_per_step * (replaced if config.pad_latents else min(replaced, steps))


def _num_latents(row: TokenRow, stage: int, config: CoconutConfig) -> int:
    return num_latents(len(step_lengths(row)) if stage else 0, stage, config)


def _remaining(row: TokenRow, stage: int, config: CoconutConfig) -> list[int]:
    if stage == 0:
        return list(row["cot"])
    lengths = step_lengths(row)
    return [] if stage > config.max_stage else list(row["cot"][sum(lengths[:stage]) :])


def _without_last_step(row: TokenRow) -> list[int]:
    return list(row["cot"][: sum(step_lengths(row)[:-1])])


def _padded(name: str, lists: list[list[int]], pad_id: int) -> Batch:
    longest = max(map(len, lists))
    return {
        f"{name}_ids": torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in lists]),
        f"{name}_length": torch.tensor([len(ids) for ids in lists]),
    }


def _kind(batch: Batch, name: str) -> Tensor:
    ids, length = batch[f"{name}_ids"], batch[f"{name}_length"]
    kind = Kind.TEXT if name == "prompt" else Kind.TAIL
    return (torch.arange(ids.shape[1]) < length[:, None]) * int(kind)


def _targets(prefix: str, rows: list[Row], starts: list[int], width: int) -> Batch:
    index, targets, weights = [], [], []
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        for column, t in enumerate(range(start - 1, len(row.ids))):
            if row.target[t] != IGNORE:
                index.append(b * (1 + width) + column)
                targets.append(row.target[t])
                weights.append(row.weight[t])
    return {
        f"{prefix}target_index": torch.tensor(index, dtype=torch.long),
        f"{prefix}targets": torch.tensor(targets, dtype=torch.long),
        f"{prefix}target_weights": torch.tensor(weights, dtype=torch.float32),
    }
