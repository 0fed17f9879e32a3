"""Losses over labelled positions only, as sums; the trainer divides by counts of the whole global batch.

Every function takes M labelled positions and a weight for each, so that the reduction (token, segment, sample) is a
choice of the layout and stays right under padding, accumulation and data parallelism.

Hard cross-entropy and the KL from a sparse teacher are one sum, for weights alpha over K ids:

    nll = logsumexp(logits) * sum_k alpha_k - sum_k alpha_k logits[id_k]

K = 1 with alpha = 1 is cross-entropy; the KL is `nll` minus the teacher's entropy. `weighted_cross_entropy` and
`weighted_sparse_kl` are the definitions, on logits `[M, V]`. Training uses `linear_nll`, which never holds them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from latent_sft.method.superposition import entropy
from latent_sft.method.types import Superposition

# Size of one chunk of float32 logits. With fewer than about 100 rows per chunk the products run at half their speed or
# less, since each chunk passes over the weight and its gradient (measured on a CPU, V = 32000, D = 256); many more rows
# only take memory. An accelerator outruns its memory by more than a CPU does and needs several times the rows.
CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_ACCELERATOR = 512 * 2**20


class StepOutput(NamedTuple):
    """What the forward pass of a model under training returns for a micro-batch.

    Attributes:
        loss_sums: name of a term -> its sum, a scalar. The trainer divides it by the sum of `count_<name>` over the
            micro-batches of the optimizer step, on all processes.
        observed: name -> (sum, count), scalars without gradient, of what describes the step; quotients are logged.
    """

    loss_sums: dict[str, Tensor]
    observed: dict[str, tuple[Tensor, Tensor]]


class LinearHead(NamedTuple):
    """The map from hidden states to logits, `cap * tanh(x / cap)` of `x = scale * (hidden @ weight.T + bias)`.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        scale: factor on the logits (Cohere multiplies, Granite divides).
        softcap: bound on the logits (Gemma 2), or None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_m w_m * (logsumexp(logits_m) - logits_m[target_m])` in float32.

    Args:
        logits: `[M, V]`; M may be 0, the sum is then 0 with a gradient of 0.
        targets: `[M]` token ids.
        weights: `[M]`.

    Returns:
        Scalar, nats.
    """
    precise = logits.to(_precise(logits.dtype))
    losses = torch.nn.functional.cross_entropy(precise, targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()


def weighted_sparse_kl(logits: Tensor, teacher: Superposition, weights: Tensor) -> Tensor:
    """Return `sum_m w_m * KL(teacher_m || student_m)`: forward KL of the stored latents (docs/internals/method.md).

        KL = sum_{v in K} a[v] (log a[v] - log softmax(logits)[v])

    The student is normalised over the full vocabulary at temperature 1, the teacher over its K entries.

    Args:
        logits: `[M, V]` student logits read one position before each latent.
        teacher: ids and weights `[M, K]`; repeated ids add.
        weights: `[M]`.

    Returns:
        Scalar, nats; never negative, and 0 exactly when the student equals the teacher.
    """
    precise = logits.to(_precise(logits.dtype))
    student = precise.gather(-1, teacher.ids) - torch.logsumexp(precise, dim=-1, keepdim=True)
    alpha = teacher.weights.to(precise.dtype)
    divergence = -entropy(Superposition(teacher.ids, alpha)) - (alpha * student).sum(-1)
    return (divergence * weights.to(divergence.dtype)).sum()


def sparse_nll(logits: Tensor, ids: Tensor, alpha: Tensor) -> Tensor:
    """Return `sum_k alpha_k (logsumexp(logits) - logits[id_k])` of each row, `[M]`, in float32 (float64 stays).

    Args:
        logits: `[M, V]`.
        ids: `[M, K]` token ids.
        alpha: `[M, K]` weights of the ids; a row of zeros gives 0.
    """
    precise = logits.to(_precise(logits.dtype))
    away = torch.logsumexp(precise, dim=-1, keepdim=True) - precise.gather(-1, ids)
    return (alpha.to(precise.dtype) * away).sum(-1)


@torch.compiler.disable  # a loop over few large products: nothing to fuse, and M changes with every batch
def linear_nll(
    hidden: Tensor, head: LinearHead, ids: Tensor, alpha: Tensor, weights: Tensor, chunk: int | None = None
) -> Tensor:
    """Return `sum_m w_m * sparse_nll(logits_m)` without ever holding the logits `[M, V]`.

    Rows are taken in chunks; the logits of a chunk are turned in place into their own gradient, and that at once into
    the gradients of `hidden` and of the head. So there are three products and nothing is computed twice (after Liger
    kernel's fused linear cross-entropy, and torch's `linear_cross_entropy`, which has neither weights per row nor
    sparse targets). Under autocast the products run in its type, everything else in float32 (float64 stays).

    Extra memory: a chunk of logits, two with soft-capping or in half precision, and the gradients in float32.
    Gradients of `ids`, `alpha` and `weights` do not exist: labels are constants. The result can be differentiated
    once; torch raises where a graph is kept and walked again.

    Args:
        hidden: `[M, D]`; M may be 0, the sum is then 0 with gradients of 0.
        head: the map to logits; its tensors may be frozen, then nothing is spent on their gradients.
        ids: `[M, K]` token ids.
        alpha: `[M, K]` weights of the ids.
        weights: `[M]` weights of the positions.
        chunk: rows at a time; None for as many as fit CHUNK_BYTES_CPU or CHUNK_BYTES_ACCELERATOR.

    Returns:
        Scalar, nats.
    """
    assert not (alpha.requires_grad or weights.requires_grad)
    chunk = chunk or chunk_rows(len(head.weight), hidden.device)
    # inside a Function gradients look switched off and `needs_input_grad` does not know of no_grad
    trained = (hidden, head.weight, head.bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in trained)
    return _LinearNLL.apply(*trained, head.scale, head.softcap, ids, alpha, weights, chunk, wanted)


def mapped_nll(
    hidden: Tensor, to_logits: Callable[[Tensor], Tensor], ids: Tensor, alpha: Tensor, weights: Tensor, chunk: int
) -> Tensor:
    """Return the same sum as `linear_nll` for any map to logits, for heads that are not one plain matrix.

    Each chunk is computed again in the backward pass, so memory is bounded alike and time is a third more.

    Args:
        hidden: `[M, D]`; for M = 0 the map is still called once, as a module with collective hooks must be.
        to_logits: `[m, D]` to `[m, V]`.
        ids: `[M, K]` token ids.
        alpha: `[M, K]` weights of the ids.
        weights: `[M]` weights of the positions.
        chunk: rows at a time; at M or above, one call and nothing computed twice.

    Returns:
        Scalar, nats.
    """

    def part(hidden: Tensor, ids: Tensor, alpha: Tensor, weights: Tensor) -> Tensor:
        losses = sparse_nll(to_logits(hidden), ids, alpha)
        return (losses * weights.to(losses.dtype)).sum()

    inputs = (hidden, ids, alpha, weights)
    if len(hidden) <= chunk:
        return part(*inputs)
    pieces = zip(*(x.split(_balanced(len(hidden), chunk)) for x in inputs), strict=True)
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Return how many rows of float32 logits make a chunk on this device, at least 1."""
    size = CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES_ACCELERATOR
    return max(1, size // (4 * vocab_size))


def _balanced(num: int, chunk: int) -> int:
    # as many chunks, of equal size: one of few rows passes over the whole weight and its gradient all the same
    return max(1, math.ceil(num / max(1, math.ceil(num / chunk))))


class _LinearNLL(torch.autograd.Function):
    """Gradients are made in the forward pass, up to the factor that comes in backward: the result is a scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        ids: Tensor,
        alpha: Tensor,
        weights: Tensor,
        chunk: int,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        device = hidden.device.type
        low = hidden.dtype
        if torch.is_autocast_enabled(device) and low != torch.float64:
            low = torch.get_autocast_dtype(device)
        head = LinearHead(weight.to(low), bias, scale, softcap)
        with torch.autocast(device, enabled=False):
            total, *gradients = _walk(hidden, head, low, ids, alpha, weights, chunk, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        # in place, since a second copy of the head's gradient would stand beside all activations; autograd refuses a
        # second backward by the version of the saved tensors
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = [None if saved is None else saved.mul_(incoming).to(dtype) for saved, dtype in pairs]
        return *gradients, *[None] * 7


def _walk(
    hidden: Tensor,
    head: LinearHead,
    low: torch.dtype,
    ids: Tensor,
    alpha: Tensor,
    weights: Tensor,
    chunk: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the sum and the wanted gradients of hidden states, weight and bias; products run in `low`."""
    exact = _precise(low)
    num, vocab = len(hidden), len(head.weight)
    chunk = _balanced(num, chunk)
    total = hidden.new_zeros((), dtype=exact)
    shapes = (hidden.shape, head.weight.shape, (vocab,))
    gradients = [hidden.new_zeros(s, dtype=exact) if want else None for s, want in zip(shapes, wanted, strict=True)]
    of_hidden, of_weight, of_bias = gradients
    buffer = hidden.new_empty((min(chunk, num), vocab), dtype=exact)  # one for all chunks
    for begin in range(0, num, chunk):
        rows = slice(begin, min(begin + chunk, num))
        inputs, share, factor = hidden[rows].to(low), alpha[rows].to(exact), weights[rows].to(exact)
        logits = buffer[: len(inputs)]
        slope = _logits_into(logits, inputs, head, keep_slope=any(wanted))
        top = logits.amax(-1, keepdim=True)
        picked = logits.gather(-1, ids[rows])
        mass = logits.sub_(top).exp_().sum(-1, keepdim=True)
        total += factor @ (share * (top + mass.log() - picked)).sum(-1)
        if not any(wanted):
            continue
        # d nll / d logits = softmax * sum(alpha) - alpha; the weight of the row and the scale go to the narrow factor
        error = logits.mul_(share.sum(-1, keepdim=True) / mass).scatter_add_(-1, ids[rows], -share)
        if slope is not None:
            error.mul_(slope)
        factor = (factor * head.scale)[:, None]
        if of_bias is not None:
            of_bias.addmv_(error.t(), factor[:, 0])
        error = error.to(low)
        if of_hidden is not None:
            torch.mul(error @ head.weight, factor, out=of_hidden[rows])
        if of_weight is not None:
            scaled = (inputs * factor).to(low)
            if low == exact:
                of_weight.addmm_(error.t(), scaled)
            else:
                of_weight.add_(error.t() @ scaled)
    return total, of_hidden, of_weight, of_bias


def _logits_into(out: Tensor, inputs: Tensor, head: LinearHead, keep_slope: bool) -> Tensor | None:
    """Write the logits to `out`, return the derivative of the soft-cap there (None where it is 1 or not asked for)."""
    if inputs.dtype == out.dtype:
        torch.mm(inputs, head.weight.t(), out=out)
    else:
        out.copy_(inputs @ head.weight.t())
    if head.bias is not None:
        out.add_(head.bias)
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is None:
        return None
    out.div_(head.softcap).tanh_()
    slope = out.square().neg_().add_(1.0) if keep_slope else None
    out.mul_(head.softcap)
    return slope


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
