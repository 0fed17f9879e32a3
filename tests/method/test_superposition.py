"""Superpositions: limits, gradients, and the one noise function, against the loops of `reference.py`."""

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

from latent_sft.method.projection import superpose_states
from latent_sft.method.superposition import (
    GROUP,
    combine,
    entropy,
    gumbel,
    largest,
    largest_but,
    mix,
    perturb,
    superpose,
    weighted,
)
from latent_sft.method.types import Superposition

CLIP = (-1.5, 3.0)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, float]:
    """Logits [N, V] without ties, a table [V, D], k and a temperature."""
    n, v, d = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = 4 * torch.randn(n, v, dtype=torch.float64, generator=generator)
    table = torch.randn(v, d, dtype=torch.float64, generator=generator)
    return logits, table, draw(st.integers(1, v)), draw(st.floats(0.25, 8.0))


def random_latents(seed: int, shape: tuple[int, ...], vocab: int) -> Superposition:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(*shape[:-1], vocab, generator=generator).topk(shape[-1]).indices
    return Superposition(ids, torch.softmax(2 * torch.randn(shape, generator=generator, dtype=torch.float64), -1))


def noisy(latent: Superposition, draws: Tensor, scale: float = 1.0, temperature: float = 1.0, end_id: int = -1):
    return perturb(latent, draws, scale=scale, temperature=temperature, clip=CLIP, end_id=end_id)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_superpose_and_mix_equal_the_reference(drawn: tuple) -> None:
    logits, table, top_k, temperature = drawn
    latent = superpose(logits, top_k, temperature)
    embeddings = mix(latent, table)
    for n in range(len(logits)):
        expected = reference.superpose(logits[n].tolist(), top_k, temperature)
        assert dict(zip(latent.ids[n].tolist(), latent.weights[n].tolist(), strict=True)) == pytest.approx(expected)
        assert embeddings[n].tolist() == pytest.approx(reference.mixture(expected, table.tolist()), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_weights_lie_on_the_simplex_largest_first(drawn: tuple) -> None:
    logits, _table, top_k, temperature = drawn
    ids, weights = superpose(logits, top_k, temperature)
    assert ids.shape == weights.shape == (len(logits), top_k)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(len(logits), dtype=torch.float64))
    assert (weights.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_one_kept_entry_is_an_ordinary_token() -> None:
    logits, table = torch.tensor([[0.1, 2.0, -1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    latent = superpose(logits, 1)
    assert latent.ids.tolist() == [[1]] and latent.weights.tolist() == [[1.0]]
    assert torch.equal(mix(latent, table), table[1:2])


@settings(deadline=None, max_examples=30)
@given(tables())
def test_all_kept_entries_are_the_dense_distribution(drawn: tuple) -> None:
    logits, table, _top_k, temperature = drawn
    dense = torch.softmax(logits / temperature, -1) @ table
    assert torch.allclose(mix(superpose(logits, logits.shape[-1], temperature), table), dense)


def test_worked_numbers() -> None:
    """Logits (log 6, log 3, log 1), k = 2: weights 6/9 and 3/9; at temperature 1/2 the squares, 36/45 and 9/45."""
    logits = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64).log()
    assert superpose(logits, 2).weights.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert superpose(logits, 2, 0.5).weights.tolist() == pytest.approx([0.8, 0.2])


def test_gradient_reaches_the_kept_logits_only() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    table = torch.eye(4, dtype=torch.float64)
    mix(superpose(logits, 2), table)[0, 0].backward()
    assert (logits.grad[0, :2] != 0).all()
    assert (logits.grad[0, 2:] == 0).all()


def test_gradient_of_superpose_and_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    table = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda h: mix(superpose(h @ table.T, 3, 1.7), table), (hidden,))


def test_half_precision_logits_get_float32_weights() -> None:
    latent = superpose(torch.randn(2, 9).bfloat16(), 3)
    assert latent.weights.dtype == torch.float32
    assert mix(latent, torch.randn(9, 4).bfloat16()).dtype == torch.bfloat16


def test_combine_is_mix_after_the_lookup() -> None:
    latent, table = random_latents(0, (2, 3, 4), 9), torch.randn(9, 5, dtype=torch.float64)
    assert torch.allclose(combine(table[latent.ids], latent.weights), mix(latent, table), rtol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Notes the most entries of any tensor that an operation makes, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


@pytest.mark.parametrize("exclude", [None, 3])
def test_the_whole_vocabulary_is_one_product_and_equals_looking_up_every_row(exclude: int | None) -> None:
    """Forward and gradients, and nothing of the size `[..., V, D]` is made."""
    vocab, width, generator = 500, 24, torch.Generator().manual_seed(0)
    table = torch.randn(vocab, width, generator=generator)
    hidden = torch.randn(2, 3, width, generator=generator, requires_grad=True)
    wanted = torch.randn(2, 3, width, generator=generator)
    kept, ids, _ = largest_but(hidden @ table.T, vocab, vocab if exclude is None else exclude)
    by_rows = combine(table[ids], weighted(kept, ids, 1.5).weights)
    (gradient,) = torch.autograd.grad(by_rows, hidden, wanted)
    with LargestTensor() as made:
        mixed = mix(superpose_states(hidden, table, vocab, 1.5, exclude), table)
        (mixed * wanted).sum().backward()
    assert torch.allclose(mixed, by_rows, atol=1e-5)
    assert torch.allclose(hidden.grad, gradient, atol=1e-5)
    assert made.numel <= vocab * width


def test_a_token_among_mixtures_of_the_whole_vocabulary_is_itself() -> None:
    """Rows that are not thinking are fed one id in every place, with all weight on the first."""
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    fed = Superposition(torch.full((1, 6), 5), torch.eye(6)[:1])
    assert torch.equal(mix(fed, table), table[5:])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 40 * GROUP), st.booleans())
def test_largest_equals_sorting_for_any_width(seed: int, k: int, vocab: int, clustered: bool) -> None:
    """Also where the largest ones are neighbours, and where the last group is not full."""
    k = min(k, vocab)
    logits = torch.randn(2, 3, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if clustered:
        begin = seed % max(1, vocab - k)
        logits[..., begin : begin + k] += 20.0
    values, ids = largest(logits, k)
    for b in range(2):
        for n in range(3):
            row = logits[b, n].tolist()
            assert ids[b, n].tolist() == sorted(range(vocab), key=lambda v: -row[v])[:k]
            assert values[b, n].tolist() == sorted(row, reverse=True)[:k]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([12, 13, 40, 9 * 13 * GROUP + 5]))
def test_largest_but_leaves_one_out_where_asked(seed: int, k: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, dtype=torch.float64, generator=generator)
    unwanted = seed % vocab
    logits[0, unwanted] += 10.0  # the top of one row, somewhere in the others
    drop = torch.tensor([True, seed % 2 == 0, False])
    values, ids, top = largest_but(logits, k, unwanted, drop)
    for n in range(3):
        ranked = sorted(range(vocab), key=lambda v: -logits[n, v].item())
        assert top[n] == ranked[0]
        if drop[n]:
            ranked.remove(unwanted)
        if len(ranked) < k:  # all are kept, and the unwanted one comes last with weight 0
            assert ids[n].tolist() == [*ranked, unwanted] and values[n, -1] == -math.inf
        else:
            assert ids[n].tolist() == ranked[:k]
            assert values[n].tolist() == logits[n, ids[n]].tolist()


def test_gradient_of_largest_is_that_of_topk() -> None:
    vocab = 20 * GROUP + 7
    logits = torch.randn(2, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (largest(logits, 2)[0] * scale).sum().backward()
    expected = torch.zeros(2, vocab, dtype=torch.float64)
    for n in range(2):
        first, second = logits[n].argsort(descending=True)[:2].tolist()
        expected[n, first], expected[n, second] = 1.0, 2.0
    assert torch.equal(logits.grad, expected)


def test_entropy_limits() -> None:
    one = Superposition(torch.tensor([[3, 1]]), torch.tensor([[1.0, 0.0]]))
    even = Superposition(torch.tensor([[3, 1, 0, 2]]), torch.full((1, 4), 0.25))
    assert entropy(one).tolist() == [0.0]
    assert entropy(even).tolist() == pytest.approx([math.log(4)])


# -------------------------------------------------------------------------------------------------------------- noise


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.1, 3.0), st.floats(0.3, 3.0), st.integers(0, 5))
def test_perturb_equals_the_reference(seed: int, scale: float, temperature: float, end_id: int) -> None:
    """The first draw that does not make the end token the top-1, else the clean weights; each position by itself."""
    latent = random_latents(seed, (2, 3, 4), 6)
    draws = gumbel((3, 2, 3, 4), torch.Generator().manual_seed(seed), torch.device("cpu"))
    result = noisy(latent, draws, scale, temperature, end_id)
    assert torch.equal(result.ids, latent.ids)
    for b in range(2):
        for n in range(3):
            ids, clean = latent.ids[b, n].tolist(), latent.weights[b, n].tolist()
            expected = clean
            for r in range(3):
                tried = reference.noisy_weights(clean, draws[r, b, n].tolist(), scale, temperature, CLIP)
                if ids[tried.index(max(tried))] != end_id:
                    expected = tried
                    break
            assert result.weights[b, n].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_scale_zero_is_the_identity() -> None:
    latent = random_latents(1, (2, 4), 6)
    result = noisy(latent, torch.full((3, 2, 4), 100.0), scale=0.0)
    assert torch.equal(result.ids, latent.ids) and torch.equal(result.weights, latent.weights)


