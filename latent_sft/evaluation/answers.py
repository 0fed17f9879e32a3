r"""Reading the answer out of a model's text, and grading it.

Graders: `numeric` (equal numbers, exactly), `math` (equal expressions, by math-verify), `text` (equal after normalising
space, case and LaTeX text), `auto` (numeric where the reference is a number, math where it looks like an expression,
else text). Numbers that are only separated by space, `7 8 0 3`, are a text to every grader.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from latent_sft.evaluation.math_equal import math_equal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Grader = Literal["auto", "numeric", "math", "text"]

MAX_NUMBER_LENGTH = 200  # characters; a model stuck on one digit writes longer ones

# digits with or without thousands separators, decimals, a short exponent (a long one would fill the memory)
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
_NUMBER = re.compile(rf"(?P<top>[+-]?\s*{_UNSIGNED})(?:\s*/\s*(?P<bottom>{_UNSIGNED}))?")
_MIXED = re.compile(r"(?P<sign>[+-]?)\s*(?P<whole>\d+)\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)")  # 2 1/2
# in prose a minus sign belongs to the number only where it is not a subtraction
_NUMBER_IN_PROSE = re.compile(rf"(?:(?<![\d)])[+-])?(?:\d+\s+(?=\d+\s*/))?{_UNSIGNED}(?:\s*/\s*{_UNSIGNED})?")
_ALTERNATIVE = re.compile(r"\d[^\d.;?\n]*\bor\b[^\d.;?\n]*$")  # in front of the last number: 3 or
_NUMBERS_APART = re.compile(r"[+-]?\d[\d.]*(?:\s+[+-]?\d[\d.]*)+")
_CHOICE = re.compile(r"\(([A-Za-z])\)")
_HALF_DAY = re.compile(r"\b([ap])\.?m\b", re.IGNORECASE)
_OPENING = re.compile(r"^(?:\\left)?\s*(\(|\\\{)")
_BASE = re.compile(r"\d\s*_\s*\{?(\w+)")
_DECIMAL = re.compile(r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d*))\.(\d+)")
_AND_OR = re.compile(r"\s*,?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_BEFORE_FRACTION = re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)")
_LATEX_SPACE = re.compile(r"\\[!,;: ]|~")
_MARKUP = re.compile(r"[\\^_{}]")
_ASSIGNED = re.compile(r"[A-Za-z]\s*=(.*)", re.DOTALL)
_LETTER = re.compile(r"[^\W\d_]")
_ALGEBRA = re.compile(r"[^\W\d_]|[-+*/=]")
_WORD = re.compile(r"[^\W\d_]{2,}")
_MATH_WORDS = {"and", "or", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "max", "min"}


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of a decoded answer, as it is graded while training and afterwards.

    The end of the sequence is not among the ids. Any other special token is part of what the model said, and stays: an
    answer that only a clean-up would make right is wrong, as it is for whoever calls the exported model.
    """
    return tokenizer.decode(ids, skip_special_tokens=False)


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
    if _same_text(prediction, reference):
        return True
    lines = {line.strip() for line in prediction.splitlines()}
    if len(lines) == 1:  # 72 72 72, each on a line of its own
        prediction = lines.pop()
    allowed = grader_for(reference) if grader == "auto" else grader
    if allowed == "text":
        return _same_text(prediction, reference)
    gold, number = read_number(reference), _number_in(prediction)
    if gold is not None and number is not None:
        return gold == number
    # an expression for a number, as 2^{10} for 1024, is beyond the numeric grader
    expression = _MARKUP.search(prediction) or (not _has_words(prediction) and _ALGEBRA.search(prediction))
    if allowed == "numeric" and not (grader == "auto" and expression):
        return False
    return bool(prediction) and _equal_expressions(prediction, reference)


def grader_for(reference: str) -> Grader:
    """Return the grader that can read a reference: numeric, math or text (what `auto` does)."""
    if read_number(reference) is not None:
        return "numeric"
    plain = _normal_text(reference)
    if _NUMBERS_APART.fullmatch(plain) or (len(plain) > MAX_NUMBER_LENGTH and plain.isdecimal()):
        return "text"
    prose = _has_words(plain) and not _MARKUP.search(reference)  # `5\text{ cm}` is none
    looks_like_math = _MARKUP.search(plain) or (not prose and re.search(r"[\d+*/=<>()-]", plain))
    return "math" if looks_like_math else "text"


