"""Minimum non-negative sum (MNNS): sign four digits so that their sum is as small as possible, but not negative.

The task of arXiv 2505.23648: all 9^4 = 6,561 sequences of four digits from 1 to 9, split by multiset of digits. A chain
of thought is the running sums of one choice of signs; what a thought in superposition should hold is the share of each
running sum among many choices (`path_labels`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, product
from typing import Literal

NUM_DIGITS = 4
LARGEST_SUM = 9 * NUM_DIGITS
# one word each; some sums stand in no chain of thought, but all in some superposition
WORDS = (*(f"D{digit}" for digit in range(10)), *(f"S{total}" for total in range(-LARGEST_SUM, LARGEST_SUM + 1)))
TRAIN_GROUPS = 396  # of the 495 multisets, 80 %
VALIDATION_GROUPS = 33  # of the other 99; published is no test set, so that checkpoints are chosen on what is reported


def traces(digits: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the running sums of every choice of signs, plus before minus and the first digit's sign slowest."""
    choices = product((1, -1), repeat=len(digits))
    return [tuple(accumulate(s * d for s, d in zip(signs, digits, strict=True))) for signs in choices]


def best_trace(digits: Sequence[int]) -> tuple[int, ...]:
    """Return the running sums of the first best choice of signs; the last one is the answer.

    >>> best_trace([2, 1, 9, 3])
    (-2, -3, 6, 3)
    """
    return min((trace for trace in traces(digits) if trace[-1] >= 0), key=lambda trace: trace[-1])


def path_labels(
    digits: Sequence[int], budget: int = 0, order: Literal["beam", "beam_minabs"] = "beam_minabs"
) -> list[dict[int, float]]:
    """Return for every step but the last, which is the answer, the share of each running sum among choices of signs.

    Choices that meet in a sum add up there.

    Args:
        digits: of the problem.
        budget: how many choices are counted, the best ones; 0 (published: `uniform`) all 2^n.
        order: what is best. beam: the smallest final sum, of those that are not negative; beam_minabs: the final sum
            nearest to 0. Ties go to minus signs, where `best_trace` prefers plus.

    >>> path_labels([5, 3, 2, 4])[1]
    {8: 0.25, 2: 0.25, -2: 0.25, -8: 0.25}
    """
    paths = traces(digits)
    if budget:
        paths.reverse()  # minus first, and sorting keeps the order of ties
        if order == "beam":
            paths = [path for path in paths if path[-1] >= 0]
        paths = sorted(paths, key=lambda path: (abs(path[-1]), path[-1] < 0))[:budget]
    counts = (Counter(path[step] for path in paths) for step in range(len(digits) - 1))
    return [{total: count / len(paths) for total, count in found.items()} for found in counts]


def split_problems(seed: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the digits of all problems by split; sequences of the same digits are in the same split."""
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for digits in product(range(1, 10), repeat=NUM_DIGITS):
        groups.setdefault(tuple(sorted(digits)), []).append(digits)
    rng, keys = random.Random(f"mnns/{seed}"), list(groups)
    rng.shuffle(keys)
    first_test = TRAIN_GROUPS + VALIDATION_GROUPS
    parts = {
        "train": keys[:TRAIN_GROUPS],
        "validation": keys[TRAIN_GROUPS:first_test],
        "test": keys[first_test:],
    }
    problems = {split: [digits for key in part for digits in groups[key]] for split, part in parts.items()}
    for found in problems.values():
        rng.shuffle(found)  # so that the first rows are a sample
    return problems


def guessing_accuracies(problems: Iterable[Sequence[int]]) -> tuple[float, float]:
    """Return the accuracy of the best constant answer, and of the best one that sees whether the digits' sum is odd.

    The answer is odd where that sum is. Over all 6,561 problems these are 37.3 % and 61.2 %.
    """
    answers = Counter(best_trace(digits)[-1] for digits in problems)
    best = [max((n for answer, n in answers.items() if answer % 2 == parity), default=0) for parity in (0, 1)]
    return max(best) / answers.total(), sum(best) / answers.total()
