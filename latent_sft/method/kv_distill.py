"""Distilling a cache: which of the teacher's keys and values a student's latents are drawn to, and by which distance.

Source: arXiv 2510.02312, eviction score after R-KV (arXiv 2505.24133). For a layer and a key head, over the N
tokens of the trace:

    I_i = mean over answer queries j and query heads of softmax_i(q_j . k_i / sqrt(d))      importance
    R_i = softmax_i(-(1/N) sum_{j != i} cos(k_i, k_j))                                      diversity (high: unlike)
    S_i = lambda I_i + (1 - lambda) R_i                                                     keep the largest M, in time

    L_KV = 1/(2M) (|sg[K~] - K_s|_p^p + |sg[V~] - V_s|_p^p)

Every function works on one layer, and on each example alone: a batch of N is N single examples, whatever the padding.
Published code takes the teacher's standard deviation over the batch; here it is that of each example, or the loss of a
row would depend on its neighbours. The distance of hidden states at one token (arXiv 2502.21074) is here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SELECTORS = ("rkv", "cosine", "attention", "crop", "uniform", "random")
EPS = 1e-8  # added to norms (Listing 1)
STD_FLOOR = 1e-6
# published Smooth-L1 is PyTorch's, with its bend at 1
DISTANCES: dict[str, Callable[..., Tensor]] = {
    "l1": functional.l1_loss,
    "smooth_l1": functional.smooth_l1_loss,
    "mse": functional.mse_loss,
}


class Kept(NamedTuple):
    """What a head keeps of a trace.

    Attributes:
        index: `[B, H, M]` positions in the trace, rising; arbitrary where `mask` is False.
        mask: `[B, H, M]` whether the slot is filled; a trace shorter than M fills the first slots only.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    mask: Tensor


