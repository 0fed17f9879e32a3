"""Do the latents hold what the gold CoT says? Our own measure, made for the comparison; no paper defines it.

For each problem, G = the distinct tokens of the gold CoT that are not in the prompt (what has to be worked out), and
L = the distinct tokens its thoughts name: for latents the kept top-k of each, for an explicit CoT what is written.

    gold_recall          mean over problems of |G and L| / |G|
    gold_recall_chance   the same with the G of another problem (without this prompt's tokens too): operators are in
                         every CoT, and thoughts that name many tokens hit some by chance

Their difference is what the thoughts say about *this* problem. What a latent holds in a form that the LM head does not
read (as hidden states may) is not seen by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latent_sft.evaluation.intervals import derangement

if TYPE_CHECKING:
    from latent_sft.inference.generate import Decoded


def agreement(decoded: Sequence[Decoded], rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, float]:
    """Return `gold_recall` and, with two problems or more, `gold_recall_chance`; nothing where there are no thoughts.

    Args:
        decoded: one sample a problem.
        rows: the problems (`prompt`, `cot`); those without a CoT token of their own, or without thoughts, are left out.
        seed: of the exchange of CoTs.
    """
    named = [said(sample) for sample in decoded]
    new = [set(row["cot"]) - set(row["prompt"]) for row in rows]
    own = [_share(gold, tokens) for gold, tokens in zip(new, named, strict=True)]
    used = [i for i, share in enumerate(own) if share is not None and named[i]]
    if not used:
        return {}
    found = {"gold_recall": _mean([own[i] for i in used])}
    if len(used) > 1:
        others = [used[j] for j in derangement(len(used), seed)]
        shares = [_share(new[j] - set(rows[i]["prompt"]), named[i]) for i, j in zip(used, others, strict=True)]
        if any(share is not None for share in shares):
            found["gold_recall_chance"] = _mean(shares)
    return found


def said(sample: Decoded) -> set[int]:
    """Return the tokens that a sample's thoughts name; entries of weight 0 are not named."""
    if sample.latent_ids is None:
        return set(sample.thought_ids)
    assert sample.latent_weights is not None
    return set(sample.latent_ids[sample.latent_weights > 0].tolist())


def _share(gold: set[int], named: set[int]) -> float | None:
    return len(gold & named) / len(gold) if gold else None


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known)
