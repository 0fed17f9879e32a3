"""Slow, independent definitions of span labels (MUX, arXiv 2607.18264, Eq. 2), written from the paper's formula.

Nothing of `latent_sft` is imported; a code word is a dictionary of exact fractions where rho is one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


def mux(span: Sequence[int], rho: Any) -> dict[int, Any]:
    """Return the masses of `sum_j rho^(j-1) onehot(s_j) / sum_l rho^(l-1)`; those of repeated tokens add."""
    total = sum(rho**j for j in range(len(span)))
    masses: dict[int, Any] = {}
    for j, token in enumerate(span):
        masses[token] = masses.get(token, 0) + rho**j / total
    return masses


def distance(word: dict[int, Any], latent: dict[int, Any], measure: str) -> float:
    """Return L1, or KL(word || latent)."""
    tokens = word.keys() | latent.keys()
    if measure == "nearest":
        return float(sum(abs(word.get(t, 0) - latent.get(t, 0)) for t in tokens))
    return sum(float(m) * math.log(float(m) / max(float(latent.get(t, 0)), 1e-9)) for t, m in word.items())


def best(latent: dict[int, Any], longest: int, rho: Any, measure: str) -> float:
    """Return the smallest distance of any span of 1..longest tokens of the latent, by trying all of them."""
    return min(
        distance(mux(span, rho), latent, measure)
        for length in range(1, longest + 1)
        for span in itertools.product(latent, repeat=length)
    )


def smallest_gap(length: int, rho: Fraction) -> Fraction:
    """Return the smallest difference of the sums of two different subsets of the weights, subset by subset."""
    total = sum(rho**j for j in range(length))
    sums = [
        sum((rho**j / total for j in chosen), Fraction(0))
        for size in range(length + 1)
        for chosen in itertools.combinations(range(length), size)
    ]
    return min(abs(a - b) for a, b in itertools.combinations(sums, 2))
