"""Stage 1: forward and backward of encoder and decoder, and of the decoder alone with latents that are given."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eval.speed import plain
from eval.speed.cases import FULL, TINY, Case, Path, Size, build_lm, random_labels, rows_of, spec_of
from latent_sft.data.collate import Batch
from latent_sft.method.types import Superposition
from latent_sft.methods.latent_sft import stage1_batch
from latent_sft.models.stage1 import Stage1Model

# r -> CoT lengths; the plain path takes minutes a call and gigabytes beyond PLAIN_UP_TO
LENGTHS = {2: (128, 512, 2048), 4: (128, 512, 2048), 16: (128, 256, 512, 1024, 2048, 4096, 8192)}
PLAIN_UP_TO = {2: 512, 4: 512, 16: 4096}
RAGGED = tuple(range(60, 257, 28))
DECODER_LENGTHS = (1024, 2048, 4096, 8192)
LONGEST, LIMIT_GIB = 16_384, 8.0
# memory is measured where the number of latents is smallest, from this CoT length on
MEMORY_RATE, MEMORY_FROM = 16, 512


def cases(quick: bool) -> list[Case]:
    """Return the cases, short CoTs first."""
    if quick:
        found = [_case(TINY, (16 * rate // 2,), rate, ("plain", "fast")) for rate in LENGTHS]
        found.append(_case(TINY, (5, 9, 12), 4, ("plain", "fast")))
        return found + [_case(TINY, (length,), 16, ("fast",), part="decoder") for length in (32, 64)]
    found = []
    for rate, lengths in LENGTHS.items():
        for length in lengths:
            paths = ("plain", "fast") if length <= PLAIN_UP_TO[rate] else ("fast",)
            memory = paths if rate == MEMORY_RATE and length >= MEMORY_FROM else ()
            found.append(_case(FULL, (length,), rate, paths, memory=memory))
    found.append(_case(FULL, RAGGED, 4, ("plain", "fast")))
    both = ("plain", "fast")
    found.append(_case(FULL, (LONGEST,), 16, both, memory=both, timed=False, limit_gib=LIMIT_GIB))
    return found + [_case(FULL, (length,), 16, ("fast",), part="decoder") for length in DECODER_LENGTHS]


def _case(size: Size, cot: tuple[int, ...], rate: int, paths: tuple[str, ...], **rest: Any) -> Case:
    rows = f"{len(cot)} rows, CoT {cot[0]}-{cot[-1]}" if len(cot) > 1 else f"CoT {cot[0]}"
    values = {"part": "stage1", "name": f"{rows}, r={rate}", "items": (1,) * len(paths), **rest}
    return Case(size=size, cot=cot, rate=rate, paths=paths, **values)


def small(case: Case) -> Case:
    """Return a case of the same kind that takes next to nothing, to load kernels before memory is measured."""
    return dataclasses.replace(case, cot=(2 * case.rate,), prompt=8)


def build(case: Case, device: str) -> dict[str, Path]:
    """Return the paths of a case, on the same weights."""
    fast, slow = _models(case.size, device)
    rows, spec = rows_of(case), fast.spec

    def label_of(_id: str, _hash: str) -> Superposition:
        return random_labels(-(-case.cot[0] // case.rate), case.size.vocab, 0)

    def fast_batch() -> Batch:
        given = {"label_of": label_of} if case.part == "decoder" else {}
        return plain.to_device(stage1_batch(rows, spec, normalisation="token", **given), device)

    def fast_step(batch: Batch) -> Tensor:
        loss = fast(**batch)["ce_total"] / batch["counts"][0]
        loss.backward()
        return loss.detach()

    def plain_step(batch: Batch) -> Tensor:
        loss = slow(batch)
        loss.backward()
        return loss.detach()

    return {
        "plain": Path(slow, lambda: plain.to_device(plain.stage1_inputs(rows, spec), device), plain_step),
        "fast": Path(fast, fast_batch, fast_step),
    }


@torch.no_grad()
def without_ties(case: Case, device: str, tries: int = 5) -> Case:
    """Return the case with rows for which both paths keep the same entries in every latent.

    Among many latents, two logits may be so near each other that rounding decides which of them is the k-th. Then the
    paths differ in that latent, and rightly so; such rows say nothing and are drawn again. Paths that always differ are
    left as they are.
    """
    fast, slow = _models(case.size, device)
    for seed in range(tries):
        drawn = dataclasses.replace(case, seed=seed)
        paths = build(drawn, device)
        found = fast.encode(paths["fast"].prepare()).ids.sort(-1).values
        expected = [latent.ids.sort(-1).values for latent in slow.encode(paths["plain"].prepare())]
        if all(torch.equal(ids, found[b, : len(ids)]) for b, ids in enumerate(expected)):
            return drawn
    return case


@cache
def _models(size: Size, device: str) -> tuple[Stage1Model, plain.PlainStage1]:
    spec = spec_of(size)
    marker = 0.02 * torch.randn(size.hidden, generator=torch.Generator().manual_seed(2))
    fast, slow = (
        kind(build_lm(size, 0, device), build_lm(size, 1, device), marker, spec).to(device).train()
        for kind in (Stage1Model, plain.PlainStage1)
    )
    return fast, slow