def test_noise_is_clamped_after_scaling() -> None:
    """Even weights and scaled draws of +400 and -400: the log-ratio of the results is 3.0 - (-1.5) = 4.5."""
    latent = Superposition(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    draws = torch.tensor([[[100.0, -100.0]]])
    weights = noisy(latent, draws, scale=4.0).weights[0]
    assert (weights[0] / weights[1]).log().item() == pytest.approx(4.5, rel=1e-6)
    # 0.5 * 2.0 = 1.0 is inside the range although 2.0 * 2.0 would not be: the clamp sees the scaled value
    weights = noisy(latent, torch.tensor([[[4.0, 0.0]]]), scale=0.5).weights[0]
    assert (weights[0] / weights[1]).log().item() == pytest.approx(2.0, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 5), st.integers(1, 4))
def test_noise_never_makes_the_end_token_top_1(seed: int, end_id: int, num_draws: int) -> None:
    latent = random_latents(seed, (5, 4), 6)
    draws = gumbel((num_draws, 5, 4), torch.Generator().manual_seed(seed), torch.device("cpu"))
    result = noisy(latent, draws, scale=2.0, end_id=end_id)
    before = latent.ids.gather(-1, latent.weights.argmax(-1, keepdim=True))[:, 0]
    after = latent.ids.gather(-1, result.weights.argmax(-1, keepdim=True))[:, 0]
    assert ((after != end_id) | (before == end_id)).all()


