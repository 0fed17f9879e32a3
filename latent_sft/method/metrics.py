"""Numbers about samples and latents: pass@k, how well latents cover the CoT (ECR@K), how many solution paths they hold.

The entropy of a latent is `superposition.entropy`. Where the paper's formula is not known, the docstring says that the
definition is reconstructed; do not compare such numbers with published ones without that remark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_sft.method.types import Superposition

N_EFF_TOP = 100  # entries of a latent that count as its support (published code)
N_EFF_MATCHINGS = 64  # random matchings of the baseline (published code)
N_EFF_FLOOR = 1e-12  # added before the logarithm (published code)


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
    """Cut `length` tokens into near-equal spans `[floor(t L / T), floor((t + 1) L / T))` (reference section 2).

    >>> [list(s) for s in near_equal_spans(5, 2)]
    [[0, 1], [2, 3, 4]]
    """
    return [range(t * length // num_spans, (t + 1) * length // num_spans) for t in range(num_spans)]


def ecr_at_k(latents: Superposition, cot: Sequence[int], k: int) -> float:
    """Return ECR@K, how many tokens of its own span of the CoT a latent has among its K largest entries, on average.

        ECR@K = (1 / T) sum_t |{x in S_t : x in TopK(alpha_t)}|,   S_t = span t of T near-equal spans of the CoT

    **Reconstructed** (reference section 2): the paper's formula is not confirmed. A token that occurs twice in a span
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


class SolutionPath(NamedTuple):
    """One way to solve a problem, for N_eff.

    Attributes:
        tokens: its CoT, token ids.
        latents: `[T_ref, K]` what the encoder makes of it (the reference latents).
    """

    tokens: Sequence[int]
    latents: Superposition


class PathScores(NamedTuple):
    """How a latent chain spreads over several solution paths.

    Attributes:
        posterior: `[M]` share of each distinct path.
        n_eff: effective number of paths, exp of the entropy of the posterior, 1..M.
        n_eff_random: mean of the same number under random matchings.
        score: `n_eff / n_eff_random`.
    """

    posterior: Tensor
    n_eff: float
    n_eff_random: float
    score: float


def path_scores(
    latents: Superposition, paths: Sequence[SolutionPath], *, temperature: float = 1.0, generator: torch.Generator
) -> PathScores:
    """Return N_eff, the effective number of solution paths that a chain of latents keeps open.

    The version of the published code's `parallelism.py` (reference section 2, steps 2-8; the formula of the first
    paper version is not confirmed). For each distinct path m: take `T_m = min(T, T_ref)` steps and cut its tokens into
    T_m spans; match each latent, in step order, greedily and without reuse, to the nearest reference latent, giving pi;

        s_m = (1 / T_m) sum_t log(sum_{v in S_{m, pi(t)}, v in Top100(p_t)} p_t(v) + 1e-12)
        N_eff = exp(H(softmax(s / temperature))),   score = N_eff / (mean N_eff over 64 random matchings)

    A token that occurs twice in a span is added twice, as in that code. "Nearest" is by cosine distance between the
    distributions p_t themselves, which needs no embedding table.

    **Defect of the definition**: N_eff is largest (the number of paths) where all paths score equally *badly*, so a
    garbage chain gets the best value. Only the ratio `score` mitigates that. Read it together with accuracy.

    Args:
        latents: `[T, K]` generated latents, T >= 1.
        paths: at least two distinct ones.
        temperature: of the softmax over paths (published: 1).
        generator: draws the random matchings.

    Raises:
        ValueError: no latents, an empty path, or fewer than two distinct paths.
    """
    distinct = list({tuple(path.tokens): path for path in reversed(paths)}.values())[::-1]
    if len(distinct) < 2:
        raise ValueError(f"N_eff needs at least 2 distinct solution paths, got {len(distinct)}")
    if latents.ids.shape[0] == 0 or any(not path.tokens or path.latents.ids.shape[0] == 0 for path in distinct):
        raise ValueError("N_eff needs at least one latent, and one token and one reference latent per path")
    kept = largest(latents, min(N_EFF_TOP, latents.ids.shape[-1]))
    tables = [_span_scores(kept, path) for path in distinct]  # per path [T_m, T_m]: latent t against span j
    matchings = [
        _greedy_matching(cosine_similarity(latents, path.latents)[: len(table), : len(table)])
        for path, table in zip(distinct, tables, strict=True)
    ]
    posterior = _posterior(tables, matchings, temperature)
    random = [
        _effective(_posterior(tables, [torch.randperm(len(t), generator=generator) for t in tables], temperature))
        for _ in range(N_EFF_MATCHINGS)
    ]
    n_eff, n_eff_random = _effective(posterior), math.fsum(random) / len(random)
    return PathScores(posterior, n_eff, n_eff_random, n_eff / n_eff_random)


def top2_score(posterior: Tensor) -> float:
    """Return how competitive the second path stays, `p_(2) / p_(1)` of the posterior of `path_scores`.

    **Reconstructed** (reference section 2): the paper's formula is not confirmed; this one fits that the published
    values rise together with N_eff.

    Args:
        posterior: `[M]`, M >= 2.
    """
    first, second = posterior.topk(2).values.tolist()
    return second / first


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


def cosine_similarity(left: Superposition, right: Superposition) -> Tensor:
    """Return the cosine between distributions over the vocabulary, `[T, K]` and `[U, K']` -> `[T, U]`."""

    def norms(latents: Superposition) -> Tensor:
        return latents.weights.double().norm(dim=-1)

    dots = torch.stack(
        [token_mass(left, ids.tolist()) @ w for ids, w in zip(right.ids, right.weights.double(), strict=True)], dim=1
    )
    return dots / (norms(left)[:, None] * norms(right)[None])


def _span_scores(latents: Superposition, path: SolutionPath) -> Tensor:
    steps = min(latents.ids.shape[0], path.latents.ids.shape[0])
    mass = token_mass(Superposition(latents.ids[:steps], latents.weights[:steps]), path.tokens)
    spans = near_equal_spans(len(path.tokens), steps)
    sums = torch.stack([mass[:, s.start : s.stop].sum(-1) for s in spans], dim=1)
    return torch.log(sums + N_EFF_FLOOR)


def _greedy_matching(similarity: Tensor) -> Tensor:
    free = similarity.clone()
    chosen = torch.empty(len(similarity), dtype=torch.long)
    for step in range(len(similarity)):
        chosen[step] = free[step].argmax()
        free[:, chosen[step]] = -math.inf
    return chosen


def _posterior(tables: Sequence[Tensor], matchings: Sequence[Tensor], temperature: float) -> Tensor:
    scores = [t.gather(1, m[:, None]).mean() for t, m in zip(tables, matchings, strict=True)]
    return torch.softmax(torch.stack(scores) / temperature, dim=0)


def _effective(posterior: Tensor) -> float:
    return math.exp(torch.special.entr(posterior).sum().item())