def attention_logits(query: Tensor, key: Tensor, scale: float | None, softcap: float | None, pooling: str) -> Tensor:
    """Return the attention scores of some queries before the softmax, by key head.

    Args:
        query: `[B, H, Q, d]`.
        key: `[B, H_kv, K, d]`; H is a multiple of H_kv.
        scale: of the scores; None is 1/sqrt(d).
        softcap: c of `c * tanh(score / c)` (Gemma 2), or None.
        pooling: over the G query heads that share a key head: `mean` keeps them apart (their softmax is averaged
            later), `max` takes the largest score (R-KV).

    Returns:
        `[B, H_kv, G, Q, K]` in float32 (float64 stays), with G = 1 for `max`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = _precise(query).unflatten(1, (key.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):  # it would round products
        logits = grouped @ _precise(key)[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.amax(2, keepdim=True) if pooling == "max" else logits


def importance(logits: Tensor, trace: Tensor, queries: Tensor, log_total: Tensor | None = None) -> Tensor:
    """Return I: how much the answer attends to each token of the trace.

    Args:
        logits: `[B, H, G, Q, S]` of `attention_logits`, against the trace alone; -inf where a query does not see it.
        trace: `[B, S]` which of its tokens are real.
        queries: `[B, Q]` which queries count.
        log_total: `[B, H, G, Q]` logarithm of the softmax's denominator over everything the query sees; None takes the
            softmax over the trace alone (the printed formula).

    Returns:
        `[B, H, S]`, 0 where the token is not real.
    """
    seen = trace[:, None, None, None, :]
    if log_total is None:
        # a row without any trace is all -inf, which softmax would make NaN
        filled = torch.where(seen, logits, torch.finfo(logits.dtype).min)
        attention = torch.softmax(filled, dim=-1)
    else:
        attention = torch.exp(logits - log_total[..., None])
    attention = torch.where(seen, attention, 0.0).mean(2)
    share = queries.to(attention.dtype) / queries.sum(1, keepdim=True).clamp(min=1)
    return (attention * share[:, None, :, None]).sum(2)


def diversity(key: Tensor, trace: Tensor) -> Tensor:
    """Return R: how unlike the others each key of the trace is; sums to one over the trace.

    The sum of cosines with all others is a product with the sum of all unit keys, so no `[S, S]` matrix is made.

    Args:
        key: `[B, H, S, d]`.
        trace: `[B, S]` which tokens are real.

    Returns:
        `[B, H, S]`, 0 where the token is not real.
    """
    real = trace[:, None, :, None]
    key = torch.where(real, _precise(key), 0.0)
    unit = key / (key.norm(dim=-1, keepdim=True) + EPS)
    with_itself = unit.square().sum(-1)
    others = (unit * unit.sum(2, keepdim=True)).sum(-1) - with_itself
    count = trace.sum(1).clamp(min=1)[:, None, None]
    filled = torch.where(trace[:, None], -others / count, torch.finfo(others.dtype).min)
    return torch.where(trace[:, None], torch.softmax(filled, dim=-1), 0.0)


def scores(
    selector: str,
    key: Tensor,
    trace: Tensor,
    keep: int,
    *,
    attention: Tensor | None = None,
    share: float = 0.1,
    seed: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Return what a selector ranks the tokens of the trace by, `[B, H, S]`.

    Args:
        selector: of SELECTORS. rkv: `share * I + (1 - share) * R`; cosine: R; attention: I; crop: the first tokens;
            uniform: `keep` tokens evenly spaced over each row's own trace; random: a hash of row, layer, head and
            place, so that a row keeps the same tokens in every batch and epoch.
        key: `[B, H, S, d]`.
        trace: `[B, S]` which tokens are real.
        keep: M.
        attention: `[B, H, S]` of `importance`; needed by rkv and attention.
        share: of importance in rkv (paper: lambda).
        seed: `[B]` integers, one a row; needed by random.
        layer: index, for random.

    Raises:
        ValueError: unknown selector, or what it needs is missing.
    """
    batch, heads, length = key.shape[:3]
    at = torch.arange(length, device=key.device)
    if selector == "rkv" and attention is not None:
        return share * attention + (1 - share) * diversity(key, trace)
    if selector == "cosine":
        return diversity(key, trace)
    if selector == "attention" and attention is not None:
        return attention
    if selector == "crop":
        return -at.expand(batch, heads, length)
    if selector == "uniform":
        return _evenly_spaced(trace.sum(1), length, keep)[:, None].expand(batch, heads, length)
    if selector == "random" and seed is not None:
        head = torch.arange(heads, device=key.device)
        place = (layer * 1_000_003 + head[:, None]) * 1_000_003 + at
        return _hashed(_hashed(seed)[:, None, None] + place)
    raise ValueError(f"selector {selector!r}: expected one of {SELECTORS}, with what it needs")


def select(scores: Tensor, trace: Tensor, keep: int) -> Kept:
    """Return the `keep` real tokens with the largest scores of each head, in time order.

    Of equal scores the earlier one is kept.

    Args:
        scores: `[B, H, S]`.
        trace: `[B, S]` which tokens are real.
        keep: M; where a trace is shorter, all of it is kept and slots stay empty.
    """
    length, real = scores.shape[-1], trace[:, None].expand_as(scores)
    # stable, so that equal scores do not leave the choice to the batch's shape
    ranked = scores.masked_fill(~real, _lowest(scores)).sort(dim=-1, descending=True, stable=True)
    best = ranked.indices[..., :keep]
    index = torch.where(real.gather(-1, best), best, length).sort(dim=-1).values
    index = functional.pad(index, (0, keep - index.shape[-1]), value=length)
    mask = index < length
    return Kept(index.masked_fill(~mask, 0), mask)


def take(states: Tensor, kept: Kept) -> Tensor:
    """Return `[B, H, M, d]` of states `[B, H, S, d]`; 0 in slots that are not filled."""
    if states.shape[2] == 0:
        return states.new_zeros(*kept.index.shape, states.shape[-1])
    found = states.gather(2, kept.index[..., None].expand(-1, -1, -1, states.shape[-1]))
    return torch.where(kept.mask[..., None], found, 0.0)


