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
from latent_sft.data import dataset
from latent_sft.data.dataset import tokenized_splits, tokenizer_fingerprint
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


def make(directory: Path, config: Config = CONFIG, splits: Splits = SPLITS, **latent: Any) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    config = dataclasses.replace(config, latent=dataclasses.replace(config.latent, **latent))
    return tokenized_splits(config.data, tokenizer, spec_of(config, tokenizer), splits, directory)


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
    assert set(make(tmp_path, splits=dataclasses.replace(SPLITS, test=[]))) == {"train", "validation"}


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
    make(tmp_path, splits=dataclasses.replace(SPLITS, train=SPLITS.train[:20]))
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
        make(tmp_path / "raise", with_data(max_cot_tokens=limit))
    assert not list((tmp_path / "raise").rglob("*.*arrow*"))
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