def read_number(text: str) -> Fraction | None:
    """Return the number that a text is, exactly, or None where it is not just a number.

    Thousands separators, currency and percent signs are dropped: "$1,234.50", "5.0", "1/2", "2 1/2", "-3e-05", "50%".
    """
    plain = _plain_number(text)
    if len(plain) > MAX_NUMBER_LENGTH:
        return None
    if mixed := _MIXED.fullmatch(plain):
        sign, whole, top, bottom = mixed.group("sign", "whole", "top", "bottom")
        value = int(whole) + Fraction(int(top), int(bottom)) if int(top) < int(bottom) else None
        return -value if value is not None and sign == "-" else value
    match = _NUMBER.fullmatch(plain)
    if match is None:
        return None
    top, bottom = (
        Fraction(Decimal("".join((part or "1").replace(",", "").split()))) for part in match.group("top", "bottom")
    )
    return top / bottom if bottom else None


def _number_in(text: str) -> Fraction | None:
    plain = _plain_number(text)
    assigned = _ASSIGNED.fullmatch(plain)
    whole = read_number(assigned[1] if assigned else plain)
    if whole is not None or _MARKUP.search(plain):
        return whole
    found = list(_NUMBER_IN_PROSE.finditer(plain))
    # the last number is the answer of prose and of equations, not of 2k+2, (1, 2), 4 4 or "3 or 4"
    prose = _has_words(plain) or (not _LETTER.search(plain) and ("=" in plain or len(found) == 1))
    if not prose or not found or _ALTERNATIVE.search(plain[: found[-1].start()]):
        return None
    return read_number(found[-1][0])


def _has_words(text: str) -> bool:
    return any(word not in _MATH_WORDS for word in _WORD.findall(text))


def _plain_number(text: str) -> str:
    text = _BEFORE_FRACTION.sub(" ", _LATEX_TEXT.sub(r" \1", _spelt_fractions(text)))  # 2\frac{1}{2}: 2 1/2
    text = _LATEX_FRACTION.sub(r"\1\2/\3\4 ", text)
    text = _LATEX_SPACE.sub("", text.replace("{,}", ",").replace("\u2212", "-"))
    text = re.sub(r"\\?[$%€£]", "", text)
    return text.strip().rstrip(".").strip()


def _spelt_fractions(text: str) -> str:
    def spelt(sign: re.Match[str]) -> str:
        top, bottom = unicodedata.normalize("NFKC", sign[0]).split("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}"

    return _VULGAR_FRACTION.sub(spelt, text)


def _same_text(one: str, other: str) -> bool:
    return bool(other) and (one == other or _normal_text(one) == _normal_text(other) != "")


def _normal_text(text: str) -> str:
    text = " ".join(_LATEX_TEXT.sub(r" \1 ", re.sub(r"\\?\$", "", text)).split()).rstrip(".").rstrip()
    choice = _CHOICE.fullmatch(text)
    return (choice[1] if choice else text).casefold()


def _equal_expressions(prediction: str, reference: str) -> bool:
    pair = _expression(prediction), _expression(reference)
    # math-verify takes 4 3 2 1 for 1 2 3 4, 3_8 for 3, {1, 2} for (1, 2) and a.m. for p.m.
    if any(_NUMBERS_APART.fullmatch(text) for text in pair) or _BASE.findall(pair[0]) != _BASE.findall(pair[1]):
        return False
    for mark in (_OPENING, _HALF_DAY):
        if len({found[1].lower() for text in pair if (found := mark.search(text))}) > 1:
            return False
    return math_equal(*pair)


def _exact(decimal: re.Match[str]) -> str:
    whole, digits = decimal[1].replace(",", ""), decimal[2]
    return rf"\frac{{{whole}{digits}}}{{1{'0' * len(digits)}}}"


def _expression(text: str) -> str:
    # a dollar sign would end the formula that math_equal wraps around it
    text = " ".join(re.sub(r"\\?\$", "", _spelt_fractions(text)).split()).rstrip(".")
    return _AND_OR.sub(",", _DECIMAL.sub(_exact, text))


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
