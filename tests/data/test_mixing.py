"""Sources with weights: how often an epoch shows a row, for any batch size and number of processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_sft.config.load import load_config
from latent_sft.config.schema import DataConfig
from latent_sft.data.lengths import single
from latent_sft.data.mixing import Slots
from latent_sft.data.records import load_splits
from latent_sft.errors import ConfigError
from latent_sft.experiment.workspace import Workspace
from latent_sft.train.sampler import LengthBucketSampler, TokenBatchSampler, shared_out

WEIGHTS = torch.tensor([1.0] * 5 + [2.0] * 4 + [0.5] * 6 + [1.25] * 8)
LENGTHS = torch.arange(23) % 7 + 3


def shown(epoch: int, seed: int = 0) -> Counter[int]:
    return Counter(Slots.of(WEIGHTS, LENGTHS, seed).rows(epoch).tolist())


def test_a_weight_is_how_often_an_epoch_shows_a_row() -> None:
    epochs = [shown(epoch) for epoch in range(4)]
    for counts in epochs:
        assert [counts[row] for row in range(9)] == [1] * 5 + [2] * 4
        assert [sum(counts[row] for row in part) for part in (range(9, 15), range(15, 23))] == [3, 10]
    both = epochs[0] + epochs[1]
    assert [both[row] for row in range(9, 15)] == [1] * 6  # two epochs show each of them once
    assert [sum(epochs, Counter())[row] for row in range(15, 23)] == [5] * 8
    assert shown(0) == shown(0) != shown(0, seed=1)


def test_rows_that_share_a_slot_are_of_similar_length_and_the_longest_counts() -> None:
    lengths = torch.tensor([9, 2, 8, 1])
    slots = Slots.of(torch.full((4,), 0.5), lengths, 0)
    assert sorted(sorted(part.tolist()) for part in slots.members.split(2)) == [[0, 2], [1, 3]]
    assert sorted(slots.longest(lengths).tolist()) == [2, 9]
    assert len(Slots.of(torch.full((4,), 0.01), lengths, 0).size) == 1  # listed, so seen


@pytest.mark.parametrize("kind", ["examples", "tokens"])
def test_samplers_show_the_same_rows_however_the_job_is_cut(kind: str) -> None:
    slots = Slots.of(WEIGHTS, LENGTHS, 0)

    def epoch(number: int, processes: int, size: int) -> Counter[int]:
        lengths = slots.longest(LENGTHS)
        if kind == "tokens":
            sampler: Any = TokenBatchSampler(single(lengths), size * 9, processes, 0, "cot")
        else:
            sampler = LengthBucketSampler(lengths, size * processes, 0)
        sampler.rows = slots.rows
        sampler.set_epoch(number)
        return Counter(
            row for p in range(processes) for batch in shared_out(sampler, size, processes, p) for row in batch
        )

    total = len(slots.size)
    for number in (0, 1):
        expected = Counter(slots.rows(number).tolist())
        found = [epoch(number, 1, 2), epoch(number, 1, total if kind == "examples" else 5)]
        assert found == [expected, expected]
        assert epoch(number, 2, 1) == expected or total % 2


def write(path: Path, name: str, count: int) -> str:
    rows = [{"problem": f"{name} has {i} .", "cot": f"{i} = {i}", "answer": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_simplest_form_and_mistakes(tmp_path: Path) -> None:
    assert load_config(None, ["data.train=[a.jsonl,b.jsonl]"]).data == DataConfig(
        train=["a.jsonl", {"path": "b.jsonl"}]
    )
    for given, message in [
        ("[]", r"data\.train: got \(\), expected a path, `synthetic`, hub:NAME:SPLIT, or a list of sources"),
        ("[{path: a.jsonl, weigth: 2}]", "expected a path, or an object with path and any of weight, format, fields"),
        ("[{path: a.jsonl, weight: 0}]", r"weight of a\.jsonl: got 0\.0, expected a number > 0"),
        ("[{path: a.jsonl, format: csv}]", r"format of a\.jsonl: got 'csv', expected auto, records"),
        ("[{path: a.jsonl, fields: {x: y}}]", r"fields of a\.jsonl: got \{'x': 'y'\}, expected any of"),
        ("[synthetic]", "got 'synthetic', expected a path or hub:NAME:SPLIT in every entry"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(None, [f"data.train={given}"])


def test_limits_are_of_each_source_and_the_fingerprint_knows_the_weights(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", "ann", 6), write(tmp_path / "b.jsonl", "bob", 6)

    def splits(weight: float, **settings: Any) -> Any:
        sources = [{"path": one, "weight": weight}, {"path": two}]
        return load_splits(DataConfig(train=sources, test="", **settings))

    found = splits(2, validation_size=3, limit_train=2)
    assert [record.problem.split()[0] for record in found.train] == ["ann", "ann", "bob", "bob"]
    read = found.read["train"]
    assert [r["rows"] for r in read] == [6, 6]
    assert sum(r["held_out"] for r in read) == 3
    assert splits(2).sources["train"] != splits(3).sources["train"]
    assert "2 x " in splits(2).sources["train"]


def test_a_run_with_weights_tokenises_each_row_once_and_keeps_the_report(tmp_path: Path, tiny_config: Any) -> None:
    one, two = write(tmp_path / "a.jsonl", "ann", 6), write(tmp_path / "b.jsonl", "bob", 8)
    with open(two, "a") as handle:
        handle.write(
            '{"problem": "bob has no answer .", "cot": "x"}\n{"problem": "long .", "cot": "'
            + "1 " * 30
            + '", "answer": "1"}\n'
        )
    train = f"data.train=[{{path: {one}, weight: 2}}, {two}]"
    config = tiny_config(train, f"data.validation={one}", "data.test=", "data.on_error=skip", "data.max_cot_tokens=20")
    work = Workspace(config)
    assert Counter(work.data["train"]["weight"]) == {2.0: 6, 1.0: 8}
    assert "weight" not in work.data["validation"].column_names
    table = (tmp_path / "run/data/train/read.txt").read_text().splitlines()
    assert table[0].split() == ["source", "format", "rows", "used", "held", "out", "weight", "skipped"]
    assert table[1].split() == [one, "records", "6", "6", "0", "2"]
    assert table[2].split(maxsplit=6) == [
        two,
        "records",
        "10",
        "8",
        "0",
        "1",
        "1 field 'answer': missing; 1 cot: N tokens",
    ]
