import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_sft.evaluation.intervals import accuracy_error, derangement, paired_difference


def test_one_seed_is_the_standard_error_over_problems():
    # 3 of 4 right: variance 0.25 with n - 1, / 4, root
    assert accuracy_error(np.array([[1.0, 1.0, 0.0, 1.0]])) == pytest.approx(0.25)
    assert accuracy_error(np.array([[1.0]])) is None


def test_two_seeds_by_hand():
    # seed means 3/4 and 1/4: variance 1/8, / 2. Problem means 1, 1/2, 1/2, 0: variance 1/6, / 4.
    # residuals of the additive model: -1/4 1/4 1/4 -1/4 and their opposites: sum of squares 1/2, / 3
    table = np.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert accuracy_error(table) == pytest.approx(math.sqrt(1 / 16 + 1 / 24 - (1 / 6) / 8))


def test_equal_seeds_are_as_good_as_one():
    once = np.array([[1.0, 0.0, 1.0, 1.0, 0.0]])
    assert accuracy_error(np.repeat(once, 3, axis=0)) == pytest.approx(accuracy_error(once))


def test_the_two_way_error_is_that_of_simulated_repetitions():
    """Seeds, problems and noise drawn anew each time: the estimate is the spread of the means it stands for."""
    rng = np.random.default_rng(0)
    means, variances = [], []
    for _ in range(2000):
        table = 0.5 + 0.3 * rng.normal(size=(4, 1)) + 0.8 * rng.normal(size=(1, 12)) + rng.normal(size=(4, 12))
        means.append(table.mean())
        variances.append(accuracy_error(table) ** 2)
    # 0.09 / 4 + 0.64 / 12 + 1 / 48 = 0.0967
    assert np.var(means) == pytest.approx(0.0967, rel=0.1)
    assert np.mean(variances) == pytest.approx(0.0967, rel=0.1)


def slow_interval(left, right, resamples):
    """The paired bootstrap as nested loops over draws of seeds and problems."""
    rng = np.random.default_rng(1)
    seeds, problems = left.shape
    found = []
    for _ in range(resamples):
        chosen = [int(rng.integers(seeds)) for _ in range(seeds)]
        drawn = [int(rng.integers(problems)) for _ in range(problems)]
        found.append(sum(left[s, p] - right[s, p] for s in chosen for p in drawn) / (seeds * problems))
    found.sort()
    return found[int(0.025 * resamples)], found[int(0.975 * resamples)]


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_are_those_of_a_loop(seeds):
    rng = np.random.default_rng(2)
    left = (rng.random((seeds, 40)) < 0.8).astype(float)
    right = (rng.random((seeds, 40)) < 0.6).astype(float)
    found = paired_difference(left, right, resamples=20_000)
    low, high = slow_interval(left, right, 3000)
    assert found.value == pytest.approx(left.mean() - right.mean())
    # both are drawn; differences come in steps of a problem, 1/40
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


def test_one_seed_agrees_with_the_normal_approximation():
    left, right = np.zeros((1, 400)), np.zeros((1, 400))
    left[0, :240] = 1
    right[0, 100:300] = 1
    found = paired_difference(left, right)
    # differences: 100 times +1, 60 times -1: mean 0.1, variance 0.4 - 0.01
    half = 1.96 * math.sqrt(0.39 / 400)
    assert (found.low, found.high) == (pytest.approx(0.1 - half, abs=0.005), pytest.approx(0.1 + half, abs=0.005))


def test_pairing_counts():
    """Two methods that are right on the same problems differ by nothing, whatever is drawn."""
    table = (np.random.default_rng(0).random((2, 50)) < 0.5).astype(float)
    assert paired_difference(table, table) == (0.0, 0.0, 0.0)
    assert paired_difference(table, 1 - table) != (0.0, 0.0, 0.0)


def test_seeds_are_drawn_too():
    left, right = np.array([[1.0] * 30, [0.0] * 30]), np.full((2, 30), 0.5)
    # each problem is the same: only the seeds vary, between both good, one each and both bad
    assert paired_difference(left, right)[1:] == (-0.5, 0.5)
    with pytest.raises(ValueError, match=r"shapes \(2, 30\) and \(1, 30\)"):
        paired_difference(left, right[:1])
    with pytest.raises(ValueError, match="shapes"):
        paired_difference(left[:, :0], right[:, :0])


@given(st.integers(2, 60), st.integers(0, 1000))
def test_nobody_is_his_own_partner_and_everybody_is_taken_once(count, seed):
    partner = derangement(count, seed)
    assert sorted(partner) == list(range(count))
    assert all(partner[i] != i for i in range(count))
    assert partner == derangement(count, seed)


def test_one_alone_has_no_partner():
    with pytest.raises(ValueError, match="1 things"):
        derangement(1, 0)
