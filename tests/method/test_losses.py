"""Losses: hand numbers, the definitions of `reference.py`, gradients, and what must hold for every input."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_sft.method.losses import weighted_cross_entropy, weighted_sparse_kl
from latent_sft.method.superposition import superpose
from latent_sft.method.types import Superposition

M, V, K = 5, 7, 3


def inputs(seed: int, num: int = M) -> tuple[Tensor, Tensor, Superposition, Tensor]:
    """Logits [M, V], targets [M], teacher [M, K], weights [M], in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, V, dtype=torch.float64, generator=generator)
    targets = torch.randint(V, (num,), generator=generator)
    teacher = superpose(torch.randn(num, V, dtype=torch.float64, generator=generator), K)
    weights = torch.rand(num, dtype=torch.float64, generator=generator)
    return logits, targets, teacher, weights


def test_cross_entropy_by_hand() -> None:
    """Probabilities (1/2, 1/4, 1/4): the losses of targets 0 and 2 are log 2 and log 4; weights 1 and 1/2."""
    logits = torch.tensor([[0.5, 0.25, 0.25]] * 2, dtype=torch.float64).log()
    total = weighted_cross_entropy(logits, torch.tensor([0, 2]), torch.tensor([1.0, 0.5]))
    assert total.item() == pytest.approx(math.log(2) + 0.5 * math.log(4))


def test_kl_by_hand() -> None:
    """Teacher (1/2, 1/2) on entries 0 and 1, student (1/2, 1/4, 1/4): 1/2 log 1 + 1/2 log 2 = 1/2 log 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log() + 3.0
    teacher = Superposition(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    total = weighted_sparse_kl(logits, teacher, torch.tensor([1.0]))
    assert total.item() == pytest.approx(0.5 * math.log(2))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_losses_equal_the_reference(seed: int, num: int) -> None:
    logits, targets, teacher, weights = inputs(seed, num)
    rows, w = logits.tolist(), weights.tolist()
    ce = sum(-w[m] * reference.log_probability(rows[m], int(targets[m])) for m in range(num))
    labels = [dict(zip(teacher.ids[m].tolist(), teacher.weights[m].tolist(), strict=True)) for m in range(num)]
    kl = sum(w[m] * reference.kl_divergence(labels[m], rows[m]) for m in range(num))
    assert weighted_cross_entropy(logits, targets, weights).item() == pytest.approx(ce, rel=1e-12)
    assert weighted_sparse_kl(logits, teacher, weights).item() == pytest.approx(kl, rel=1e-12)


def test_gradients() -> None:
    logits, targets, teacher, weights = inputs(0)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_cross_entropy(x, targets, weights), (logits,))
    assert torch.autograd.gradcheck(lambda x: weighted_sparse_kl(x, teacher, weights), (logits,))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_kl_is_never_negative(seed: int) -> None:
    logits, _targets, teacher, _weights = inputs(seed)
    for m in range(M):
        one = weighted_sparse_kl(logits[m : m + 1], Superposition(*(x[m : m + 1] for x in teacher)), torch.ones(1))
        assert one.item() > 0  # strictly: the student has mass outside the teacher's entries


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.05, 2.0))
def test_kl_is_zero_exactly_when_student_equals_teacher(seed: int, change: float) -> None:
    logits, *_ = inputs(seed)
    teacher = superpose(logits, V)
    assert weighted_sparse_kl(logits, teacher, torch.ones(M)).item() == pytest.approx(0.0, abs=1e-12)
    other = logits.clone()
    other[0, 0] += change
    assert weighted_sparse_kl(other, teacher, torch.ones(M)).item() > 1e-9


def test_kl_gradient_is_student_minus_teacher() -> None:
    """d KL / d logits = softmax(logits) - teacher, so it vanishes where they agree."""
    logits, _targets, teacher, _weights = inputs(1)
    logits.requires_grad_()
    weighted_sparse_kl(logits, teacher, torch.ones(M)).backward()
    dense = torch.zeros(M, V, dtype=torch.float64).scatter(-1, teacher.ids, teacher.weights)
    assert torch.allclose(logits.grad, torch.softmax(logits.detach(), -1) - dense)


def test_a_teacher_entry_of_weight_zero_counts_nothing() -> None:
    """0 log 0 = 0, even where the student gives that entry no probability at all."""
    logits = torch.tensor([[0.0, 0.0, -1e4]])
    teacher = Superposition(torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.5, 0.0]]))
    assert weighted_sparse_kl(logits, teacher, torch.ones(1)).item() == pytest.approx(0.0, abs=1e-6)


def test_no_labelled_position_gives_zero_and_zero_gradient() -> None:
    hidden = torch.randn(4, V, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    empty = Superposition(torch.zeros(0, K, dtype=torch.long), torch.zeros(0, K))
    total = weighted_cross_entropy(hidden[none], none, torch.zeros(0)) + weighted_sparse_kl(
        hidden[none], empty, torch.zeros(0)
    )
    assert total.item() == 0.0
    total.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_positions_of_weight_zero_get_no_gradient() -> None:
    logits, targets, teacher, weights = inputs(2)
    logits.requires_grad_()
    weights[1] = 0.0
    (weighted_cross_entropy(logits, targets, weights) + weighted_sparse_kl(logits, teacher, weights)).backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0] != 0).any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, M))
def test_sums_add_over_any_split_and_order(seed: int, cut: int) -> None:
    logits, targets, teacher, weights = inputs(seed)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    for loss, labels in ((weighted_cross_entropy, (targets,)), (weighted_sparse_kl, teacher)):

        def part(index: Tensor, loss=loss, labels=labels) -> float:
            chosen = [x[index] for x in labels]
            label = chosen[0] if len(chosen) == 1 else Superposition(*chosen)
            return loss(logits[index], label, weights[index]).item()

        assert part(order[:cut]) + part(order[cut:]) == pytest.approx(part(torch.arange(M)), rel=1e-12)


def test_half_precision_logits_are_reduced_in_float32() -> None:
    """bfloat16 inputs cost only their own rounding: the float32 loss of the rounded logits, exactly."""
    logits, targets, teacher, weights = inputs(3)
    rounded = logits.bfloat16()
    assert weighted_cross_entropy(rounded, targets, weights).dtype == torch.float32
    assert torch.equal(
        weighted_cross_entropy(rounded, targets, weights), weighted_cross_entropy(rounded.float(), targets, weights)
    )
    assert torch.equal(
        weighted_sparse_kl(rounded, teacher, weights), weighted_sparse_kl(rounded.float(), teacher, weights)
    )


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    teacher = Superposition(torch.tensor([[1]]), torch.tensor([[1.0]]))
    assert weighted_cross_entropy(logits, torch.tensor([1]), torch.ones(1)).item() == pytest.approx(2e4)
    assert weighted_sparse_kl(logits, teacher, torch.ones(1)).item() == pytest.approx(2e4)
