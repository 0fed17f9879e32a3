"""Losses: hand numbers, the definitions of `reference.py`, gradients, and what must hold for every input."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_sft.method.losses import (
    CHUNK_BYTES_CPU,
    LinearHead,
    chunk_rows,
    linear_nll,
    mapped_nll,
    sparse_nll,
    weighted_cross_entropy,
    weighted_sparse_kl,
)
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


# ---------------------------------------------------------------------------------------------------- chunks of logits


def problem(seed: int, num: int, vocab: int = V, width: int = 4, top_k: int = K, dtype: torch.dtype = torch.float64):
    """Hidden states [M, D], a head with everything, ids and alpha [M, K] (rows of zeros among them), weights [M]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    hidden, head = normal(num, width), LinearHead(normal(vocab, width), normal(vocab), 0.7, 3.0)
    ids = torch.rand(num, vocab, generator=generator).argsort(-1)[:, :top_k]
    alpha, weights = torch.rand(num, top_k, generator=generator), torch.rand(num, generator=generator)
    alpha[1::3] = 0.0
    weights[2::4] = 0.0
    return hidden, head, ids, alpha.to(dtype), weights.to(dtype)


def full_logits(hidden: Tensor, head: LinearHead) -> Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain(hidden: Tensor, head: LinearHead, ids: Tensor, alpha: Tensor, weights: Tensor) -> Tensor:
    """The sum as cross-entropy against a dense target, on all logits at once."""
    target = torch.zeros(len(ids), len(head.weight), dtype=alpha.dtype).scatter_add(-1, ids, alpha)
    losses = -(target * torch.log_softmax(full_logits(hidden, head), -1)).sum(-1)
    return (losses * weights).sum()


def gradients(loss: Tensor, head: LinearHead, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in (hidden, head.weight, head.bias) if x is not None]))


def assert_close(found: Tensor, expected: Tensor, rel: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert torch.allclose(found, expected, rtol=0.0, atol=rel * scale)


def test_chunked_sum_by_hand() -> None:
    """Head of ones and zeros: logits (x, 0, 0) with e^x = 2, so p = (1/2, 1/4, 1/4).

    Row 0, alpha (1) on id 0, weight 1: log 2. Row 1, alpha (1/2, 1/2) on ids 1 and 2, weight 1/2: 1/2 log 4 = log 2.
    The gradient of hidden is w (p_0 - alpha_0), the error of the only column that it reaches.
    """
    hidden = torch.full((2, 1), math.log(2.0), requires_grad=True)
    head = LinearHead(torch.tensor([[1.0], [0.0], [0.0]]))
    ids, alpha = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    total = linear_nll(hidden, head, ids, alpha, torch.tensor([1.0, 0.5]), chunk=1)
    assert total.item() == pytest.approx(2 * math.log(2))
    total.backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([-0.5, 0.25])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(0, 9),
    st.integers(1, 11),
    st.integers(1, V),
    st.sampled_from([None, 0.5, 3.0]),
    st.booleans(),
)
def test_any_chunking_equals_the_definition(seed, num, chunk, top_k, softcap, bias) -> None:
    hidden, head, ids, alpha, weights = problem(seed, num, top_k=top_k)
    head = head._replace(softcap=softcap, bias=head.bias if bias else None)
    expected = plain(hidden, head, ids, alpha, weights)
    mapped = mapped_nll(hidden, lambda x: full_logits(x, head), ids, alpha, weights, chunk)
    wanted = gradients(expected * 0.3, head, hidden)  # a factor, as the division by the counts of the batch is
    for found in (linear_nll(hidden, head, ids, alpha, weights, chunk), mapped):
        assert found.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
        for one, other in zip(gradients(found * 0.3, head, hidden), wanted, strict=True):
            assert_close(one, other, 1e-12)


def test_sparse_nll_of_every_row_equals_the_reference() -> None:
    logits, _targets, teacher, _weights = inputs(4)
    for m, found in enumerate(sparse_nll(logits, teacher.ids, teacher.weights).tolist()):
        pairs = zip(teacher.ids[m].tolist(), teacher.weights[m].tolist(), strict=True)
        expected = sum(-a * reference.log_probability(logits[m].tolist(), v) for v, a in pairs)
        assert found == pytest.approx(expected, rel=1e-12)


class Again(torch.autograd.Function):
    """`linear_nll` that may be differentiated often, as gradcheck does: it is computed anew each time."""

    @staticmethod
    def forward(ctx, run, *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx, incoming: Tensor):
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            total = ctx.run(*leaves)
        return None, *torch.autograd.grad(total, leaves, incoming)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_chunks_by_finite_differences(softcap) -> None:
    hidden, head, ids, alpha, weights = problem(5, 7)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_nll(hidden, LinearHead(weight, bias, 0.7, softcap), ids, alpha, weights, chunk=3)

    assert torch.autograd.gradcheck(lambda *x: Again.apply(run, *x), (hidden, head.weight, head.bias))


