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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latent_sft.evaluation.intervals import derangement
from latent_sft.method.metrics import largest
from latent_sft.method.types import Superposition

if TYPE_CHECKING:
    from latent_sft.inference.generate import Decoded


def agreement(decoded: Sequence[Decoded], rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, float]:
    """Return the four numbers; no chance level for one problem alone, nothing at all where there are no thoughts.

    Args:
        decoded: one sample per problem.
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


def span_agreement(
    decoded: Sequence[Decoded],
    rows: Sequence[Mapping[str, Any]],
    spans_of: Callable[[Mapping[str, Any]], list[list[int]]],
) -> dict[str, Any]:
    """Return how far latents that stand for spans of tokens stand for those of the reference CoT, place by place.

    Args:
        decoded: one sample per problem.
        rows: the problems; those without a CoT are left out.
        spans_of: row -> the spans of its reference CoT.

    Returns:
        `spans_exact` and `spans_multiset` (shares of the reference's spans that the latent at their place reads token
        by token, or but for the order), `thought_exact` (share of problems whose whole thought is the reference's),
        `first_wrong_latent_mean` (place of the first wrong one, from 1, where one is) and `spans_by_position` {place:
        {`exact`, `num_examples`}}; nothing where no row has a CoT.
    """
    exact: dict[int, list[bool]] = {}
    same_tokens, whole, first_wrong = [], [], []
    for sample, row in zip(decoded, rows, strict=True):
        reference, read = spans_of(row) if row["cot"] else [], sample.spans or []
        if not reference:
            continue
        right = [read[i : i + 1] == [span] for i, span in enumerate(reference)]
        same_tokens += [bool(read[i:]) and Counter(read[i]) == Counter(span) for i, span in enumerate(reference)]
        whole.append(read == reference)
        if not whole[-1]:
            first_wrong.append(([*right, False]).index(False) + 1)
        for place, found in enumerate(right, start=1):
            exact.setdefault(place, []).append(found)
    if not exact:
        return {}
    every = [found for places in exact.values() for found in places]
    return {
        "spans_exact": sum(every) / len(every),
        "spans_multiset": sum(same_tokens) / len(same_tokens),
        "thought_exact": sum(whole) / len(whole),
        "first_wrong_latent_mean": sum(first_wrong) / len(first_wrong) if first_wrong else None,
        "spans_by_position": {
            str(place): {"exact": sum(found) / len(found), "num_examples": len(found)} for place, found in exact.items()
        },
    }
