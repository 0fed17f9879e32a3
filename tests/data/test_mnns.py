"""Minimum non-negative sum: all problems, their split, traces, and the shares of running sums."""

from __future__ import annotations

from itertools import product
from math import log

import pytest

from latent_sft.config.schema import DataConfig, SyntheticConfig
from latent_sft.data import mnns
from latent_sft.data.records import load_splits
from latent_sft.data.synthetic import generate

ALL = list(product(range(1, 10), repeat=4))


def reference_labels(digits: tuple[int, ...]) -> list[dict[int, float]]:
    """Shares of running sums, step by step from those of the step before."""
    shares, steps = {0: 1.0}, []
    for digit in digits:
        after: dict[int, float] = {}
        for total, share in shares.items():
            for following in (total - digit, total + digit):
                after[following] = after.get(following, 0.0) + share / 2
        shares = after
        steps.append(shares)
    return steps[:-1]


def test_all_problems_split_by_multiset() -> None:
    splits = mnns.split_problems(seed=0)
    assert sorted(digits for found in splits.values() for digits in found) == ALL
    groups = {split: {tuple(sorted(digits)) for digits in found} for split, found in splits.items()}
    assert {split: len(found) for split, found in groups.items()} == {"train": 396, "validation": 33, "test": 66}
    assert len(set.union(*groups.values())) == 495  # together as many as there are: no multiset is in two splits
    assert 5000 < len(splits["train"]) < 5500
    assert mnns.split_problems(seed=0) == splits
    other = mnns.split_problems(seed=1)
    assert {tuple(sorted(digits)) for digits in other["train"]} != groups["train"]


def test_the_trace_is_that_of_the_first_best_signs() -> None:
    assert mnns.best_trace([2, 1, 9, 3]) == (-2, -3, 6, 3)
    # 5 - 3 + 2 - 4 and -5 + 3 - 2 + 4 are both 0: an early plus wins
    assert mnns.best_trace([5, 3, 2, 4]) == (5, 2, 4, 0)
    # 9 - 1 - 1 - 1 = 6 is all that a nine and three ones can do
    assert mnns.best_trace([9, 1, 1, 1]) == (9, 8, 7, 6)
    for digits in ALL[::37]:
        sums = [sum(s * d for s, d in zip(signs, digits, strict=True)) for signs in product((1, -1), repeat=4)]
        assert mnns.best_trace(digits)[-1] == min(total for total in sums if total >= 0)


def test_shares_of_running_sums_count_paths() -> None:
    eighth = dict.fromkeys((10, 6, 4, -4, -6, -10), 1 / 8)
    assert mnns.path_labels([5, 3, 2, 4]) == [
        {5: 1 / 2, -5: 1 / 2},
        {8: 1 / 4, 2: 1 / 4, -2: 1 / 4, -8: 1 / 4},
        {**eighth, 0: 1 / 4},  # 5 - 3 - 2 and -5 + 3 + 2
    ]
    assert [mnns.path_labels(digits) for digits in ALL[::101]] == [reference_labels(digits) for digits in ALL[::101]]


def test_shares_among_the_best_choices() -> None:
    # signs by final sum of 5 3 2 4: 0 -+-+ and +-+-, 2 ++--, -2 --++, and ten more; equal sums begin with minus
    assert mnns.path_labels([5, 3, 2, 4], 1, "beam") == [{-5: 1.0}, {-2: 1.0}, {-4: 1.0}]
    assert mnns.path_labels([5, 3, 2, 4], 2, "beam") == [
        {-5: 1 / 2, 5: 1 / 2},
        {-2: 1 / 2, 2: 1 / 2},
        {-4: 1 / 2, 4: 1 / 2},
    ]
    third, fourth = mnns.path_labels([5, 3, 2, 4], 3), mnns.path_labels([5, 3, 2, 4], 4)
    assert third[1] == {-2: 1 / 3, 2: 1 / 3, 8: 1 / 3}
    assert fourth[1] == {-2: 1 / 4, 2: 1 / 4, 8: 1 / 4, -8: 1 / 4}
    for digits in ALL[::101]:
        assert mnns.path_labels(digits, 16) == mnns.path_labels(digits) == mnns.path_labels(digits, 99)
        # every sum has its negative: at least eight are none, and `beam` counts these only
        ends = [sum(path) for path in product(*((d, -d) for d in digits))]
        kept = sum(end >= 0 for end in ends)
        assert kept >= 8
        shares = mnns.path_labels(digits, 16, "beam")[0]
        plus = sum(sum(path) >= 0 and path[0] > 0 for path in product(*((d, -d) for d in digits)))
        assert shares[digits[0]] == pytest.approx(plus / kept)
        assert mnns.path_labels(digits, 1, "beam") == mnns.path_labels(digits, 1)


def test_what_is_published_of_the_labels() -> None:
    labels = [mnns.path_labels(digits) for digits in ALL]
    for step, (states, most, entropy) in enumerate([(2, 2, 0.693), (3.89, 4, 1.348), (7.21, 8, 1.941)]):
        sizes = [len(label[step]) for label in labels]
        entropies = [-sum(share * log(share) for share in label[step].values()) for label in labels]
        assert sum(sizes) / len(ALL) == pytest.approx(states, abs=0.005)
        assert max(sizes) == most
        assert sum(entropies) / len(ALL) == pytest.approx(entropy, abs=0.0005)


def test_what_guessing_gives() -> None:
    assert mnns.guessing_accuracies(ALL) == pytest.approx((0.3725, 0.6116), abs=0.0001)
    # 1 1 1 1 and 2 1 1 2: answer 0; 3 1 1 1: answer 0; 1 1 1 2: answer 1; 1 1 1 6: answer 3
    few = [(1, 1, 1, 1), (2, 1, 1, 2), (3, 1, 1, 1), (1, 1, 1, 2), (1, 1, 1, 6)]
    assert mnns.guessing_accuracies(few) == (3 / 5, 4 / 5)
    assert mnns.guessing_accuracies([(1, 1, 1, 1)]) == (1, 1)


def test_records_and_words() -> None:
    config = SyntheticConfig(task="mnns", num_train=5, num_validation=5, num_test=5)
    splits = generate(config)
    assert sum(map(len, splits.values())) == 6561  # all, whatever is asked for
    found = {record.problem: record for records in splits.values() for record in records}
    record = found["D2 D1 D9 D3"]
    assert (record.cot, record.answer, record.steps) == ("S-2 S-3 S6", "S3", ("S-2", "S-3", "S6"))
    assert record.cot_answer == record.answer
    loaded = load_splits(DataConfig(synthetic=config, limit_train=7))
    assert loaded.train == splits["train"][:7]
    assert loaded.words == mnns.WORDS
    assert {word for r in found.values() for word in f"{r.problem} {r.cot} {r.answer}".split()} <= {*mnns.WORDS}
    assert len(mnns.WORDS) == len(set(mnns.WORDS)) == 83
    assert {"D0", "D9", "S-36", "S0", "S36"} <= {*mnns.WORDS}
    assert load_splits(DataConfig()).words == ()