def test_float32_is_within_a_hundred_thousandth_of_float64() -> None:
    exact = problem(6, 40, vocab=3000, width=32, top_k=10)
    hidden, head, ids, alpha, weights = exact
    expected = plain(*exact)
    single = [x.detach().float().requires_grad_() for x in (hidden, head.weight, head.bias)]
    low = LinearHead(single[1], single[2], head.scale, head.softcap)
    found = linear_nll(single[0], low, ids, alpha.float(), weights.float(), chunk=7)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(gradients(found, low, single[0]), gradients(expected, head, hidden), strict=True):
        assert_close(one.double(), other, 1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_loses_no_more_than_twice_what_full_logits_lose(autocast) -> None:
    exact = problem(7, 60, vocab=500, width=16)
    hidden, head, ids, alpha, weights = exact
    expected = plain(*exact)
    truth = [expected.detach(), *gradients(expected, head, hidden)]
    kept = torch.float32 if autocast else torch.bfloat16
    low = [x.detach().to(kept).requires_grad_() for x in (hidden, head.weight, head.bias)]
    errors = []
    for chunk in (None, 7):
        part = LinearHead(low[1], low[2], head.scale, head.softcap)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if chunk is None:
                total = (sparse_nll(full_logits(low[0], part), ids, alpha.float()) * weights.float()).sum()
            else:
                total = linear_nll(low[0], part, ids, alpha.float(), weights.float(), chunk)
        assert total.dtype == torch.float32
        values = [total.detach(), *gradients(total, part, low[0])]
        assert [x.dtype for x in values[1:]] == [kept] * 3
        errors.append([(x.double() - y).norm().item() for x, y in zip(values, truth, strict=True)])
    for of_plain, of_chunks in zip(*errors, strict=True):
        assert of_chunks <= 2 * of_plain + 1e-9
    assert all(error > 0 for error in errors[1])  # it did run in bfloat16


def test_no_row_gives_zero_and_zero_gradients_of_everything() -> None:
    """Connected all the same: data-parallel wrappers wait for a gradient of every parameter."""
    hidden, head, ids, alpha, weights = problem(8, 0)
    calls = []
    mapped = mapped_nll(hidden, lambda x: calls.append(1) or full_logits(x, head), ids, alpha, weights, 4)
    assert len(calls) == 1
    for total in (linear_nll(hidden, head, ids, alpha, weights), mapped):
        assert total.item() == 0.0
        for found in gradients(total, head, hidden):
            assert not found.any()


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_parts_get_no_gradient_and_leave_the_others_alone(trained) -> None:
    exact = problem(9, 6)
    hidden, head, ids, alpha, weights = exact
    expected = gradients(plain(*exact), head, hidden)
    tensors = [x.detach().requires_grad_(on) for x, on in zip((hidden, head.weight, head.bias), trained, strict=True)]
    linear_nll(tensors[0], LinearHead(tensors[1], tensors[2], 0.7, 3.0), ids, alpha, weights, 2).backward()
    for tensor, on, other in zip(tensors, trained, expected, strict=True):
        if on:
            assert_close(tensor.grad, other, 1e-12)
        else:
            assert tensor.grad is None


def test_without_gradients_the_value_is_the_same() -> None:
    exact = problem(10, 6)
    expected = linear_nll(*exact, chunk=4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = linear_nll(*exact, chunk=4)
        assert not found.requires_grad
        assert found.item() == expected.item()


def test_a_weight_used_twice_collects_both_gradients() -> None:
    """Tied embeddings: the table makes the hidden states as well as the logits; two losses, accumulated twice."""
    _hidden, head, ids, alpha, weights = problem(11, 6)
    table = head.weight.detach().requires_grad_()
    tokens = torch.tensor([0, 3, 3, 6, 2, 1])

    def total(loss) -> Tensor:
        part = LinearHead(table, None, 0.7)
        once = loss(table[tokens], part, ids, alpha, weights)
        return 0.2 * once + 0.5 * loss(2 * table[tokens[:3]], part, ids[:3], alpha[:3], weights[:3])

    (expected,) = torch.autograd.grad(total(plain), table)
    for _ in range(2):
        total(lambda *x: linear_nll(*x, chunk=4)).backward()
    assert_close(table.grad, 2 * expected, 1e-12)


def test_a_kept_graph_is_refused_and_not_wrong() -> None:
    total = linear_nll(*problem(12, 5), chunk=2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_small_weights_survive_half_precision() -> None:
    """float16 ends at 6e-8: an error of 1e-2 times a weight of 1e-7 must not be rounded to zero on the way."""
    hidden, head, ids, alpha, _ = problem(13, 8, vocab=50, dtype=torch.float32)
    small = torch.full((8,), 1e-7)
    part = LinearHead(head.weight, head.bias)
    expected = gradients(plain(hidden, part, ids, alpha, small), part, hidden)
    with torch.autocast("cpu", dtype=torch.float16):
        total = linear_nll(hidden, part, ids, alpha, small, chunk=3)
    # the weight's gradient sums products of float16, so a part of it is below its range; that of hidden is not
    assert_close(gradients(total, part, hidden)[0], expected[0], 1e-2)


class Largest(TorchDispatchMode):
    """Remember the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk() -> None:
    """64 rows of 300 logits in chunks of 16: nothing has more than 16 x 300 elements, forward and backward.

    With room for 48 there are two chunks too, of 32 rows each and not of 48 and 16.
    """
    hidden, head, ids, alpha, weights = problem(14, 64, vocab=300)
    largest = {}
    for name, chunk in (("all", 64), ("chunks", 16), ("balanced", 48)):
        for kind in ("linear", "mapped"):
            with Largest() as seen:
                if kind == "linear":
                    linear_nll(hidden, head, ids, alpha, weights, chunk).backward()
                else:
                    mapped_nll(hidden, lambda x: full_logits(x, head), ids, alpha, weights, chunk).backward()
            largest[name, kind] = seen.elements
    assert largest["all", "linear"] == largest["all", "mapped"] == 64 * 300
    assert largest["chunks", "linear"] == largest["chunks", "mapped"] == 16 * 300
    assert largest["balanced", "linear"] == largest["balanced", "mapped"] == 32 * 300


def test_chunks_fit_their_size() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(32_768, cpu) * 32_768 * 4 == CHUNK_BYTES_CPU
    assert chunk_rows(10**9, cpu) == 1
