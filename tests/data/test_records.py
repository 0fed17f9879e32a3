"""Reading, validating and splitting records; every kind of bad input is one clear message."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latent_sft.config.schema import DataConfig, FieldsConfig, SyntheticConfig
from latent_sft.data.formats import split_steps
from latent_sft.data.records import Record, load_splits
from latent_sft.errors import ConfigError, DataError

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOOD = {"problem": "How many are 2 and 3?", "cot": "2 + 3 = 5", "answer": "5"}


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"problem": f"problem {i}", "cot": f"step {i}", "answer": str(i), **changes} for i in range(count)]


def write_jsonl(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., list[Record]]:
    """Read one file as train; four further rows are there to be the validation split."""
    other = write_jsonl(tmp_path / "validation.jsonl", rows(1, problem="held out"))

    def read(source: Path | str, **settings: Any) -> list[Record]:
        settings = {"validation": other, "test": "", **settings}
        return load_splits(DataConfig(train=str(source), **settings)).train

    return read


def test_records_format_fills_optional_fields(tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    full = {"id": 7, "problem": " p ", "cot": "a\nb", "cot_answer": "so 5", "answer": 5, "steps": ["a", "b"]}
    bare, steps_only = dict(GOOD), {"problem": "q", "steps": ["x", "y"], "answer": 1.5}
    found = load(write_jsonl(tmp_path / "train.jsonl", [full, bare, steps_only]))
    assert found[0] == Record(id="7", problem="p", cot="a\nb", cot_answer="so 5", answer="5", steps=("a", "b"))
    assert (found[1].id, found[1].cot_answer, found[1].steps) == ("train-2", "5", ("2 + 3 = 5",))
    assert (found[2].cot, found[2].answer) == ("x\ny", "1.5")


def test_field_names_are_configurable(tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", [{"q": "p", "why": "w", "answer": "a", "name": "n"}])
    fields = FieldsConfig(problem="q", cot="why", id="name")
    found = load(source, fields=fields, validation=source)
    assert found == [Record(id="n", problem="p", cot="w", cot_answer="a", answer="a", steps=("w",))]


def test_a_row_without_answer_is_graded_by_the_box_of_its_text(
    tmp_path: Path, load: Callable[..., list[Record]]
) -> None:
    texts = ["The sum is \\boxed{\\frac{1}{2}}.", "so 5", "   "]
    values = [{"problem": f"p{i}", "cot": "c", "cot_answer": text} for i, text in enumerate(texts)]
    found = load(write_jsonl(tmp_path / "train.jsonl", values[:2]))
    assert [(r.answer, r.cot_answer) for r in found] == [("\\frac{1}{2}", texts[0]), ("so 5", "so 5")]
    with pytest.raises(DataError, match="field 'cot_answer': empty"):
        load(write_jsonl(tmp_path / "train.jsonl", values))
    with pytest.raises(DataError, match="field 'answer': missing; expected a text or a number"):
        load(write_jsonl(tmp_path / "train.jsonl", [{"problem": "p", "cot": "c"}]))


def test_every_split_may_have_names_and_a_format_of_its_own(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [{"problem": "p", "cot": "c", "cot_answer": "1"}])
    lines = tmp_path / "b.txt"
    lines.write_text("q||<<1+1=2>> #### 2\n")
    test = write_jsonl(tmp_path / "c.jsonl", [{"question": "r", "solution": "s", "answer": "3"}])
    settings = {"validation_format": "lines", "test_fields": {"problem": "question", "cot": "solution"}}
    splits = load_splits(DataConfig(train=train, validation=str(lines), test=test, **settings))
    found = [(r.problem, r.cot, r.answer) for r in (*splits.train, *splits.validation, *splits.test)]
    assert found == [("p", "c", "1"), ("q", "<<1+1=2>>", "2"), ("r", "s", "3")]
    with pytest.raises(ConfigError, match=r"data\.test_fields: got \{'anwser': 'a'\}, expected any of \['id', 'prob"):
        DataConfig(test_fields={"anwser": "a"})
    with pytest.raises(ConfigError, match=r"data\.validation_format: got 'csv', expected empty, auto, records"):
        DataConfig(validation_format="csv")


def test_steps_of_an_equation_cot_are_its_equations() -> None:
    assert split_steps("<<16-3-4=9>> <<9*2=18>>") == ("<<16-3-4=9>>", "<<9*2=18>>")
    assert split_steps("first <<1+1=2>>\n\n second") == ("first <<1+1=2>>", "second")
    assert split_steps("") == ()


def test_gsm8k_as_text_and_as_equations() -> None:
    source = str(FIXTURES / "gsm8k_train_20.jsonl")
    config = {"train": source, "test": "", "format": "gsm8k", "validation_size": 5}
    text = load_splits(DataConfig(**config))
    first = {r.id: r for r in text.train + text.validation}["train-1"]
    assert first.cot.splitlines()[0] == "Natalia sold 48/2 = 24 clips in May."
    assert (first.answer, first.cot_answer, len(first.steps)) == ("72", "72", 2)
    equations = load_splits(DataConfig(**config, cot_style="equations"))
    assert equations.sources["train"] != text.sources["train"]  # the same file, read otherwise
    first = {r.id: r for r in equations.train + equations.validation}["train-1"]
    assert first.cot == "<<48/2=24>> <<48+24=72>>"
    assert first.steps == ("<<48/2=24>>", "<<48+24=72>>")


def test_thousands_separators_leave_numeric_answers_only(tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    values = [{"question": f"q{i}", "answer": f"r\n#### {a}"} for i, a in enumerate(["1,250", "1,2", "-12,000.5"])]
    found = load(
        write_jsonl(tmp_path / "train.jsonl", values),
        format="gsm8k",
        validation=str(FIXTURES / "gsm8k_train_20.jsonl"),
    )
    assert [r.answer for r in found] == ["1250", "1,2", "-12000.5"]


def test_icot_lines_and_coconut_json() -> None:
    icot = load_splits(
        DataConfig(train=str(FIXTURES / "icot_gsm8k_valid_10.txt"), test="", format="lines", validation_size=1)
    )
    assert len(icot.train) == 9
    first = next(r for r in icot.train + icot.validation if r.id == "train-1")
    assert first.cot == "<<4-2=2>> <<2/.5=4>> <<12/4=3>> <<100*3=300>>"
    assert (first.answer, len(first.steps)) == ("300", 4)
    prosqa = load_splits(
        DataConfig(train="synthetic", synthetic=SyntheticConfig(num_train=5, num_validation=2, num_test=1),
                   test=str(FIXTURES / "prosqa_valid_10.json"), test_format="steps")
    )  # fmt: skip
    assert prosqa.test[0].steps == ("Tom is a terpus.", "Every terpus is a brimpus.", "Every brimpus is a lempus.")
    assert prosqa.test[0].cot == "\n".join(prosqa.test[0].steps)
    assert prosqa.test[0].answer == prosqa.test[0].cot_answer == "Tom is a lempus."
    assert not prosqa.validation_from_train


def test_all_file_types_give_the_same_records(tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    from datasets import Dataset

    values = rows(3, id=None)
    expected = load(write_jsonl(tmp_path / "a.jsonl", values))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as handle:
        handle.write("\ufeff" + "\n\n".join(json.dumps(value) for value in values))
    (tmp_path / "c.json").write_text(json.dumps(values))
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "d.parquet")
    Dataset.from_list(values).save_to_disk(str(tmp_path / "e"))
    texts = [(r.problem, r.cot, r.answer) for r in expected]
    for name in ("b.jsonl.gz", "c.json", "d.parquet", "e"):
        assert [(r.problem, r.cot, r.answer) for r in load(tmp_path / name)] == texts, name


def test_hub_names_go_through_datasets(
    tmp_path: Path, load: Callable[..., list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str = "") -> datasets.Dataset:
        asked.append((name, config, split, revision))
        if split == "absent":
            raise ValueError("Unknown split 'absent'")
        return datasets.Dataset.from_list(rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("hub:some/name:main:train")) == 2
    assert len(load("hub:some/name@1a2b:train")) == 2
    assert (asked[0], asked[-1]) == (("some/name", "main", "train", ""), ("some/name", None, "train", "1a2b"))
    with pytest.raises(DataError, match=r"hub:some/name:absent.*Unknown split.*give the path of the file"):
        load("hub:some/name:absent")
    with pytest.raises(ConfigError, match=r"expected hub:NAME:SPLIT"):
        load("hub:name")


BAD_ROWS = {
    "no object": ([1], r"row: got int; expected a JSON object\."),
    "missing field": (
        {"problem": "p", "cot": "c", "anwser": "1"},
        r"field 'answer': missing; .* Did you mean 'anwser'\?",
    ),
    "empty problem": ({**GOOD, "problem": " "}, r"field 'problem': empty; expected a text\."),
    "empty cot": ({**GOOD, "cot": ""}, r"field 'cot': empty; expected a text\."),
    "empty answer": ({**GOOD, "answer": ""}, r"field 'answer': empty; expected a text or a number\."),
    "wrong type": ({**GOOD, "problem": 5}, r"field 'problem': got int 5; expected a text\."),
    "null": ({**GOOD, "cot": None}, r"field 'cot': got NoneType None; expected a text\."),
    "answer is a boolean": ({**GOOD, "answer": True}, r"field 'answer': got bool True; expected a text or a number\."),
    "steps is a text": ({**GOOD, "steps": "a"}, r"field 'steps': got str 'a'; expected a list of texts\."),
    "empty step": ({**GOOD, "steps": ["a", ""]}, r"field 'steps': empty list or empty step"),
    "used id": ({**GOOD, "id": "first"}, r"field 'id': 'first' was used at line 1; expected an id of its own\."),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_error_with_its_place(name: str, tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    value, message = BAD_ROWS[name]
    bad = value[0] if isinstance(value, list) else value
    source = write_jsonl(tmp_path / "train.jsonl", [{**GOOD, "id": "first"}, bad, GOOD])
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {message}.*data\.on_error=skip\.$"):
        load(source)
    assert [r.id for r in load(source, on_error="skip")] == ["first", "train-3"]


@pytest.mark.parametrize(
    ("row_format", "line", "message"),
    [
        ("gsm8k", '{"question": "q", "answer": "5"}', r"field 'answer': no '####'"),
        ("gsm8k", '{"question": "q", "answer": "#### 5"}', r"field 'answer': empty chain of thought \(nothing before"),
        ("gsm8k", '{"question": "q", "answer": "r #### "}', r"field 'answer': empty; expected an answer after '####'"),
        ("steps", '{"question": "q", "answer": "5", "steps": []}', r"field 'steps': empty list"),
        ("lines", "problem only", r"row: no '\|\|'; expected 'problem\|\|steps #### answer'"),
        ("lines", "p||<<1+1=2>>", r"row: no '####'"),
        ("lines", "p|| #### 9", r"field 'steps': empty chain of thought"),
        ("lines", " ||<<1+1=2>> #### 9", r"field 'problem': empty"),
    ],
)
def test_bad_rows_of_the_public_formats(row_format: str, line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("train.txt" if row_format == "lines" else "train.jsonl")
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"train\.\w+:1: {message}"):
        _ = load_splits(DataConfig(train=str(path), test="", format=row_format)).train  # type: ignore[arg-type]


def test_a_cut_off_jsonl_loses_one_row(tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    path = Path(write_jsonl(tmp_path / "train.jsonl", rows(3)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.jsonl:3: row: not valid JSON .*cut off\?\).*on_error=skip"):
        load(path)
    assert len(load(path, on_error="skip")) == 2


def test_a_cut_off_gzip_is_refused_however_bad_rows_are_treated(
    tmp_path: Path, load: Callable[..., list[Record]]
) -> None:
    path = tmp_path / "train.jsonl.gz"
    whole = "".join(json.dumps(row) + "\n" for row in rows(2000))
    path.write_bytes(gzip.compress(whole.encode())[:-3000])
    for on_error in ("raise", "skip"):
        with pytest.raises(
            DataError, match=r"train\.jsonl\.gz:\d{4}: gzip data ends or breaks here .*expected a whole file"
        ):
            load(path, on_error=on_error)
    assert len(load(path, limit_train=1000)) == 1000
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"train\.jsonl\.gz:1: gzip data"):
        load(path)


def test_a_byte_that_is_not_utf8_is_one_bad_row(tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    path = Path(write_jsonl(tmp_path / "train.jsonl", rows(3)))
    path.write_bytes(path.read_bytes().replace(b"problem 1", b"problem \xff"))
    with pytest.raises(DataError, match=r"train\.jsonl:2: row: not UTF-8"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"problem": "p"', r"a\.json:1: not valid JSON"),
        ("a.json", b'{"problem": "p"}', r"a\.json:1: got dict; expected a list of objects"),
        ("a.parquet", b"PAR1 cut", r"a\.parquet: damaged behind row 0 .*magic bytes"),
        ("a.jsonl", b"\n", r"a\.jsonl: no usable rows"),
    ],
)
def test_a_source_damaged_as_a_whole(
    name: str, content: bytes, message: str, tmp_path: Path, load: Callable[..., list[Record]]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name, on_error="skip")


def test_missing_file_folder_and_suffix(tmp_path: Path, load: Callable[..., list[Record]]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file or folder; expected \.jsonl"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"not a folder written by Dataset\.save_to_disk"):
        load(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"has no known suffix"):
        load(tmp_path / "a.csv")


def test_skipped_rows_are_listed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", [*rows(4), {"problem": "p"}, 3])
    splits = load_splits(DataConfig(train=source, test="", validation_size=1, on_error="skip"))
    assert splits.skipped == {}
    assert len(splits.train) == 3
    listed = splits.skipped["train"]
    assert [(row["file"], row["line"]) for row in listed] == [(source, 5), (source, 6)]
    assert listed[0]["reason"].startswith("field 'cot': missing")


def test_evaluation_rows_need_no_cot(tmp_path: Path) -> None:
    bare = write_jsonl(
        tmp_path / "bare.jsonl", [{"problem": "p", "answer": 3}, {"problem": "q", "cot": "", "answer": 4}]
    )
    raw = write_jsonl(tmp_path / "raw.jsonl", [{"question": "r", "answer": "#### 9"}])
    train = write_jsonl(tmp_path / "train.jsonl", rows(2))
    splits = load_splits(DataConfig(train=train, validation=bare, test=raw, test_format="gsm8k"))
    assert [(r.cot, r.steps, r.cot_answer) for r in splits.validation] == [("", (), "3"), ("", (), "4")]
    assert (splits.test[0].cot, splits.test[0].answer) == ("", "9")
    with pytest.raises(DataError, match=r"bare\.jsonl:1: field 'cot': missing"):
        _ = load_splits(DataConfig(train=bare, validation=bare, test="")).train


def test_validation_is_split_off_train_and_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", rows(30))
    config = {"train": source, "test": "", "validation_size": 10}
    splits = load_splits(DataConfig(**config))
    with caplog.at_level(logging.INFO):
        ids = [r.id for r in splits.validation]
    assert "10 problems split off train (data.split_seed=0)" in caplog.text
    assert splits.validation_from_train
    assert splits.sources["validation"].startswith("10 problems, split_seed 0, of ")
    assert splits.sources["train"].startswith(hashlib.sha256(Path(source).read_bytes()).hexdigest() + "; rows ")
    assert len(ids) == 10
    assert {*ids}.isdisjoint(r.id for r in splits.train)
    assert load_splits(DataConfig(**config, limit_train=5)).validation == splits.validation
    assert len(load_splits(DataConfig(**config, limit_train=5)).train) == 5
    assert [r.id for r in load_splits(DataConfig(**config, split_seed=1)).validation] != ids


def test_a_held_out_problem_leaves_train_with_all_its_chains(tmp_path: Path) -> None:
    values = [{**row, "problem": row["problem"].upper() if i % 2 else row["problem"] + " "}
              for i, row in enumerate(r for r in rows(10) for _ in range(2))]  # fmt: skip
    splits = load_splits(DataConfig(train=write_jsonl(tmp_path / "a.jsonl", values), test="", validation_size=4))
    assert (len(splits.train), len(splits.validation)) == (12, 4)
    assert {r.problem.lower() for r in splits.train}.isdisjoint(r.problem.lower() for r in splits.validation)


def test_only_the_splits_asked_for_are_read_and_train_only_to_its_limit(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [*rows(3), {"problem": "bad"}])
    test = write_jsonl(tmp_path / "test.jsonl", rows(2))
    config = DataConfig(train=train, validation=test, test=test)
    splits = load_splits(config)
    assert (len(splits.test), len(splits.validation)) == (2, 2)
    with pytest.raises(DataError, match=r"train\.jsonl:4: field 'cot'"):
        _ = splits.train
    limited = dataclasses.replace(config, limit_train=3, limit_validation=1)
    assert (len(load_splits(limited).train), len(load_splits(limited).validation)) == (3, 1)


def test_what_a_split_is_made_from_names_file_format_and_limits(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", rows(9))
    test = write_jsonl(tmp_path / "test.jsonl", rows(2))
    config = DataConfig(train=train, validation="", test=test, validation_size=2)

    def changed(**settings: Any) -> set[str]:
        now = load_splits(dataclasses.replace(config, **settings)).sources
        return {split for split, source in load_splits(config).sources.items() if now[split] != source}

    assert changed() == set()
    assert changed(limit_train=2) == {"train"}
    assert changed(limit_validation=1) == {"validation"}
    assert changed(limit_test=1) == {"test"}
    assert changed(split_seed=1) == changed(validation_size=3) == {"train", "validation"}
    assert changed(test_format="gsm8k") == {"test"}
    assert changed(cot_style="equations") == changed(step_separator=";") == {"train", "validation", "test"}
    assert changed(on_error="skip") == set()  # a file that was read without error gives the same rows
    assert changed(test=train) == {"test"}


def test_settings_that_do_not_fit_together(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", rows(10))
    with pytest.raises(ConfigError, match=r"data\.validation_size: got 500, but train has 10 different problems"):
        _ = load_splits(DataConfig(train=source, test="")).validation
    with pytest.raises(ConfigError, match=r"data\.test: got 'synthetic' while data\.train is"):
        load_splits(DataConfig(train=source))


def test_synthetic_splits_and_limits() -> None:
    synthetic = SyntheticConfig(num_train=20, num_validation=5, num_test=8)
    splits = load_splits(DataConfig(synthetic=synthetic, limit_train=6, limit_validation=2, limit_test=3))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 3)
    assert not splits.validation_from_train
    assert splits.sources["test"].startswith("synthetic modular ")
