import multiprocessing
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_sft.evaluation.answers import extract_answer, grader_for, is_correct, read_number
from latent_sft.evaluation.math_equal import math_equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so the answer is \boxed{18}", "18"),
        (r"\boxed{1} no, \boxed{\frac{13}{15}}.", r"\frac{13}{15}"),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{7} and then \boxed{\frac{1", "7"),  # the last one was cut off
        (r"\boxed{\frac{1", r"\boxed{\frac{1"),
        ("She has 5 eggs.\n#### 5", "5"),
        ("#### 1,210\nQuestion: next", "1,210"),
        ("####", ""),
        ("  Tom is a lempus. \n", "Tom is a lempus."),
        ("", ""),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@given(st.text(st.characters(exclude_characters="{}\\")), st.text(st.characters(exclude_characters="{}\\")))
def test_extraction_finds_the_box_in_any_text(before, inside):
    assert extract_answer(f"{before}\\boxed{{{inside}}} {before}") == inside.strip()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5.0", Fraction(5)),
        ("1/2", Fraction(1, 2)),
        ("$1,234.50", Fraction(2469, 2)),
        ("50\\%", Fraction(50)),
        ("-3e-05", Fraction(-3, 100000)),
        ("\u22127", Fraction(-7)),
        (".5", Fraction(1, 2)),
        ("12.", Fraction(12)),
        ("- 3", Fraction(-3)),
        (r"\dfrac{653}{2}", Fraction(653, 2)),
        (r"18\text{ }", Fraction(18)),
        ("19023741.599999998", Fraction(19023741599999998, 10**9)),
        ("1/0", None),
        ("1,2", None),  # a pair, not twelve
        ("1,2345", None),
        ("3 apples", None),
        ("1e999999999", None),
        ("x", None),
        ("", None),
        ("9" * 10_000, None),
    ],
)
def test_read_number(text, number):
    assert read_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_change_nothing(number):
    assert read_number(f"{number:,}") == read_number(str(number)) == number
    assert is_correct(f"The total is ${number:,}.00.", str(number), "numeric")


@pytest.mark.parametrize(
    ("prediction", "reference", "correct"),
    [
        (r"\boxed{18}", "18", True),
        ("5.0", "5", True),
        ("0.5", "1/2", True),
        ("The answer is 42.", "42", True),
        ("16 - 3 - 4 = 9; 9 * 2 = 18", "18", True),
        ("so 5-3", "3", True),  # a subtraction, not minus three
        ("4 4", "4", False),
        ("(1, 2)", "2", False),
        ("it is -3 degrees", "-3", True),
        (r"\boxed{18\text{ dollars}}", "18", True),
        (r"\boxed{x^{2}}", "2", False),
        ("18 or 19", "18", False),
        ("181", "18", False),
        ("", "18", False),
        ("eighteen", "18", False),
        ("0.33333333", "1/3", False),
    ],
)
def test_numeric(prediction, reference, correct):
    assert is_correct(prediction, reference, "numeric") is correct


@pytest.mark.parametrize(
    ("prediction", "reference", "correct"),
    [
        ("tom is  a LEMPUS", "Tom is a lempus.", True),
        ("Tom is a lempus . ", "Tom is a lempus.", True),
        ("Tom is a worpus.", "Tom is a lempus.", False),
        ("False", "True", False),
        ("", "", False),
    ],
)
def test_text(prediction, reference, correct):
    assert is_correct(prediction, reference, "text") is correct


# references and reworded answers from MATH-500, AIME 2024, GSM8K, GSM-Hard, ProsQA and ProntoQA
@pytest.mark.parametrize(
    ("reference", "grader", "right", "wrong"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", "math", r"\boxed{(3, \pi/2)}", r"\boxed{(\pi/2, 3)}"),
        (r"\frac{13}{15}", "numeric", r"\boxed{\dfrac{26}{30}}", "13"),
        (r"288 \pi", "math", r"\boxed{288\pi}", r"\boxed{288}"),
        ("p - q", "math", "$p-q$", "$q-p$"),
        (r"11\sqrt2", "math", r"\boxed{\sqrt{242}}", r"\boxed{11}"),
        (r"\text{Evelyn}", "math", r"\boxed{\text{Evelyn}}", r"\boxed{\text{Carla}}"),
        ("x^2 - 1", "math", r"\boxed{(x-1)(x+1)}", r"\boxed{x^2 + 1}"),
        ("326.5", "numeric", r"\boxed{326.50}", r"\boxed{326}"),
        ("204", "numeric", r"\boxed{204}", r"\boxed{2^{10}}"),
        ("1024", "numeric", r"\boxed{2^{10}}", r"\boxed{2^{9}}"),
        ("1210", "numeric", "#### 1,210", "#### 121"),
        ("-9867630", "numeric", r"\boxed{-9,867,630}", r"\boxed{9867630}"),
        ("Tom is a lempus.", "text", "Tom is a lempus .", "Tom is a jompus ."),
        ("True", "text", "true", "False"),
    ],
)
def test_auto_on_real_references(reference, grader, right, wrong):
    assert grader_for(reference) == grader
    assert is_correct(right, reference, "auto")
    assert is_correct(f"\\boxed{{{reference}}}", reference, "auto")
    assert not is_correct(wrong, reference, "auto")
    assert not is_correct("", reference, "auto")


def test_math_equal_off_the_main_thread_and_after_a_fork():
    found = []
    threads = [threading.Thread(target=lambda: found.append(math_equal("1/2", "0.5"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 3
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(math_equal, ("x+x", "2x")).get(60)
    assert math_equal("y", "y")


def test_math_equal_kills_what_takes_too_long_and_goes_on():
    assert math_equal("9^{9^{9^{9}}} + 1", "7", timeout=1.0) is False
    assert math_equal("9^{9^{9^{9}}} + 1", "9^{9^{9^{9}}} + 2", timeout=1.0) is False
    assert math_equal("\\frac{", "7") is False
    assert math_equal("3+4", "7") is True
