"""Numbers about samples and latents: standard error, pass@k, and how well latents cover the CoT (ECR@K).

The entropy of a latent is `superposition.entropy`. Where the paper's formula is not known, the docstring says that the
definition is reconstructed; do not compare such numbers with published ones without that remark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_sft.method.types import Superposition


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; NaN for fewer than two.

    For accuracy, give one value a problem: its 0/1 grade, or its share of correct samples (samples of one problem are
    not independent).
    """
    n = len(values)
    if n < 2:
        return math.nan
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is correct (Chen et al. 2021, arXiv 2107.03374).

        1 - C(n - c, k) / C(n, k)

    Exact in integers until the one division. Average it over problems.

    Args:
        num_samples: n, samples drawn for the problem.
        num_correct: c, correct ones among them.
        k: 1..n.

    Raises:
        ValueError: k or num_correct out of range.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {num_correct} correct in {num_samples} samples: need 1 <= k <= n, 0 <= c <= n")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def near_equal_spans(length: int, num_spans: int) -> list[range]:
    """Cut `length` tokens into near-equal spans `[floor(t L / T), floor((t + 1) L / T))` (docs/metrics.md).

    >>> [list(s) for s in near_equal_spans(5, 2)]
    [[0, 1], [2, 3, 4]]
    """
    return [range(t * length // num_spans, (t + 1) * length // num_spans) for t in range(num_spans)]


def ecr_at_k(latents: Superposition, cot: Sequence[int], k: int) -> float:
    """Return ECR@K, how many tokens of its own span of the CoT a latent has among its K largest entries, on average.

        ECR@K = (1 / T) sum_t |{x in S_t : x in TopK(alpha_t)}|,   S_t = span t of T near-equal spans of the CoT

    **Reconstructed** (docs/metrics.md): the paper's formula is not confirmed. A token that occurs twice in a span
    counts twice, so that the upper bound is exactly L / T (whether the paper does so is not known). Entries of weight
    zero never count.

    Args:
        latents: `[T, K']` generated latents, T >= 1, in any order of entries.
        cot: the gold CoT, L token ids.
        k: entries of a latent that count, 1..K'.

    Raises:
        ValueError: no latents, or k larger than the entries kept.
    """
    num_latents = latents.ids.shape[0]
    if num_latents == 0:
        raise ValueError("ECR@K of no latents is undefined")
    hits = token_mass(largest(latents, k), cot) > 0  # [T, L]
    spans = near_equal_spans(len(cot), num_latents)
    return sum(int(hits[t, s.start : s.stop].sum()) for t, s in enumerate(spans)) / num_latents


def largest(latents: Superposition, k: int) -> Superposition:
    """Return the k largest entries of each latent, `[..., K]` -> `[..., k]`, largest first, not renormalised.

    Raises:
        ValueError: k larger than the entries kept.
    """
    if not 1 <= k <= latents.ids.shape[-1]:
        raise ValueError(f"the {k} largest of {latents.ids.shape[-1]} entries are asked for")
    weights, order = latents.weights.topk(k, dim=-1)
    return Superposition(latents.ids.gather(-1, order), weights)


def token_mass(latents: Superposition, tokens: Sequence[int]) -> Tensor:
    """Return the weight that each latent gives to each token, `[T, K]` and L tokens -> `[T, L]`."""
    wanted = torch.as_tensor(tokens, dtype=latents.ids.dtype)
    # one latent at a time: [T, K, L] at once would not fit for full-vocabulary latents and long CoTs
    rows = [w @ (i[:, None] == wanted).to(w.dtype) for i, w in zip(latents.ids, latents.weights.double(), strict=True)]
    return torch.stack(rows)
