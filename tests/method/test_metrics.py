import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_sft.method.metrics import (
    ecr_at_k,
    largest,
    near_equal_spans,
    pass_at_k,
    standard_error,
    token_mass,
)
from latent_sft.method.types import Superposition


def latents(*rows):
    """Each row is a dict token -> weight; rows are padded with token 0 of weight zero."""
    width = max(len(row) for row in rows)
    padded = [list(row.items()) + [(0, 0.0)] * (width - len(row)) for row in rows]
    return Superposition(
        torch.tensor([[t for t, _ in row] for row in padded]), torch.tensor([[w for _, w in row] for row in padded])
    )


def one_hot(*tokens):
    return latents(*({t: 1.0} for t in tokens))


def test_standard_error_by_hand():
    # mean 3/4, squared deviations 3 * 1/16 + 9/16 = 3/4; variance (3/4)/3 = 1/4; sqrt(1/4 / 4) = 1/4
    assert standard_error([1, 1, 1, 0]) == 0.25
    assert standard_error([1.0, 1.0]) == 0.0
    assert math.isnan(standard_error([1.0]))


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_enumeration_of_all_subsets(case):
    n, c, k = case
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, c, k)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(4096, 1, 64) == pytest.approx(64 / 4096)


@given(st.integers(0, 50), st.integers(1, 60))
def test_spans_partition_and_differ_by_at_most_one(length, num_spans):
    spans = near_equal_spans(length, num_spans)
    assert [i for span in spans for i in span] == list(range(length))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_largest_orders_and_token_mass_sums():
    three = latents({7: 0.2, 8: 0.5, 9: 0.3})
    kept = largest(three, 2)
    assert kept.ids.tolist() == [[8, 9]]
    torch.testing.assert_close(token_mass(kept, [9, 7, 8, 9]), torch.tensor([[0.3, 0, 0.5, 0.3]]).double())
    with pytest.raises(ValueError, match="4 largest of 3"):
        largest(three, 4)


def test_ecr_by_hand():
    # L = 5, T = 2: spans [10, 11], [12, 12, 13]
    cot = [10, 11, 12, 12, 13]
    two = latents({10: 0.6, 13: 0.3, 11: 0.1}, {12: 0.5, 10: 0.4, 13: 0.1})
    assert ecr_at_k(two, cot, 1) == (1 + 2) / 2  # {10}; 12 twice
    assert ecr_at_k(two, cot, 2) == (1 + 2) / 2  # 13 and 10 lie in the other span
    assert ecr_at_k(two, cot, 3) == (2 + 3) / 2  # everything: the bound L / T


def test_ecr_ignores_entries_without_weight_and_refuses_no_latents():
    assert ecr_at_k(latents({5: 1.0}, {5: 0.5, 6: 0.5}), [0, 6], 2) == 0.5  # the padding token 0 does not count
    with pytest.raises(ValueError, match="no latents"):
        ecr_at_k(Superposition(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3)), [1], 1)
    with pytest.raises(ValueError, match="5 largest of 1"):
        ecr_at_k(one_hot(1), [1], 5)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 99))
def test_ecr_rises_with_k_up_to_the_bound(cot, num_latents, seed):
    generator = torch.Generator().manual_seed(seed)
    full = Superposition(
        torch.stack([torch.randperm(10, generator=generator) for _ in range(num_latents)]),
        torch.softmax(torch.randn(num_latents, 10, generator=generator), -1),
    )
    curve = [ecr_at_k(full, cot, k) for k in range(1, 11)]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(len(cot) / num_latents)
    shuffled = torch.randperm(10, generator=generator)
    assert ecr_at_k(Superposition(full.ids[:, shuffled], full.weights[:, shuffled]), cot, 3) == curve[2]
