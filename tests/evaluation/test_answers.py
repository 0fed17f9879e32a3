import multiprocessing
import threading
from fractions import Fraction

import pytest
from hypothesis import assume, given
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
        (r"\text{Evelyn}", "text", r"\boxed{\text{Evelyn}}", r"\boxed{\text{Carla}}"),
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


# reference -> answers that are it, answers that are not; either way round
EITHER_WAY = {
    # integers, signs, thousands, currency
    "18": ([r"\boxed{18}", "18.0", "$18$", "18.", "#### 18"], ["181", "8", "-18", "0.18", "1.8", "x", "18x"]),
    "1234": (["1,234", r"\$1,234.00", r"1{,}234", r"1\,234", "1.234e3"], ["1.234", "12,34", "1 2 3 4", "1, 234"]),
    "-5": (["\u22125", "- 5", "-5.0", r"$-5$"], ["5", "5-", "-50", "+5"]),
    "12345678901234567890": (["12,345,678,901,234,567,890"], ["12345678901234567891", "1.2345678901234567e19"]),
    "1000000": (["10^6", r"10^{6}"], ["1000001", "10^5", "1000000.0001"]),
    "1024": (["2^{10}", "2^5 \\cdot 32"], ["2^{9}", "210", r"\log_2 1024"]),
    "9": (["7 + 2", r"3^2", r"\sqrt{81}"], ["7 - 2", "90", "3", r"9\pi"]),
    # fractions, mixed numbers, decimals
    "1/2": (["0.5", ".5", "\u00bd", r"\frac12", r"\dfrac{2}{4}", r"\tfrac{1}{2}"], ["2", "0.05", r"\frac{2}{1}", "12"]),
    "2.5": (
        [r"2\frac{1}{2}", "2 1/2", "2\u00bd", r"2\frac12", "5/2", r"\frac{5}{2}"],
        [r"2\frac{1}{3}", "21/2", "2 1", "1/2", "2", "-2 1/2", "25"],
    ),
    r"-\frac{3}{4}": (["-0.75", r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4"], [r"\frac{3}{4}", "-4/3", "-0.74"]),
    "10.5": (["21/2", r"10\frac{1}{2}"], [r"2\frac{1}{2}", "1 0.5"]),
    r"\frac{1}{3}": (["2/6", "1/3"], ["0.33", "0.33333333", "3", "1.3"]),
    "0.001": ([r"10^{-3}", "1e-3", r"\frac{1}{1000}"], [r"10^{-2}", "0.0010001"]),
    # percent, degrees, units, times
    "50": ([r"50\%", "50%"], ["0.5", "5%", "50/100"]),
    r"90^\circ": (["90", r"90^{\circ}"], [r"45^\circ", "9"]),
    r"5\text{ cm}": (["5", r"5\mbox{ cm}", "5 cm"], [r"6\text{ cm}", "50"]),
    "6:30": (["6:30."], ["6:31", "5:30"]),
    r"6:30\text{ a.m.}": (["6:30 a.m.", r"6:30\text{ am}"], ["6:30 p.m.", "6:31 a.m."]),
    # roots, constants, bases: nothing is rounded, nothing dropped
    r"\sqrt{2}": ([r"\sqrt2", r"\frac{2}{\sqrt{2}}"], ["1.41421356", "1.414213562373095", "2", r"\sqrt{3}"]),
    r"\frac{\sqrt{2}}{2}": ([r"\frac{1}{\sqrt{2}}"], ["0.70710678", r"\sqrt{2}"]),
    r"\pi": (["$\\pi$"], ["3.14159265", r"\frac{22}{7}", "e", r"2\pi"]),
    r"\frac{\pi}{2}": ([r"\pi/2", r"0.5\pi"], ["1.5707963", r"\frac{2}{\pi}"]),
    "3_8": (["3_{8}"], ["3", "3_7", "3_{10}", "38"]),
    "52_8": (["52_{8}", r"$52_8$"], ["52", "42", "52_9"]),
    # algebra
    "(x-1)(x+1)": (["x^2 - 1", "x^2-1"], ["x^2+1", "1", "x-1"]),
    "p - q": (["-q+p", "$p-q$"], ["q-p", "pq"]),
    "3+4i": (["4i + 3"], ["3-4i", "4+3i", "4"]),
    "x=5": (["5", "x = 5"], ["x=6", "y=5"]),
    r"x \le 3": ([r"x \leq 3", r"3 \geq x"], ["x < 3", r"x \ge 3", "3"]),
    "2.5x": ([r"\frac{5}{2}x"], ["2x", "2.5"]),
    # points, intervals, sets, lists
    "(1, 2)": ([r"\left(1, 2\right)", "(1,2)"], ["(2, 1)", "2", r"\{1, 2\}", "(1, 2, 3)"]),
    "[0, 1)": (["[0,1)", r"\left[0, 1\right)"], ["[0, 1]", "(0, 1)", "(0,1]", "1"]),
    r"(-\infty, 3) \cup (5, \infty)": ([r"(-\infty,3)\cup(5,\infty)"], [r"(-\infty, 3] \cup (5, \infty)"]),
    r"\{1, 2\}": ([r"\{2, 1\}", r"\{1,2\}"], [r"\{1, 3\}", r"\{1, 2, 3\}", "1"]),
    "1, -2": (["1,-2", "-2, 1", "1 and -2", r"1 \text{ or } -2"], ["1, 2", "1", "-2", "1, -2, 3"]),
    "3 or 4": (["4 or 3", "3, 4"], ["3", "4", "3 or 5"]),
    r"\begin{pmatrix}1\\2\end{pmatrix}": (
        [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
        [r"\begin{pmatrix}2\\1\end{pmatrix}"],
    ),
    # digits apart are a text: neither a product, nor a list, nor a set
    "1 2 3 4": (
        ["1  2 3\n4", r"\boxed{1 2 3 4}", "#### 1 2 3 4"],
        ["4 3 2 1", "1 2 3", "1 2 3 4 4", "1234", "1, 2, 3, 4"],
    ),
    "4 9 2 0": ([], ["4 0 0 0", "4 9 2", "4 9 2 0 0", "0", "4 9 0 2"]),
    "0 0": ([], ["0", "0 0 0", "00", "0 1"]),
    # choices, words, sentences
    "C": (
        ["(C)", r"\boxed{\text{C}}", r"\mathrm{C}", r"\textbf{(C)}", "C.", r"\text{(C)}"],
        ["D", "(D)", r"\text{B}", "AC", "3"],
    ),
    "yes": (["Yes", "YES.", r"\text{Yes}"], ["no", "No.", "y"]),
    r"\text{Evelyn}": (["Evelyn", r"\mathrm{Evelyn}"], [r"\text{Carla}", "Eve", r"\text{nylevE}"]),
    "Tom is a lempus.": (["tom is a lempus", "Tom is  a lempus ."], ["Tom is a jompus.", "Bob is a lempus.", "lempus"]),
    "True": (["true", "TRUE."], ["False", "not true"]),
}  # fmt: skip

# the last number of prose is its answer
IN_PROSE = {
    "18": (
        ["so she has 18 dollars", r"\boxed{18\text{ dollars}}", "16 - 3 - 4 = 9; 9 * 2 = 18", "**18**", "It is $18."],
        ["18 or 19", "so 18, no: 19", "eighteen", ""],
    ),
    "58500": (["x = 58,500", r"x=58,\!500", "It is 58,500."], ["x = 58,50", "y = 58500x"]),
    r"-\frac{35}{9}": ([r"The answer is $-\frac{35}{9}$.", "so -35/9"], ["so 35/9", r"It is $\frac{35}{9}$"]),
    "-1/2": (["it is -\u00bd", "x = -\u00bd"], ["it is \u00bd"]),
    "4": (
        ["Is it 3 or 4? It is 4.", "x=4", "4\n4\n4", "y = 4"],
        ["3 or 4", "x = 3 or x = 4", r"3 \text{ or } 4", "either 3 cm or 4 cm", "(3, 4]", "-3x + 4", "4\n5", "4 4"],
    ),
    "72": (["72\n72\n72", "72 \n 72"], ["72\n73", "7 2"]),
    "5/2": (["it takes 2 1/2 cups"], ["it takes 3 1/2 cups"]),
}  # fmt: skip


def _pairs(table, right):
    return [(other, reference) for reference, lists in table.items() for other in lists[not right]]


@pytest.mark.parametrize("grader", ["auto", "math"])
def test_answers_that_are_the_reference(grader):
    pairs = _pairs(EITHER_WAY, True)
    assert len(pairs) > 80
    if grader == "auto":
        pairs += [(reference, other) for other, reference in pairs]
    pairs += _pairs(IN_PROSE, True)
    assert [(p, r) for p, r in pairs if not is_correct(p, r, grader)] == []


@pytest.mark.parametrize("grader", ["auto", "math"])
def test_answers_that_are_not_the_reference(grader):
    pairs = _pairs(EITHER_WAY, False)
    assert len(pairs) > 80
    if grader == "auto":
        pairs += [(reference, other) for other, reference in pairs]
    pairs += _pairs(IN_PROSE, False)
    assert [(p, r) for p, r in pairs if is_correct(p, r, grader)] == []


@given(st.text(min_size=1), st.sampled_from(["auto", "math", "text"]))
def test_an_answer_equals_itself(text, grader):
    assume(extract_answer(text))
    assert is_correct(text, text, grader)


@given(
    st.integers(-(10**30), 10**30),
    st.integers(-(10**30), 10**30),
    st.sampled_from(["{}", "{:,}", "{}.0", r"\boxed{{{}}}"]),
)
def test_integers_are_equal_only_to_themselves(one, other, form):
    for grader in ("auto", "numeric", "math"):
        assert is_correct(form.format(one), str(one), grader)
        assert is_correct(form.format(one), str(other), grader) is (one == other)
        assert not is_correct(form.format(one), str(one + 1), grader)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1), st.randoms())
def test_digit_strings_are_equal_only_to_themselves(one, other, random):
    mixed = random.sample(one, len(one))
    for grader in ("auto", "math", "text"):
        for digits in (other, mixed, one + one, one[:-1]):
            assert is_correct(" ".join(map(str, digits)), " ".join(map(str, one)), grader) is (digits == one)


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
