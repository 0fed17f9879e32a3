"""The decoding step as a CUDA graph by `torch.compile`: what it decodes equals what the plain step decodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch._dynamo.utils import counters

from eval.gpu.parts import Case, Result, Settings
from eval.speed.cases import FULL, STOPS, TINY, build_lm, prompts_of, spec_of
from eval.speed.cases import Case as Rows
from latent_sft.inference.generate import Decoded, generate

# rows of float32 in which another order of sums may have decided between two tokens as good as equal
DIFFERENT = 0.01


def cases(settings: Settings) -> Sequence[Case]:
    """Return a case for every way of thinking and batch size."""
    batches = (1, 4) if settings.tiny else (1, 16, 64, 256)
    kinds = ("latent", "explicit")
    return [Case(f"{kind}, batch {b}", partial(_case, settings, kind, b), 0.9) for kind in kinds for b in batches]


def _case(settings: Settings, kind: str, batch: int) -> Result:
    size = TINY if settings.tiny else FULL
    lm = build_lm(size, 0, settings.device).eval()
    with torch.no_grad():  # so that rows end after varied lengths
        lm.get_output_embeddings().weight[[4, 7]] *= STOPS
    spec = spec_of(size, max_latents=24, max_answer_tokens=8)
    prompts = prompts_of(Rows(part="decode", name="", size=size, prompt=40, paths=("x",), items=(batch + 3,)), "x")
    torch._dynamo.reset()
    counters.clear()

    def decoded(**how: bool) -> list[Decoded]:
        return generate(lm, spec, prompts, thinker=kind, batch_size=batch, max_cot_tokens=24, **how)

    plain, static = decoded(), decoded(static=True)
    # on a CPU compiling takes longer than all else; tests/inference compile there
    compiled = static if settings.device == "cpu" else decoded(compile=True)
    skips, steps = counters["inductor"]["cudagraph_skips"], counters["frames"]["ok"]
    made = settings.device == "cpu" or (steps > 0 and not skips)  # torch goes on without what it cannot compile
    result = {"static": _other(plain, static), "compiled": _other(plain, compiled)}
    same = max(result.values()) <= DIFFERENT and made
    return {"same": same, **result, "compiled steps": steps, "graphs skipped": skips}


def _other(expected: list[Decoded], found: list[Decoded]) -> float:
    """Return the share of problems with other latents or another answer."""

    def differs(a: Decoded, b: Decoded) -> bool:
        if (a.num_steps, a.thought_ids, a.answer_ids) != (b.num_steps, b.thought_ids, b.answer_ids):
            return True
        if a.latent_weights is None or b.latent_weights is None:
            return False
        return not torch.allclose(a.latent_weights, b.latent_weights, rtol=1e-3, atol=1e-4)

    return sum(map(differs, expected, found)) / len(expected)