def kv_distance(
    student: Tensor, teacher: Tensor, mask: Tensor, *, loss: str, std: bool, short: str, reduction: str
) -> Tensor:
    """Return the distance between a layer's keys (or values) and what was kept of the teacher's, one per example.

    Args:
        student: `[B, H, M, d]`.
        teacher: `[B, H, M, d]` of `take`; no gradient goes there.
        mask: `[B, H, M]` which slots the teacher fills.
        loss: `l1`, `smooth_l1` or `mse`.
        std: divide the residual by the standard deviation of the example's kept entries (over heads, slots and head
            size; published: over the batch too).
        short: empty slots are left out (`mask`) or drawn to zero (`zero`).
        reduction: `mean` over heads, slots and head size, or their `sum` divided by M.

    Returns:
        `[B]`; 0 where no slot counts.
    """
    student, teacher = _precise(student), _precise(teacher.detach())
    filled = mask[..., None].to(teacher.dtype)
    if std:
        scale = _masked_std(teacher, filled)[:, None, None, None]
        student, teacher = student / scale, teacher / scale
    each = DISTANCES[loss](student, teacher, reduction="none")
    if short == "mask":
        each, count = each * filled, filled.sum((1, 2, 3)) * student.shape[-1]
    else:
        count = torch.full((len(each),), each[0].numel(), dtype=each.dtype, device=each.device)
    total = each.sum((1, 2, 3))
    return total / student.shape[2] if reduction == "sum" else total / count.clamp(min=1)


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], *, loss: str, std: str) -> Tensor:
    """Return the distance (arXiv 2502.21074) of the hidden states at one token, mean over layers, one per example.

    Args:
        student: one `[B, D]` a layer.
        teacher: likewise; no gradient goes there.
        loss: `smooth_l1` (published), `l1` or `mse`; the mean over D.
        std: the loss is divided by the teacher's standard deviation over D of that `layer`, over D and `all` layers, or
            not (`none`). Of each example alone; published code takes it over the batch too.

    Returns:
        `[B]`.
    """
    ours, theirs = _precise(torch.stack(list(student), 1)), _precise(torch.stack(list(teacher), 1).detach())
    each = DISTANCES[loss](ours, theirs, reduction="none").mean(-1)  # [B, L]
    if std == "layer":
        each = each / theirs.std(-1, correction=0).clamp(min=STD_FLOOR)
    elif std == "all":
        each = each / theirs.flatten(1).std(-1, correction=0).clamp(min=STD_FLOOR)[:, None]
    return each.mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cosines `[B, H, M]` of states `[B, H, M, d]`, for the logs."""
    return functional.cosine_similarity(_precise(student), _precise(teacher), dim=-1)


def _masked_std(values: Tensor, filled: Tensor) -> Tensor:
    # of the filled entries of each example, 1 where there are none
    count = (filled.sum((1, 2, 3)) * values.shape[-1]).clamp(min=1)[:, None, None, None]
    mean = (values * filled).sum((1, 2, 3), keepdim=True) / count
    variance = ((values - mean).square() * filled).sum((1, 2, 3), keepdim=True) / count
    std = variance.sqrt().clamp(min=STD_FLOOR)
    return torch.where(filled.sum((1, 2, 3), keepdim=True) > 0, std, 1.0)[:, 0, 0, 0]


def _evenly_spaced(lengths: Tensor, width: int, keep: int) -> Tensor:
    # 1 at the middles of `keep` equal parts of each row, `floor((2i + 1) N / (2M))`, all different where N >= M
    middles = (2 * torch.arange(keep, device=lengths.device) + 1) * lengths[:, None] // (2 * keep)
    marked = torch.zeros(len(lengths), width + 1, device=lengths.device)
    return marked.scatter(1, middles.clamp(max=width), 1.0)[:, :width]


def _hashed(x: Tensor) -> Tensor:
    # murmur3's last steps, on 32 bits in int64
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x


def _lowest(scores: Tensor) -> float | int:
    return torch.finfo(scores.dtype).min if scores.is_floating_point() else torch.iinfo(scores.dtype).min


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
