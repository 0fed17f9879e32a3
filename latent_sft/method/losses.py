"""Losses over labelled positions only, as sums; the trainer divides by counts of the whole global batch.

Every function takes logits of M labelled positions and a weight for each, so that the normalisation (token, segment,
sample) is a choice of the layout and stays right under padding, accumulation and data parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_sft.method.types import Superposition


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_m w_m * (logsumexp(logits_m) - logits_m[target_m])` in float32.

    Args:
        logits: `[M, V]`; M may be 0, the sum is then 0 with a gradient of 0.
        targets: `[M]` token ids.
        weights: `[M]`.

    Returns:
        Scalar, nats.
    """
    precise = _precise(logits)
    losses = torch.nn.functional.cross_entropy(precise, targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()


def weighted_sparse_kl(logits: Tensor, teacher: Superposition, weights: Tensor) -> Tensor:
    """Return `sum_m w_m * KL(teacher_m || student_m)`: forward KL of the stored latents (reference section 1.8).

        KL = sum_{v in K} a[v] (log a[v] - log softmax(logits)[v])

    The student is normalised over the full vocabulary at temperature 1, the teacher over its K entries.

    Args:
        logits: `[M, V]` student logits read one position before each latent.
        teacher: ids and weights `[M, K]`.
        weights: `[M]`.

    Returns:
        Scalar, nats; never negative, and 0 exactly when the student equals the teacher.
    """
    precise = _precise(logits)
    student = precise.gather(-1, teacher.ids) - torch.logsumexp(precise, dim=-1, keepdim=True)
    alpha = teacher.weights.to(precise.dtype)
    # entr(a) = -a log a with 0 log 0 = 0
    divergence = -(torch.special.entr(alpha) + alpha * student).sum(-1)
    return (divergence * weights.to(divergence.dtype)).sum()


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
