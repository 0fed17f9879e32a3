"""Multiplication of two numbers of n digits, written as in the public files that go with arXiv 2405.14838.

Digits are separated by spaces, the least significant one first. The chain of thought adds the first number times each
digit of the second, and after every addition but the last says the sum so far in parentheses. The format is that of
da03/Internalize_CoT_Step_by_Step (MIT); `tests/data/test_multiplication.py` holds the generator against its files.
"""

from __future__ import annotations


def problem_of(left: int, right: int) -> str:
    """Return the problem.

    >>> problem_of(3719, 3349)
    '9 1 7 3 * 9 4 3 3'
    """
    return f"{_reversed(left)} * {_reversed(right)}"


def steps_of(left: int, right: int) -> tuple[str, ...]:
    """Return one step for each digit of `right`, the least significant one first; joined by spaces they are the CoT.

    Step k is `left * right_k * 10^k`, with n + 1 + k digits. A `+` stands at the end of every step but the last.

    >>> steps_of(12, 34)
    ('8 4 0 +', '0 6 3 0')
    """
    steps, total, num_digits = [], 0, len(str(right))
    for k, digit in enumerate(str(right)[::-1]):
        width = len(str(left)) + 1 + k
        product = left * int(digit) * 10**k
        total += product
        said = f" ( {_reversed(total, width)} )" if 0 < k < num_digits - 1 else ""
        steps.append(f"{_reversed(product, width)}{said}{' +' if k < num_digits - 1 else ''}")
    return tuple(steps)


def answer_of(left: int, right: int) -> str:
    """Return the product, padded with zeros to as many digits as both numbers have.

    >>> answer_of(12, 34)
    '8 0 4 0'
    """
    return _reversed(left * right, len(str(left)) + len(str(right)))


def in_order(problem: str) -> str:
    """Return what a problem and the one with its numbers exchanged have in common, however either is spaced.

    >>> in_order("4 3 * 2 1") == in_order("21*43") == "21*43"
    True
    """
    return "*".join(sorted("".join(number.split()) for number in problem.split("*")))


def _reversed(value: int, width: int = 0) -> str:
    return " ".join(str(value).zfill(width)[::-1])
