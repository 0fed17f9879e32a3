r"""Reading the answer out of a model's text, and grading it.

Graders: `numeric` (equal numbers, exactly), `math` (equal expressions, by math-verify), `text` (equal after normalising
space and case), `auto` (numeric where the reference is a number, math where it looks like an expression, else text).
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from latent_sft.evaluation.math_equal import math_equal

Grader = Literal["auto", "numeric", "math", "text"]

MAX_NUMBER_LENGTH = 200  # characters; a model stuck on one digit writes longer ones

# digits with or without thousands separators, decimals, a short exponent (a long one would fill the memory)
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
_NUMBER = re.compile(rf"(?P<top>[+-]?\s*{_UNSIGNED})(?:\s*/\s*(?P<bottom>{_UNSIGNED}))?")
# in prose a minus sign belongs to the number only where it is not a subtraction
_NUMBER_IN_PROSE = re.compile(rf"(?:(?<![\d)])[+-])?{_UNSIGNED}(?:\s*/\s*{_UNSIGNED})?")
_ONLY_NUMBERS = re.compile(r"[\d\s.,;()-]*")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_LATEX_SPACE = re.compile(r"\\[!,;: ]|~")
_MARKUP = re.compile(r"[\\^_{}]")
_WORD = re.compile(r"[A-Za-z]{2,}")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "max", "min"}


def extract_answer(text: str) -> str:
    r"""Return the final answer in a model's text.

    The content of the last `\boxed{...}` whose braces balance; else the line after the last `####`; else the whole
    text, stripped (the numeric grader then takes its last number).
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if "####" in text:
        lines = text.rsplit("####", 1)[1].strip().splitlines()
        return lines[0].strip() if lines else ""
    return text.strip()


def is_correct(prediction: str, reference: str, grader: Grader = "auto") -> bool:
    """Return whether an answer is the reference.

    Args:
        prediction: a model's text or an answer extracted from it.
        reference: the gold answer, bare or in one of the forms `extract_answer` reads.
        grader: see the module.
    """
    prediction, reference = extract_answer(prediction), extract_answer(reference)
    if grader == "auto":
        grader = grader_for(reference)
        # an expression for a number, as 2^{10} for 1024, is beyond the numeric grader
        if grader == "numeric" and _number_in(prediction) is None and _MARKUP.search(prediction):
            grader = "math"
    if grader == "numeric":
        gold = read_number(reference)
        return gold is not None and gold == _number_in(prediction)
    if _normal_text(prediction) == _normal_text(reference):
        return bool(reference)
    return grader == "math" and bool(prediction) and math_equal(_expression(prediction), _expression(reference))


def grader_for(reference: str) -> Grader:
    """Return the grader that can read a reference: numeric, math or text (what `auto` does)."""
    if read_number(reference) is not None:
        return "numeric"
    words = [w for w in _WORD.findall(reference) if w not in _FUNCTIONS]
    looks_like_math = bool(_MARKUP.search(reference)) or bool(not words and re.search(r"[\d+*/=<>()-]", reference))
    return "math" if looks_like_math else "text"


def read_number(text: str) -> Fraction | None:
    """Return the number that a text is, exactly, or None where it is not just a number.

    Thousands separators, currency and percent signs are dropped: "$1,234.50", "5.0", "1/2", "-3e-05", "50%".
    """
    plain = _plain_number(text)
    match = _NUMBER.fullmatch(plain) if len(plain) <= MAX_NUMBER_LENGTH else None
    if match is None:
        return None
    top, bottom = (
        Fraction(Decimal("".join((part or "1").replace(",", "").split()))) for part in match.group("top", "bottom")
    )
    return top / bottom if bottom else None


def _number_in(text: str) -> Fraction | None:
    whole = read_number(text)
    plain = _plain_number(text)
    # the last number of x^{2} is not what it says, nor is that of a bare list, 4 4
    if whole is not None or _MARKUP.search(plain) or _ONLY_NUMBERS.fullmatch(plain):
        return whole
    found = _NUMBER_IN_PROSE.findall(plain)
    return read_number(found[-1]) if found else None


def _plain_number(text: str) -> str:
    text = _LATEX_FRACTION.sub(r"\1/\2", _LATEX_TEXT.sub(r" \1", text))
    text = _LATEX_SPACE.sub("", text.replace("{,}", ",").replace("\u2212", "-"))
    text = re.sub(r"\\?[$%€£]", "", text)
    return text.strip().rstrip(".").strip()


def _normal_text(text: str) -> str:
    return " ".join(text.split()).rstrip(".").rstrip().casefold()


def _expression(text: str) -> str:
    # a dollar sign would end the formula that math_equal wraps around it
    return text.replace("\\$", "").replace("$", "").strip().rstrip(".")


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start + len("\\boxed{") : end]
        start = text.rfind("\\boxed{", 0, start)  # cut off before its brace closed: take an earlier one
    return None
