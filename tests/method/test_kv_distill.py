"""Scores, selection and distances of KaVa: numbers by hand, loops, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latent_sft.method.kv_distill import (
    SELECTORS,
    attention_logits,
    diversity,
    hidden_distance,
    importance,
    kv_distance,
    scores,
    select,
    take,
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_diversity_by_hand():
    """Keys e1, e1, e2: the first two have cosine 1 with each other, all else 0; means -1/3, -1/3, 0."""
    key = torch.tensor([[[[2.0, 0], [1, 0], [0, 3], [9, 9]]]])
    found = diversity(key, lengths_mask([3], 4))[0, 0].tolist()
    low, high = math.exp(-1 / 3), 1.0
    expected = [low / (2 * low + high)] * 2 + [high / (2 * low + high), 0.0]
    assert found == pytest.approx(expected, rel=1e-6)


def test_importance_by_hand():
    """One key head, two query heads, one query; logits (0, ln 3) and (0, 0): softmax (1/4, 3/4) and (1/2, 1/2)."""
    key = torch.tensor([[[[0.0, 0], [math.log(3), 0]]]])
    query = torch.tensor([[[[1.0, 0]], [[0, 1]]]])
    trace, queries = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    mean = importance(attention_logits(query, key, 1.0, None, "mean"), trace, queries)
    assert mean[0, 0].tolist() == pytest.approx([3 / 8, 5 / 8])
    largest = importance(attention_logits(query, key, 1.0, None, "max"), trace, queries)
    assert largest[0, 0].tolist() == pytest.approx([1 / 4, 3 / 4])
    # a third token outside of the trace, of logit ln 4 for both heads: 1/8, 3/8 and 1/6, 1/6
    total = torch.log(torch.tensor([8.0, 6.0])).view(1, 1, 2, 1)
    seen = importance(attention_logits(query, key, 1.0, None, "mean"), trace, queries, total)
    assert seen[0, 0].tolist() == pytest.approx([(1 / 8 + 1 / 6) / 2, (3 / 8 + 1 / 6) / 2])
    capped = attention_logits(query, key, 1.0, 0.5, "mean")
    assert capped[0, 0, 0, 0, 1].item() == pytest.approx(0.5 * math.tanh(math.log(3) / 0.5))


def test_selection_is_sorted_and_says_what_is_empty():
    ranks = torch.tensor([[[0.1, 0.9, 0.3, 0.5], [0.4, 0.1, 0.2, 0.3]], [[0.5, 0.6, 9.0, 9.0], [0.2, 0.1, 9.0, 9.0]]])
    kept = select(ranks, lengths_mask([4, 2], 4), 3)
    assert kept.index[0].tolist() == [[1, 2, 3], [0, 2, 3]]
    assert kept.index[1, :, :2].tolist() == [[0, 1], [0, 1]]
    assert kept.mask.tolist() == [[[True] * 3] * 2, [[True, True, False]] * 2]
    wide = select(ranks, lengths_mask([4, 0], 4), 6)
    assert wide.mask.sum(-1).tolist() == [[4, 4], [0, 0]]
    states = torch.arange(16.0).view(2, 2, 4, 1)
    assert take(states, kept)[..., 0].tolist() == [[[1, 2, 3], [4, 6, 7]], [[8, 9, 0], [12, 13, 0]]]
    assert take(states[:, :, :0], select(ranks[..., :0], lengths_mask([0, 0], 0), 3)).abs().sum() == 0


def test_of_equal_scores_the_earlier_token_is_kept():
    assert select(torch.ones(1, 1, 300), lengths_mask([300], 300), 4).index.tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize(
    ("length", "expected"), [(4, [0, 1, 2, 3]), (8, [1, 3, 5, 7]), (9, [1, 3, 5, 7]), (5, [0, 1, 3, 4])]
)
def test_uniform_takes_the_middles_of_equal_parts(length, expected):
    """Places floor((i + 1/2) N / M), M = 4: of 9 tokens 1.125, 3.375, 5.625, 7.875."""
    key, trace = torch.zeros(1, 2, 12, 3), lengths_mask([length], 12)
    assert select(scores("uniform", key, trace, 4), trace, 4).index.tolist() == [[expected, expected]]


def test_crop_takes_the_first_and_random_differs_by_row_layer_and_head():
    key, trace = torch.zeros(2, 2, 40, 3), lengths_mask([40, 30], 40)
    assert select(scores("crop", key, trace, 3), trace, 3).index.tolist() == [[[0, 1, 2]] * 2] * 2
    seed = torch.tensor([5, 6])
    found = {select(scores("random", key, trace, 4, seed=seed, layer=n), trace, 4).index for n in (0, 1)}
    chosen = {tuple(head) for index in found for row in index.tolist() for head in row}
    assert len(chosen) == 8  # of two rows, layers and heads
    again = scores("random", key[1:], trace[1:], 4, seed=seed[1:])
    assert torch.equal(again, scores("random", key, trace, 4, seed=seed)[1:])
    # every place is as likely as any other: 2000 rows keep one of 8 places
    many = scores("random", torch.zeros(2000, 1, 8, 1), lengths_mask([8] * 2000, 8), 1, seed=torch.arange(2000))
    counts = many.argmax(-1).flatten().bincount(minlength=8)
    assert counts.min() > 180 and counts.max() < 320


def test_a_selector_without_what_it_needs_is_refused():
    key, trace = torch.zeros(1, 1, 3, 2), lengths_mask([3], 3)
    for selector in ("rkv", "attention", "random", "newest"):
        with pytest.raises(ValueError, match=selector):
            scores(selector, key, trace, 2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 99))
def test_padding_and_neighbours_change_nothing(lengths, keep, seed):
    """Scores and kept tokens of a batch are those of each row alone, without padding."""
    key, query = drawn(seed, len(lengths), 2, 9, 4), drawn(seed + 1, len(lengths), 4, 3, 4)
    trace, real = lengths_mask(lengths, 9), lengths_mask([1 + n % 3 for n in lengths], 3)
    seeds = torch.arange(len(lengths)) + seed
    attention = importance(attention_logits(query, key, None, None, "mean"), trace, real)
    for selector in SELECTORS:
        found = select(scores(selector, key, trace, keep, attention=attention, seed=seeds), trace, keep)
        for b, n in enumerate(lengths):
            alone = key[b : b + 1, :, :n], trace[b : b + 1, :n]
            count = int(real[b].sum())
            logits = attention_logits(query[b : b + 1, :, :count], alone[0], None, None, "mean")
            own = importance(logits, alone[1], real[b : b + 1, :count])
            torch.testing.assert_close(attention[b, :, :n], own[0], rtol=1e-9, atol=1e-12)
            single = select(scores(selector, *alone, keep, attention=own, seed=seeds[b : b + 1]), alone[1], keep)
            assert torch.equal(found.mask[b], single.mask[0]) and found.mask[b].sum(-1).tolist() == [min(n, keep)] * 2
            assert torch.equal(found.index[b], single.index[0])
            for head in range(2):
                places = found.index[b, head][found.mask[b, head]].tolist()
                assert places == sorted(set(places)) and all(p < n for p in places)


@given(st.integers(1, 9), st.integers(0, 99))
def test_scores_are_shares(length, seed):
    key, trace = drawn(seed, 1, 2, 9, 4), lengths_mask([length], 9)
    attention = importance(attention_logits(drawn(seed, 1, 2, 3, 4), key, None, None, "max"), trace, torch.ones(1, 3))
    for found in (diversity(key, trace), attention, scores("rkv", key, trace, 3, attention=attention, share=0.3)):
        assert (found >= 0).all() and found[..., length:].abs().sum() == 0
        torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, dtype=torch.float64))


def test_kv_distance_by_hand():
    """Two heads, M = 2, d = 1, the second slot empty: residuals 1 and 3 (and 5, 7 from zero)."""
    student = torch.tensor([[[[2.0], [5]], [[5], [7]]]])
    teacher, mask = torch.tensor([[[[1.0], [0]], [[2], [0]]]]), torch.tensor([[[True, False]] * 2])

    def value(**changes) -> float:
        options = {"loss": "l1", "std": False, "short": "mask", "reduction": "mean", **changes}
        return kv_distance(student, teacher, mask, **options).item()

    assert value() == pytest.approx((1 + 3) / 2)
    assert value(loss="mse") == pytest.approx((1 + 9) / 2)
    assert value(loss="smooth_l1") == pytest.approx((0.5 + 2.5) / 2)
    assert value(short="zero") == pytest.approx((1 + 3 + 5 + 7) / 4)
    assert value(reduction="sum") == pytest.approx((1 + 3) / 2)  # over M
    assert value(reduction="sum", short="zero") == pytest.approx((1 + 3 + 5 + 7) / 2)
    assert value(std=True) == pytest.approx((1 + 3) / 2 / 0.5)  # of 1 and 2
    assert value(std=True, loss="mse") == pytest.approx((1 + 9) / 2 / 0.25)


def test_an_example_with_nothing_kept_is_zero_with_zero_gradient():
    student = torch.ones(1, 1, 2, 3, requires_grad=True)
    for std in (False, True):
        found = kv_distance(
            student,
            torch.zeros(1, 1, 2, 3),
            torch.zeros(1, 1, 2).bool(),
            loss="l1",
            std=std,
            short="mask",
            reduction="mean",
        )
        found.sum().backward()
        assert found.item() == 0 and student.grad.abs().sum() == 0


def test_hidden_distance_by_hand():
    """Two layers, D = 2: L1 means 1 and 2; teacher (0, 2) and (0, 4) of deviation 1 and 2, all together 1.66."""
    teacher = [torch.tensor([[0.0, 2]]), torch.tensor([[0.0, 4]])]
    student = [torch.tensor([[1.0, 3]], requires_grad=True), torch.tensor([[2.0, 6]])]
    assert hidden_distance(student, teacher, loss="l1", std="none").item() == pytest.approx(1.5)
    assert hidden_distance(student, teacher, loss="l1", std="layer").item() == pytest.approx(1.0)
    together = math.sqrt((1.5**2 * 2 + 0.5**2 + 2.5**2) / 4)
    assert hidden_distance(student, teacher, loss="l1", std="all").item() == pytest.approx(1.5 / together)
    assert hidden_distance(student, teacher, loss="smooth_l1", std="none").item() == pytest.approx((0.5 + 1.5) / 2)


@given(st.integers(0, 50), st.sampled_from(["l1", "smooth_l1", "mse"]), st.booleans())
def test_distances_are_zero_only_at_the_target_and_never_train_the_teacher(seed, loss, std):
    teacher = drawn(seed, 2, 2, 3, 4).requires_grad_()
    mask, options = torch.ones(2, 2, 3).bool(), {"loss": loss, "std": std, "short": "mask", "reduction": "mean"}
    assert kv_distance(teacher.detach().clone(), teacher, mask, **options).abs().max() == 0
    student = drawn(seed + 1, 2, 2, 3, 4).requires_grad_()
    found = kv_distance(student, teacher, mask, **options)
    found.sum().backward()
    assert (found > 0).all() and teacher.grad is None and student.grad.abs().sum() > 0
