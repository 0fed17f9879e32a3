"""Tokenised splits on disk: content, cache, damage, limits."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from latent_sft.config.experiment import Config
from latent_sft.config.schema import DataConfig, LatentConfig, PromptConfig, SyntheticConfig, TinyModelConfig
from latent_sft.data import dataset, readers, records
from latent_sft.data.dataset import skipped_rows, tokenized_splits, tokenizer_fingerprint
from latent_sft.data.prompts import build_spec, tokenize_record
from latent_sft.data.records import Splits, load_splits
from latent_sft.errors import ArtefactError, DataError
from latent_sft.method.types import LatentSpec
from latent_sft.models.tiny_tokenizer import build_tokenizer

DATA = DataConfig(synthetic=SyntheticConfig(num_train=30, num_validation=5, num_test=6))
CONFIG = Config(data=DATA)
SPLITS = load_splits(DATA)


def make_tokenizer(kind: str = "word") -> PreTrainedTokenizerFast:
    texts = [text for r in SPLITS.train for text in (r.problem, r.cot, r.answer)]
    return build_tokenizer(texts, TinyModelConfig(tokenizer=kind), PromptConfig())  # type: ignore[arg-type]


def spec_of(config: Config, tokenizer: PreTrainedTokenizerFast) -> LatentSpec:
    return build_spec(tokenizer, config.prompt, config.latent, len(tokenizer))


def make(
    directory: Path, config: Config = CONFIG, splits: Splits = SPLITS, max_positions: int | None = None, **latent: Any
) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    config = dataclasses.replace(config, latent=dataclasses.replace(config.latent, **latent))
    spec = spec_of(config, tokenizer)
    return dict(tokenized_splits(config.data, tokenizer, spec, splits, directory, max_positions))


def with_data(**changes: Any) -> Config:
    return dataclasses.replace(CONFIG, data=dataclasses.replace(DATA, **changes))


def written(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.arrow")}


def test_rows_are_those_of_tokenize_record(tmp_path: Path) -> None:
    found = make(tmp_path)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 30, "validation": 5, "test": 6}
    tokenizer = make_tokenizer()
    spec = spec_of(CONFIG, tokenizer)
    assert list(found["train"]) == [tokenize_record(tokenizer, spec, record) for record in SPLITS.train]
    assert found["train"].column_names == dataset.SCHEMA.names


def test_no_test_split_no_test_dataset(tmp_path: Path) -> None:
    splits = load_splits(dataclasses.replace(DATA, test=""))
    assert set(make(tmp_path, splits=splits)) == {"train", "validation"}


def test_the_second_time_nothing_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path)
    before = written(tmp_path)
    monkeypatch.setattr(dataset, "tokenize_record", None)
    assert list(make(tmp_path)["train"]) == list(first["train"])
    assert written(tmp_path) == before


def test_other_settings_replace_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path)
    with caplog.at_level(logging.INFO):
        rows = make(tmp_path, rate=3)["train"]
    assert rows[0]["segment_lengths"][0] == 3
    assert "made from other data or settings" in caplog.text
    assert len(list((tmp_path / "train").glob("*.arrow"))) == 1


def test_a_changed_split_is_made_again_and_only_that_one(tmp_path: Path) -> None:
    make(tmp_path)
    before = written(tmp_path)
    make(tmp_path, splits=load_splits(dataclasses.replace(DATA, limit_train=20)))
    assert {path.parent.name for path in written(tmp_path).keys() - before.keys()} == {"train"}


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "meta"])
def test_a_damaged_cache_is_made_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(make(tmp_path)["train"])
    path = next((tmp_path / "train").glob("*.arrow"))
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "cut":
        path.write_bytes(content[:1000])
    elif damage == "delete":
        path.unlink()
    else:
        (tmp_path / "train" / "meta.json").write_text('{"key"')
    with caplog.at_level(logging.WARNING):
        assert list(make(tmp_path)["train"]) == expected
    assert "damaged" in caplog.text


def test_too_long_rows_are_errors_or_skipped_and_listed(tmp_path: Path) -> None:
    lengths = sorted(len(row["cot"]) for row in make(tmp_path / "all")["train"])
    limit = lengths[len(lengths) // 2]
    with pytest.raises(
        DataError, match=rf"row 'modular-train-\d+': cot: \d+ tokens; expected at most data\.max_cot_tokens={limit}"
    ):
        make(tmp_path / "raise", with_data(max_cot_tokens=limit))["train"]
    assert not list((tmp_path / "raise" / "train").rglob("*.*arrow*"))
    rows = make(tmp_path / "skip", with_data(max_cot_tokens=limit, on_error="skip"))["train"]
    listed = [json.loads(line) for line in (tmp_path / "skip/train/skipped.jsonl").read_text().splitlines()]
    assert len(rows) + len(listed) == 30
    assert {row["id"] for row in rows}.isdisjoint(row["id"] for row in listed)
    with pytest.raises(DataError, match=r"row 'modular-train-0': prompt: \d+ tokens"):
        make(tmp_path / "prompt", with_data(max_prompt_tokens=3))
    with pytest.raises(DataError, match=r"train: all 30 rows were skipped, the first: row 'modular-train-0'"):
        make(tmp_path / "none", with_data(max_prompt_tokens=3, on_error="skip"))


def test_a_full_disk_leaves_the_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    before = written(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(dataset.os, "replace", full)
        with pytest.raises(ArtefactError, match=r"could not be written \(No space left on device\)"):
            make(tmp_path, rate=5)
    assert written(tmp_path) == before
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("kind", ["word", "digits", "bpe"])
def test_tokenizer_fingerprint_survives_saving_and_use(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind)
    found = tokenizer_fingerprint(tokenizer)
    tokenizer(["bob has 1", "a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == found
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == found
    loaded.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(loaded) != found
    assert tokenizer_fingerprint(make_tokenizer("bpe" if kind == "word" else "word")) != found


def test_rows_differ_by_segmentation_in_hash(tmp_path: Path) -> None:
    fixed, step = make(tmp_path / "a")["train"], make(tmp_path / "b", segmentation="step")["train"]
    assert fixed[0]["cot"] == step[0]["cot"]
    assert step[0]["segment_lengths"] == [6] * len(step[0]["steps"])
    assert fixed[0]["hash"] != step[0]["hash"]
    assert LatentConfig().segmentation == "fixed"


# what train may not have, and evaluation may


def write_rows(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def of_files(directory: Path, values: list[dict[str, Any]], **settings: Any) -> Config:
    good = [{"problem": f"1 + {i}", "cot": "1", "answer": "1"} for i in range(4)]
    test, train = write_rows(directory / "test.jsonl", values), write_rows(directory / "train.jsonl", good)
    return Config(data=DataConfig(train=train, validation=test, test=test, **settings))


def from_files(directory: Path, values: list[dict[str, Any]], *, positions: int | None = None, **settings: Any) -> Any:
    config = of_files(directory, values, **settings)
    tokenizer = make_tokenizer()
    spec = spec_of(config, tokenizer)
    splits = load_splits(config.data)
    return tokenized_splits(config.data, tokenizer, spec, splits, directory / "data", positions)


ODD_COTS = [
    {"problem": "1 + 1", "answer": "2", "cot": "1 + 1 = 2"},
    {"problem": "1 + 2", "answer": "3", "cot": "1 " * 500},
    {"problem": "1 + 3", "answer": "4", "cot": "1 </think> 4"},
    {"problem": "1 + 4", "answer": "5"},
    {"problem": "1 + 5", "answer": "6", "cot": ["1"]},
    {"problem": "1 + 6", "answer": "7", "cot": "7", "steps": "7"},
]


@pytest.mark.parametrize("segmentation", ["fixed", "step"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_row_of_an_evaluation_split_is_left_out_for_its_cot(
    tmp_path: Path, on_error: str, segmentation: str
) -> None:
    config = of_files(tmp_path, ODD_COTS, on_error=on_error, max_cot_tokens=100)
    found = make(tmp_path / "data", config, load_splits(config.data), segmentation=segmentation)
    for split in ("validation", "test"):
        assert [row["reference"] for row in found[split]] == ["2", "3", "4", "5", "6", "7"]
        assert [bool(row["cot"]) for row in found[split]] == [True, False, False, False, False, False]
        assert skipped_rows(tmp_path / "data" / split) == {}
    train = dataclasses.replace(config.data, train=config.data.test, on_error="raise")
    with pytest.raises(DataError, match=r"test\.jsonl:4: field 'cot': missing"):
        make(tmp_path / "train", dataclasses.replace(config, data=train), load_splits(train))


def test_evaluation_rows_that_cannot_be_asked_are_counted(tmp_path: Path) -> None:
    values = [*ODD_COTS[:2], {"problem": "1 " * 300, "answer": "300"}, {"answer": "1"}]
    with pytest.raises(DataError, match=r"row 'test-3': prompt: \d+ tokens; expected at most data\.max_prompt_tokens"):
        _ = from_files(tmp_path, values[:3], max_prompt_tokens=100)["test"]
    found = from_files(tmp_path, values, max_prompt_tokens=100, max_cot_tokens=100, on_error="skip")["test"]
    assert len(found) == 2
    assert skipped_rows(tmp_path / "data" / "test") == {"bad row": 1, "too long": 1}
    listed = [json.loads(line) for line in (tmp_path / "data/test/skipped.jsonl").read_text().splitlines()]
    assert [(row.get("line"), row.get("id")) for row in listed] == [(4, None), (None, "test-3")]


def test_a_row_longer_than_the_positions_of_the_model_is_named_when_data_is_read(tmp_path: Path) -> None:
    values = [{"problem": "1 + 1", "answer": "2", "cot": "1 " * 40}, {"problem": "1 " * 60, "answer": "3"}]
    with pytest.raises(
        DataError, match=r"row 'test-2': \d+ positions \(prompt \d+, CoT 0, .*at most 45, which is what"
    ):
        _ = from_files(tmp_path, values, positions=45)["test"]
    found = from_files(tmp_path, values, positions=45, on_error="skip")["test"]
    assert [len(row["cot"]) for row in found] == [0]
    long = from_files(tmp_path, values[:1], positions=7)
    with pytest.raises(DataError, match=r"row 'train-1': \d+ positions .* expected at most 7"):
        _ = long["train"]


def test_problems_shared_with_an_evaluation_split_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = from_files(tmp_path, [{"problem": "1  + 3", "answer": "4"}, {"problem": "new", "answer": "1"}])
    with caplog.at_level(logging.WARNING):
        _ = found["test"]
        assert "contamination" not in caplog.text
        _ = found["train"], found["validation"]
    assert "contamination: 1 of 4 train rows have a problem that is also in test" in caplog.text
    assert "contamination: 1 of 4 train rows have a problem that is also in validation" in caplog.text


def test_a_split_is_read_when_it_is_asked_for_and_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def read(source: str) -> Any:
        opened.append(Path(source).name)
        return readers.read_rows(source)

    monkeypatch.setattr(records, "read_rows", read)
    found = from_files(tmp_path, ODD_COTS[:1])
    assert "test" in found and opened == []
    assert (len(found["test"]), opened) == (1, ["test.jsonl"])
    assert len(from_files(tmp_path, ODD_COTS[:1])["test"]) == 1
    assert opened == ["test.jsonl"], "the tokenised rows are there already"


@pytest.mark.parametrize(
    ("separator", "cot", "lengths"),
    [
        ("\n", "1 + 1 = 2\n2 + 2 = 4", [5, 5]),
        (";", "1 + 1 = 2 ; 2 + 2 = 4", [6, 5]),
        ("=", "1 + 1 = 2 + 2 = 4 =", [4, 4, 2]),
        ("##", "1 + 1", [3]),
    ],
)
def test_steps_by_separator_are_the_whole_cot(tmp_path: Path, separator: str, cot: str, lengths: list[int]) -> None:
    values = [{"problem": "1 + 1", "cot": cot, "answer": "2"}]
    config = of_files(tmp_path, values, step_separator=separator)
    row = make(tmp_path / "data", config, load_splits(config.data), segmentation="step")["test"][0]
    assert row["segment_lengths"] == row["step_lengths"] == lengths
    assert sum(lengths) == len(row["cot"])
    assert "".join("".join(row["steps"]).split()) == "".join(cot.split())


def test_a_problem_of_every_private_use_character_is_tokenised(tmp_path: Path) -> None:
    """They stand for cuts in front of control tokens, so one must be found that the text does not hold."""
    values = [{"problem": "".join(map(chr, range(0xE000, 0xF900))), "cot": "1", "answer": "1"}]
    assert len(from_files(tmp_path, values, max_prompt_tokens=10_000)["test"]) == 1
