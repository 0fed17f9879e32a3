"""Labels: the encoder's latents of many examples."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from typing import Any

import torch

from eval.speed import plain
from eval.speed.cases import FULL, QUICKSTART, TINY, Case, Path, Size, build_lm, rows_of, spec_of
from latent_sft.method.types import Superposition
from latent_sft.methods.latent_sft import gold_latents
from latent_sft.models.stage1 import Stage1Model

BATCH = 32
# the plain path as published projects the markers only; this one projects every position, as a model with a head does
FULL_LOGITS = "plain, logits everywhere"


def cases(quick: bool) -> list[Case]:
    """Return 256 examples with CoTs of 64 to 256 tokens, unsorted, and as many of the quickstart's size."""
    if quick:
        return [_case(TINY, 6, 4, 12, 4)]
    return [_case(FULL, 256, 64, 256, 4), _case(QUICKSTART, 256, 16, 28, 2, "hidden 64, ")]


def _case(size: Size, count: int, low: int, high: int, rate: int, start: str = "") -> Case:
    rng = random.Random(1)
    return Case(
        part="labels",
        name=f"{start}{count} examples, CoT {low}-{high}, r={rate}",
        size=size,
        cot=tuple(rng.randint(low, high) for _ in range(count)),
        rate=rate,
        paths=("plain", FULL_LOGITS, "fast"),
        items=(count, max(1, count // 8), count),
        memory=() if start else ("plain", "fast"),
    )


def small(case: Case) -> Case:
    """Return a case of the same kind that takes next to nothing."""
    return dataclasses.replace(case, cot=(2 * case.rate,), items=(1, 1, 1))


def build(case: Case, device: str) -> dict[str, Path]:
    """Return the paths of a case, on the same weights. Layout and masks are part of the step."""
    fast, slow = _models(case.size, device)
    rows = rows_of(case)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])  # as the `label` stage does
    some = rows[: case.items[1]]

    def fast_step(_: Any) -> list[Superposition]:
        found = dict(zip(order, gold_latents(fast, [rows[i] for i in order], BATCH), strict=True))
        return [found[i] for i in range(len(rows))]

    return {
        "plain": Path(slow, list, lambda _: plain.labels(slow, rows)),
        FULL_LOGITS: Path(slow, list, lambda _: plain.labels(slow, some, full_logits=True)),
        "fast": Path(fast, list, fast_step),
    }


@cache
def _models(size: Size, device: str) -> tuple[Stage1Model, plain.PlainStage1]:
    marker = 0.02 * torch.randn(size.hidden, generator=torch.Generator().manual_seed(2))
    fast, slow = (
        kind(build_lm(size, 0, device), build_lm(size, 1, device), marker, spec_of(size)).to(device).eval()
        for kind in (Stage1Model, plain.PlainStage1)
    )
    return fast, slow
