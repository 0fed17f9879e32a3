"""Multiplication: the generator writes the public files' lines to the letter, and trains on no problem of theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latent_sft.config.schema import DataConfig, FieldsConfig, SyntheticConfig
from latent_sft.data.detect import parse_row
from latent_sft.data.formats import Record, RowFormat
from latent_sft.data.multiplication import answer_of, in_order, problem_of, steps_of
from latent_sft.data.readers import read_rows
from latent_sft.data.records import load_splits
from latent_sft.data.synthetic import generate
from latent_sft.errors import ConfigError

FIXTURES = Path(__file__).parents[1] / "fixtures"
PUBLIC = "LATENT_SFT_PUBLIC_DATA"  # folder with mult_4x4_valid.txt and so on, as the repository of the paper has them
FORMAT = RowFormat(name="lines", fields=FieldsConfig(), step_separator="+")


def value(digits: str) -> int:
    return int("".join(digits.split())[::-1])


def check_against(path: Path) -> int:
    """Hold the generator against every line of a file; return how many there are."""
    lines = [row.value for row in read_rows(str(path))]
    for number, line in enumerate(lines, start=1):
        left, right = map(value, line.split("||")[0].split("*"))
        steps = steps_of(left, right)
        assert f"{problem_of(left, right)}||{' '.join(steps)} #### {answer_of(left, right)}" == line, f"{path}:{number}"
        # read from the file it is the record that is generated
        record = parse_row(line, FORMAT, default_id="x")
        assert record == Record(
            id="x",
            problem=problem_of(left, right),
            cot=" ".join(steps),
            cot_answer=answer_of(left, right),
            answer=answer_of(left, right),
            steps=steps,
        )
    return len(lines)


def test_a_problem_worked_out_by_hand() -> None:
    # 3719 x 3349 = 33471 + 148760 + 1115700 + 11157000; 33471 + 148760 = 182231, and with 1115700 it is 1297931
    assert problem_of(3719, 3349) == "9 1 7 3 * 9 4 3 3"
    assert steps_of(3719, 3349) == (
        "1 7 4 3 3 +",
        "0 6 7 8 4 1 ( 1 3 2 2 8 1 ) +",
        "0 0 7 5 1 1 1 ( 1 3 9 7 9 2 1 ) +",
        "0 0 0 7 5 1 1 1",
    )
    assert answer_of(3719, 3349) == "1 3 9 4 5 4 2 1"


def test_the_smallest_sizes_and_zeros_inside() -> None:
    assert (steps_of(3, 2), answer_of(3, 2)) == (("6 0",), "6 0")
    # 10 x 10: partial products 0 and 100 of 3 and 4 digits, no sum in between
    assert (steps_of(10, 10), answer_of(10, 10)) == (("0 0 0 +", "0 0 1 0"), "0 0 1 0")
    # 100 x 101: 100 + 0 + 10000; only the step in the middle says the sum so far
    assert steps_of(100, 101) == ("0 0 1 0 +", "0 0 0 0 0 ( 0 0 1 0 0 ) +", "0 0 0 0 1 0")


@pytest.mark.parametrize(("name", "rows"), [("mult_4x4_valid_10.txt", 10), ("mult_7x7_valid_5.txt", 5)])
def test_lines_of_the_public_files(name: str, rows: int) -> None:
    assert check_against(FIXTURES / name) == rows


@pytest.mark.skipif(PUBLIC not in os.environ, reason=f"{PUBLIC} is not set")
def test_every_line_of_the_public_files() -> None:
    found = {path.name: check_against(path) for path in sorted(Path(os.environ[PUBLIC]).glob("mult_*.txt"))}
    assert found
    assert set(found.values()) == {1000}


def test_generated_problems_are_right_and_of_the_size_asked_for() -> None:
    config = SyntheticConfig(task="multiplication", num_digits=3, num_train=300, num_validation=50, num_test=60)
    splits = generate(config)
    assert {name: len(found) for name, found in splits.items()} == {"train": 300, "validation": 50, "test": 60}
    records = [record for found in splits.values() for record in found]
    for record in records:
        left, right = map(value, record.problem.split("*"))
        assert 100 <= left <= 999
        assert 100 <= right <= 999
        assert value(record.answer) == left * right
        partials = [value(step.split("(")[0].replace("+", "")) for step in record.steps]
        assert partials == [left * int(digit) * 10**k for k, digit in enumerate(str(right)[::-1])]
        assert record.cot == " ".join(record.steps)
    pairs = [frozenset(map(value, record.problem.split("*"))) for record in records]
    assert len(set(pairs)) == len(pairs)  # in neither order
    assert generate(config) == splits


def test_more_problems_than_there_are_is_an_error() -> None:
    # 45 pairs of one digit, in either order
    config = {"task": "multiplication", "num_digits": 1, "num_validation": 5, "num_test": 5}
    assert len(generate(SyntheticConfig(num_train=35, **config))["train"]) == 35
    with pytest.raises(ConfigError, match=r"num_train: got 36, but after 35 .* expected fewer, or a larger num_digits"):
        generate(SyntheticConfig(num_train=36, **config))


def test_no_training_problem_is_one_of_a_given_file_in_either_order(tmp_path: Path) -> None:
    assert in_order("4 3 * 2 1") == in_order("2 1 * 4 3") == in_order("21*43") != in_order("3 4 * 2 1")
    # of the 45 pairs of one digit, all but seven are given
    pairs = [(a, b) for a in range(1, 10) for b in range(1, a + 1)]
    valid, test = tmp_path / "valid.txt", tmp_path / "test.txt"
    for path, part in ((valid, pairs[7:20]), (test, pairs[20:])):
        path.write_text("".join(f"{a} * {b}||0 #### 0\n" for a, b in part))
    files = {"validation": str(valid), "validation_format": "lines", "test": str(test), "test_format": "lines"}
    synthetic = SyntheticConfig(task="multiplication", num_digits=1, num_train=7, num_validation=1, num_test=1)
    # the two that would have been generated for validation and test are drawn too, and belong to no other split
    with pytest.raises(ConfigError, match="num_train: got 7, but after 5 there"):
        _ = load_splits(DataConfig(synthetic=synthetic, **files)).train
    splits = load_splits(DataConfig(synthetic=SyntheticConfig(task="multiplication", num_digits=1, num_train=5,
                                                              num_validation=1, num_test=1),
                                    **files, limit_test=3))  # fmt: skip
    # the files are left out as a whole, whatever is evaluated
    found = {tuple(sorted(map(value, r.problem.split("*")), reverse=True)) for r in splits.train}
    assert found < set(pairs[:7])
    assert (len(splits.test), len(splits.validation)) == (3, 13)


def test_the_files_left_out_are_part_of_what_train_is_made_from(tmp_path: Path) -> None:
    test = tmp_path / "test.txt"
    sources = []
    for row in ("1 2 * 3 4||0 #### 0\n", "1 2 * 3 5||0 #### 0\n"):
        test.write_text(row)
        synthetic = SyntheticConfig(task="multiplication", num_digits=2, num_train=5, num_validation=1, num_test=1)
        sources.append(load_splits(DataConfig(synthetic=synthetic, test=str(test), test_format="lines")).sources)
    assert sources[0]["train"] != sources[1]["train"]
    assert sources[0]["validation"] != sources[1]["validation"]
    assert ", without the problems of " in sources[0]["train"]
    modular = load_splits(DataConfig(test=str(test), test_format="lines")).sources
    assert "without" not in modular["train"]
