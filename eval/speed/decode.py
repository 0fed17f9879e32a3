"""Decoding: problems a second against one problem at a time, and the cost of a latent step against an explicit one."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from typing import Any

import torch
from torch import nn

from eval.speed import plain
from eval.speed.cases import FULL, QUICKSTART, TINY, Case, Path, Size, build_lm, spec_of
from latent_sft.inference.generate import generate
from latent_sft.method.types import LatentSpec

# </think> and EOS get the head rows of other tokens times this, so that a random model stops after varied lengths, as a
# trained one does; times 0 they are never the largest, and all rows run as long as they may
STOPS, NEVER_STOPS = 2.5, 0.0
QUICKSTART_LATENTS, QUICKSTART_TOKENS = 10, 21


def cases(quick: bool) -> list[Case]:
    """Return throughput at several batch sizes, the two kinds of steps, and the quickstart's two models."""
    size, batches = (TINY, {1: 4, 4: 8}) if quick else (FULL, {1: 16, 16: 64, 64: 192, 256: 384})
    alone = 4 if quick else 16
    found = [
        Case(
            part="decode",
            name="latents up to 32, answers up to 16",
            size=size,
            paths=("plain", *(f"batch {b}" for b in batches)),
            items=(alone, *batches.values()),
            prompt=60,
            cot=(32,),
            memory=() if quick else ("plain", "batch 64", "batch 256"),
        )
    ]
    both = ("explicit", "latent")
    for batch in (1, 4) if quick else (1, 64):
        steps = 8 if quick else 96
        name = f"batch {batch}, {steps} steps each"
        found.append(
            Case(part="step", name=name, size=size, paths=both, items=(batch,) * 2, prompt=60, cot=(steps,), answer=1)
        )
    for batch in (4,) if quick else (1, 64, 250):
        name = f"batch {batch}, {QUICKSTART_TOKENS} tokens or {QUICKSTART_LATENTS} latents"
        count = batch if quick else max(8, 2 * batch)
        found.append(
            Case(part="quickstart", name=name, size=QUICKSTART, paths=both, items=(count,) * 2, prompt=30, answer=2)
        )
    return found


def small(case: Case) -> Case:
    """Return a case of the same kind that takes next to nothing."""
    return dataclasses.replace(case, items=(2,) * len(case.items), cot=(2,))


def build(case: Case, device: str) -> dict[str, Path]:
    """Return the paths of a case, on the same weights; a step solves `items` problems."""
    lm = _model(case.size, STOPS if case.part == "decode" else NEVER_STOPS, device)
    paths = {}
    for path in case.paths:
        spec, prompts = _spec(case, path), prompts_of(case, path)
        if path == "plain":
            paths[path] = Path(lm, list, lambda _, s=spec, p=prompts: [plain.answer(lm, s, one) for one in p])
            continue
        options = {
            "thinker": "explicit" if path == "explicit" else "latent",
            "max_cot_tokens": QUICKSTART_TOKENS if case.part == "quickstart" else (*case.cot, 0)[0],
            "batch_size": int((path if case.part == "decode" else case.name.split(",")[0]).split()[-1]),
        }
        paths[path] = Path(lm, list, lambda _, s=spec, p=prompts, o=options: generate(lm, s, p, **o))
    return paths


def _spec(case: Case, path: str) -> LatentSpec:
    latents = QUICKSTART_LATENTS if case.part == "quickstart" else case.cot[0]
    changes: dict[str, Any] = {"max_latents": latents, "max_answer_tokens": case.answer}
    if case.part == "quickstart":
        changes.update(think_ids=(1,), end_think_ids=(4,))
    return spec_of(case.size, **changes)


def prompts_of(case: Case, path: str) -> list[list[int]]:
    """Return the prompts that a call of this path solves.

    They are the same few problems as often as it takes, so that a problem is as long for every path.
    """
    rng = random.Random(2)
    prompts = []
    for _ in range(min(case.items)):
        length = rng.randint(case.prompt // 3, case.prompt)
        prompts.append([*(rng.randrange(8, case.size.vocab) for _ in range(length - 3)), 1, 2, 3])
    return [prompts[i % len(prompts)] for i in range(case.items[case.paths.index(path)])]


@cache
def _model(size: Size, stops: float, device: str) -> nn.Module:
    lm = build_lm(size, 0, device).eval()
    with torch.no_grad():
        head = lm.get_output_embeddings().weight
        head[[4, 7]] *= stops  # the first token of </think>, and EOS
    return lm
