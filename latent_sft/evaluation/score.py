"""From decoded problems to numbers: accuracy, cost counted apart, and what the latents hold.

Pure: no model, no files. `summary` and `problems` are what `<run>/eval/<model>/<split>.json` holds (see `report`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from latent_sft.evaluation.answers import Grader, extract_answer, is_correct
from latent_sft.method.layout import split_cot
from latent_sft.method.metrics import ecr_at_k, largest, pass_at_k, standard_error
from latent_sft.method.superposition import entropy
from latent_sft.method.types import LatentSpec, Superposition

if TYPE_CHECKING:
    from latent_sft.inference.generate import Decoded

ECR_K = (1, 5, 10, 50, 100, 150, 200, 250, 300)  # small ones, and those of the paper's figure
PASS_K = (1, 4, 8, 16, 32, 64)  # of the published code
HEATMAP_TOKENS = 10
ANSWER_POSITIONS = 32  # an answer's first tokens, each with an accuracy of its own


def score(
    decoded: Sequence[Decoded],
    rows: Sequence[Mapping[str, Any]],
    *,
    spec: LatentSpec,
    decode_text: Callable[[list[int]], str],
    grader: Grader,
    wall_seconds: float,
    samples_per_problem: int = 1,
    heatmap_problems: int = 4,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Grade decoded samples and count what they cost.

    Args:
        decoded: samples, those of one problem next to each other: S of the first problem, S of the second, ...
        rows: the problems, tokenized rows (`id, cot, segment_lengths, answer, problem, reference, steps`).
        spec: of the model that decoded.
        decode_text: token ids to text.
        grader: how answers are compared.
        wall_seconds: of decoding them all.
        samples_per_problem: S.
        heatmap_problems: the first sample of so many problems carries its latents.

    Returns:
        `(summary, problems)`. The summary has, where defined: `accuracy` (mean over all samples), `accuracy_se` (over
        problems), `num_examples`, `samples_per_problem`, `grader`, `reasoning_steps_mean` (latent steps or explicit
        tokens), `{latent_steps,explicit_tokens,answer_tokens,forward_passes,cache_positions}_{mean,max}`,
        `finished_share`, `seconds_per_problem`, `pass_at` {k: value}, `accuracy_by_steps` {number of CoT steps:
        {accuracy, accuracy_se, num_examples}}, `accuracy_by_position` {position of an answer token, from 1:
        {accuracy, num_examples}}; and for latent thinking `latent_entropy_mean` (nats), `end_top1_share` (latents
        whose top-1 is the first token of `</think>`), `ecr` {K: value}.
        One record of `problems` a sample, in order; see `_record`.

    Raises:
        ValueError: the number of samples is not S times the number of problems.
    """
    if not rows or len(decoded) != len(rows) * samples_per_problem:
        raise ValueError(f"{len(decoded)} samples for {len(rows)} problems of {samples_per_problem} samples each")
    problems = [
        _record(
            sample,
            rows[number // samples_per_problem],
            sample_number=number % samples_per_problem,
            with_latents=number % samples_per_problem == 0 and number // samples_per_problem < heatmap_problems,
            end=len(spec.end_think_ids),
            decode_text=decode_text,
            grader=grader,
        )
        for number, sample in enumerate(decoded)
    ]
    correct = [
        sum(p["correct"] for p in problems[first : first + samples_per_problem])
        for first in range(0, len(problems), samples_per_problem)
    ]
    shares = [c / samples_per_problem for c in correct]
    summary: dict[str, Any] = {
        "accuracy": _mean(shares),
        "accuracy_se": _finite(standard_error(shares)),
        "num_examples": len(rows),
        "samples_per_problem": samples_per_problem,
        "grader": grader,
        "reasoning_steps_mean": _mean([s.num_steps for s in decoded]),
    }
    for name in ("latent_steps", "explicit_tokens", "answer_tokens", "forward_passes", "cache_positions"):
        counts = [p[name] for p in problems]
        summary |= {f"{name}_mean": _mean(counts), f"{name}_max": max(counts)}
    summary |= {
        "finished_share": _mean([s.finished for s in decoded]),
        "seconds_per_problem": wall_seconds / len(rows),
        "pass_at": {
            str(k): _mean([pass_at_k(samples_per_problem, c, k) for c in correct])
            for k in PASS_K
            if k <= samples_per_problem
        },
        "accuracy_by_steps": _by_steps([len(row.get("steps") or ()) for row in rows], shares),
        "accuracy_by_position": _by_position(decoded, rows, spec, samples_per_problem),
        **_latent_numbers(decoded, rows, spec, samples_per_problem),
    }
    return summary, problems


def _record(
    sample: Decoded,
    row: Mapping[str, Any],
    *,
    sample_number: int,
    with_latents: bool,
    end: int,
    decode_text: Callable[[list[int]], str],
    grader: Grader,
) -> dict[str, Any]:
    """One sample as plain values; each of its `latents` is a list of [token text, weight], largest first."""
    is_latent = sample.latent_ids is not None
    text = decode_text(sample.answer_ids)
    record: dict[str, Any] = {
        "id": row["id"],
        "sample": sample_number,
        "prediction": text,
        "extracted": extract_answer(text),
        "reference": row["reference"],
        "correct": is_correct(text, row["reference"], grader),
        "finished": sample.finished,
        "latent_steps": sample.num_steps if is_latent else 0,
        "explicit_tokens": 0 if is_latent else sample.num_steps,
        "answer_tokens": len(sample.answer_ids),
        "forward_passes": sample.forward_passes,
        "cache_positions": len(row.get("prompt", ())) + sample.num_steps + len(sample.answer_ids) + end,
    }
    if with_latents:
        record["problem"] = row["problem"]
        record["thought"] = decode_text(sample.thought_ids)
        record["cot_chunks"] = [decode_text(chunk) for chunk in split_cot(row["cot"], row["segment_lengths"])]
        if is_latent:
            latents = _latents(sample)
            kept = largest(latents, min(HEATMAP_TOKENS, latents.ids.shape[-1]))
            record["latents"] = [
                [[decode_text([token]), round(weight, 4)] for token, weight in zip(ids, weights, strict=True)]
                for ids, weights in zip(kept.ids.tolist(), kept.weights.tolist(), strict=True)
            ]
    return record


def _latents(sample: Decoded) -> Superposition:
    assert sample.latent_ids is not None and sample.latent_weights is not None
    return Superposition(sample.latent_ids, sample.latent_weights)


def _latent_numbers(
    decoded: Sequence[Decoded], rows: Sequence[Mapping[str, Any]], spec: LatentSpec, samples_per_problem: int
) -> dict[str, Any]:
    thought = [
        (_latents(sample), rows[number // samples_per_problem]["cot"])
        for number, sample in enumerate(decoded)
        if sample.latent_ids is not None and sample.latent_ids.shape[0] > 0
    ]
    if not thought:
        return {}
    every = torch.cat([entropy(latents) for latents, _ in thought])
    top1 = torch.cat([largest(latents, 1).ids[:, 0] for latents, _ in thought])
    kept = min(spec.top_k, *(latents.ids.shape[-1] for latents, _ in thought))
    return {
        "latent_entropy_mean": every.mean().item(),
        "end_top1_share": (top1 == spec.end_think_ids[0]).double().mean().item(),
        "ecr": {
            str(k): _mean([ecr_at_k(latents, cot, k) for latents, cot in thought if cot])
            for k in sorted({*ECR_K, kept})
            if k <= kept and any(cot for _, cot in thought)
        },
    }


def _by_steps(num_steps: Sequence[int], shares: Sequence[float]) -> dict[str, Any]:
    groups: dict[int, list[float]] = {}
    for steps, share in zip(num_steps, shares, strict=True):
        if steps > 0:
            groups.setdefault(steps, []).append(share)
    return {
        str(steps): {"accuracy": _mean(g), "accuracy_se": _finite(standard_error(g)), "num_examples": len(g)}
        for steps, g in sorted(groups.items())
    }


def _by_position(
    decoded: Sequence[Decoded], rows: Sequence[Mapping[str, Any]], spec: LatentSpec, samples_per_problem: int
) -> dict[str, Any]:
    groups: list[list[bool]] = [[] for _ in range(ANSWER_POSITIONS)]
    for number, sample in enumerate(decoded):
        said = [*sample.answer_ids, spec.eos_id] if sample.finished else sample.answer_ids
        reference = rows[number // samples_per_problem]["answer"]
        for place, token in enumerate(reference[:ANSWER_POSITIONS]):
            groups[place].append(said[place : place + 1] == [token])
    return {
        str(position): {"accuracy": _mean(g), "num_examples": len(g) // samples_per_problem}
        for position, g in enumerate(groups, start=1)
        if g
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # NaN is not JSON
