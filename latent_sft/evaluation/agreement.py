"""Do the latents hold what the gold CoT says? Our own measure, made for the comparison; no paper defines it.

For each problem, G = the distinct tokens of the gold CoT that are not in the prompt (what has to be worked out), and
L = the distinct tokens its thoughts name: for latents the kept top-k of each, for an explicit CoT what is written.

    gold_recall          mean over problems of |G and L| / |G|
    gold_recall_chance   the same with the G of another problem (without this prompt's tokens too): operators are in
                         every CoT, and thoughts that name many tokens hit some by chance

    gold_recall_top1, gold_recall_top1_chance    the same with the likeliest token of each latent alone; where the
                         vocabulary is small, the top-k of several latents soon name all of it

Their difference is what the thoughts say about *this* problem. What a latent holds in a form that the LM head does not
read (as hidden states may) is not seen by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latent_sft.evaluation.intervals import derangement
from latent_sft.method.metrics import largest
from latent_sft.method.types import Superposition

if TYPE_CHECKING:
    from latent_sft.inference.generate import Decoded


def agreement(decoded: Sequence[Decoded], rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, float]:
    """Return the four numbers; no chance level for one problem alone, nothing at all where there are no thoughts.

    Args:
        decoded: one sample a problem.
        rows: the problems (`prompt`, `cot`); those without a CoT token of their own, or without thoughts, are left out.
        seed: of the exchange of CoTs.
    """
    found = {}
    for suffix, top in (("", None), ("_top1", 1)):
        recall, chance = _recall([said(sample, top) for sample in decoded], rows, seed)
        found |= {f"gold_recall{suffix}": recall, f"gold_recall{suffix}_chance": chance}
    return {name: value for name, value in found.items() if value is not None}


def said(sample: Decoded, top: int | None = None) -> set[int]:
    """Return the tokens that a sample's thoughts name, of each latent the `top` first; weight 0 names nothing."""
    if sample.latent_ids is None:
        return set(sample.thought_ids)
    assert sample.latent_weights is not None
    latents = Superposition(sample.latent_ids, sample.latent_weights)
    if top is not None and len(latents.ids):
        latents = largest(latents, top)
    return set(latents.ids[latents.weights > 0].tolist())


def _recall(
    named: Sequence[set[int]], rows: Sequence[Mapping[str, Any]], seed: int
) -> tuple[float | None, float | None]:
    new = [set(row["cot"]) - set(row["prompt"]) for row in rows]
    used = [i for i, gold in enumerate(new) if gold and named[i]]
    own = _mean([_share(new[i], named[i]) for i in used])
    if len(used) < 2:
        return own, None
    others = [used[j] for j in derangement(len(used), seed)]
    return own, _mean([_share(new[j] - set(rows[i]["prompt"]), named[i]) for i, j in zip(used, others, strict=True)])


def _share(gold: set[int], named: set[int]) -> float | None:
    return len(gold & named) / len(gold) if gold else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
