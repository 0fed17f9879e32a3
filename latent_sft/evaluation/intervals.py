"""Errors and intervals of accuracies over seeds and problems. Numbers in, numbers out.

A table `[S, n]` holds the share of correct answers of S training seeds on the same n problems. Seeds and problems are
both taken for samples: another training run, and other problems of the same kind.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Correct = NDArray[np.float64]

RESAMPLES = 10_000
_CHUNK = 2_000_000  # entries drawn at once


class Difference(NamedTuple):
    """Difference of two accuracies and its 95 % interval."""

    value: float
    low: float
    high: float


def accuracy_error(correct: Correct) -> float | None:
    """Return one standard error of the mean of `[S, n]`, over seeds and problems; None for a single number.

    Two-way random effects: with one seed, the standard error over problems (for right and wrong answers the binomial
    one, with n - 1). With more,

        se^2 = var(seed means) / S + var(problem means) / n - residual / (S n)

    with the residual of the additive model, which both variances hold; never below either of them.
    """
    seeds, problems = correct.shape
    of_seeds = float(correct.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    of_problems = float(correct.mean(0).var(ddof=1)) / problems if problems > 1 else 0.0
    if seeds == 1 or problems == 1:
        return math.sqrt(of_seeds + of_problems) if correct.size > 1 else None
    rest = correct - correct.mean(1, keepdims=True) - correct.mean(0, keepdims=True) + correct.mean()
    residual = float((rest**2).sum()) / ((seeds - 1) * (problems - 1))
    return math.sqrt(max(of_seeds + of_problems - residual / correct.size, of_seeds, of_problems))


def paired_difference(left: Correct, right: Correct, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Return mean(left) - mean(right) with its paired bootstrap interval.

    Each resample draws n problems with replacement and, where there are two seeds or more, S seeds, the same ones for
    both; the interval goes from the 2.5th to the 97.5th percentile of the differences. With few seeds such intervals
    are narrow (two seeds give three distinct draws).

    Args:
        left: `[S, n]`.
        right: `[S, n]`, the same seeds and problems.
        resamples: how many.
        seed: of the draws.

    Raises:
        ValueError: different shapes, or nothing in them.
    """
    if left.shape != right.shape or left.size == 0:
        raise ValueError(f"paired tables of shapes {left.shape} and {right.shape}")
    by_problem = np.ascontiguousarray((left - right).T)  # [n, S]
    problems, seeds = by_problem.shape
    rng = np.random.default_rng(seed)
    found = []
    for count in _chunks(resamples, max(1, _CHUNK // problems)):
        drawn = by_problem[rng.integers(problems, size=(count, problems))].mean(1)  # [count, S]
        chosen = rng.integers(seeds, size=(count, seeds))
        found.append(np.take_along_axis(drawn, chosen, axis=1).mean(1) if seeds > 1 else drawn[:, 0])
    low, high = np.percentile(np.concatenate(found), (2.5, 97.5))
    return Difference(float(by_problem.mean()), float(low), float(high))


def derangement(count: int, seed: int) -> list[int]:
    """Return a random partner for each of `count` things, never itself and each the partner of one: a single cycle.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} things cannot exchange places")
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, -1)
    return partner.tolist()


def _chunks(total: int, size: int) -> list[int]:
    return [size] * (total // size) + ([total % size] if total % size else [])
