"""Stage 2: forward and backward with stored latents."""

from __future__ import annotations

import dataclasses
from functools import cache

from torch import Tensor, nn

from eval.speed import plain
from eval.speed.cases import FULL, TINY, Case, Path, Size, build_lm, random_labels, rows_of, spec_of
from latent_sft.data.collate import Batch
from latent_sft.method.types import Superposition
from latent_sft.methods.latent_sft import stage2_batch
from latent_sft.models.stage2 import Stage2Model


def cases(quick: bool) -> list[Case]:
    """Return one case: prompts of 512 tokens, 64 latents, answers of 16 tokens, 4 rows."""
    size, prompt, latents, rows = (TINY, 12, 5, 2) if quick else (FULL, 512, 64, 4)
    both = ("plain", "fast")
    name = f"{rows} rows of prompt {prompt}, {latents} latents, answer 16"
    return [Case(part="stage2", name=name, size=size, prompt=prompt, cot=(latents,) * rows, rate=1, memory=both)]


def small(case: Case) -> Case:
    """Return a case of the same kind that takes next to nothing."""
    return dataclasses.replace(case, cot=(2,), prompt=8)


def build(case: Case, device: str) -> dict[str, Path]:
    """Return the paths of a case, on the same weights; a CoT of rate 1 stands for as many latents."""
    fast, slow = _models(case.size, device)
    rows, spec = rows_of(case), fast.spec
    labels = {row["id"]: random_labels(len(row["cot"]), case.size.vocab, i) for i, row in enumerate(rows)}

    def label_of(row_id: str, _hash: str) -> Superposition:
        return labels[row_id]

    def fast_batch() -> Batch:
        return plain.to_device(stage2_batch(rows, spec, label_of=label_of, normalisation="token"), device)

    def fast_step(batch: Batch) -> Tensor:
        out = fast(**batch)
        loss = out["ce_total"] / batch["counts"][0] + out["kl_total"] / batch["counts"][1]
        loss.backward()
        return loss.detach()

    def plain_step(batch: Batch) -> Tensor:
        loss = plain.stage2_loss(slow, batch)
        loss.backward()
        return loss.detach()

    return {
        "plain": Path(
            slow, lambda: plain.to_device(plain.stage2_inputs(rows, list(labels.values()), spec), device), plain_step
        ),
        "fast": Path(fast.lm, fast_batch, fast_step),
    }


@cache
def _models(size: Size, device: str) -> tuple[Stage2Model, nn.Module]:
    fast = Stage2Model(build_lm(size, 0, device), spec_of(size)).train()
    return fast, build_lm(size, 0, device).train()