def test_guard_takes_the_next_draw_and_gives_up_clean() -> None:
    latent = Superposition(torch.tensor([[7, 5]]), torch.tensor([[0.6, 0.4]]))
    wins, neutral = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.1]])
    second = noisy(latent, torch.stack([wins, neutral]), end_id=5).weights
    assert torch.equal(second, noisy(latent, neutral[None], end_id=-1).weights)
    assert torch.equal(noisy(latent, torch.stack([wins, wins]), end_id=5).weights, latent.weights)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_noisy_weights_stay_on_the_simplex_and_ids_stay(seed: int) -> None:
    latent = random_latents(seed, (3, 4), 6)
    result = noisy(latent, gumbel((2, 3, 4), torch.Generator().manual_seed(seed), torch.device("cpu")))
    assert torch.equal(result.ids, latent.ids)
    assert (result.weights >= 0).all()
    assert torch.allclose(result.weights.sum(-1), torch.ones(3, dtype=torch.float64))


def test_gumbel_is_seedable_and_leaves_the_global_generator_alone() -> None:
    def draw(seed: int) -> Tensor:
        return gumbel((4, 5), torch.Generator().manual_seed(seed), torch.device("cpu"))

    state = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_gumbel_has_the_mean_and_variance_of_the_standard_gumbel() -> None:
    """Mean 0.5772 (Euler), variance pi^2 / 6; standard errors here are about 0.003 and 0.01."""
    sample = gumbel((200_000,), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.isfinite(sample).all()
    assert sample.mean().item() == pytest.approx(0.57722, abs=0.015)
    assert sample.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
