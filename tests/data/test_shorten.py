"""Shorter chains of thought: what every rule leaves, and where none can be applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latent_sft.config.schema import DataConfig, ShortenConfig, SyntheticConfig
from latent_sft.data.formats import Record, split_steps
from latent_sft.data.records import load_splits
from latent_sft.data.shorten import shortened
from latent_sft.errors import ConfigError, DataError
from latent_sft.experiment.workspace import Workspace
from latent_sft.train.run import train_stage

EQUATIONS = "<<16-3=13>> <<13*2=26>> <<26/2=13>> <<13+1=14>> <<14-4=10>>"


def record(cot: str, steps: tuple[str, ...] | None = None, separator: str = "\n") -> Record:
    steps = split_steps(cot, separator) if steps is None else steps
    return Record(id="r", problem="p", cot=cot, cot_answer="so 10", answer="10", steps=steps)


def cut(given: Record, rule: str, steps: int = 2) -> tuple[str, tuple[str, ...]]:
    found = shortened(given, ShortenConfig(rule=rule, steps=steps))  # type: ignore[arg-type]
    assert (found.id, found.problem, found.cot_answer, found.answer) == ("r", "p", "so 10", "10")
    return found.cot, found.steps


def test_no_rule_changes_nothing() -> None:
    given = record(EQUATIONS)
    assert shortened(given, ShortenConfig()) is given
    assert cut(record(""), "results") == ("", ())  # nothing to shorten


def test_steps_dropped_from_the_left() -> None:
    assert cut(record(EQUATIONS), "drop_left", 1)[0] == "<<13*2=26>> <<26/2=13>> <<13+1=14>> <<14-4=10>>"
    assert cut(record(EQUATIONS), "drop_left", 3) == ("<<13+1=14>> <<14-4=10>>", ("<<13+1=14>>", "<<14-4=10>>"))
    assert cut(record(EQUATIONS), "drop_left", 5) == cut(record(EQUATIONS), "drop_left", 9) == ("", ())
    assert cut(record("one\n\ntwo\nthree"), "drop_left", 1) == ("two\nthree", ("two", "three"))


def test_every_second_or_third_step_and_the_last() -> None:
    assert cut(record(EQUATIONS), "every_r", 2)[1] == ("<<13*2=26>>", "<<13+1=14>>", "<<14-4=10>>")
    assert cut(record(EQUATIONS), "every_r", 3) == ("<<26/2=13>> <<14-4=10>>", ("<<26/2=13>>", "<<14-4=10>>"))
    assert cut(record(EQUATIONS), "every_r", 5) == cut(record(EQUATIONS), "every_r", 9)
    assert cut(record(EQUATIONS), "every_r", 5) == ("<<14-4=10>>", ("<<14-4=10>>",))
    # steps that a separator ends; what stands between them stays
    assert cut(record("1 7 + 0 6 ( 1 3 ) + 0 0 5", separator="+"), "every_r") == (
        "0 6 ( 1 3 ) + 0 0 5",
        ("0 6 ( 1 3 ) +", "0 0 5"),
    )
    assert cut(record("first\nsecond\nthird"), "every_r")[0] == "second\nthird"


def test_results_only() -> None:
    assert cut(record(EQUATIONS), "results") == ("13 26 13 14 10", ("13", "26", "13", "14", "10"))
    assert cut(record("3 + 2 = 5 ; 5 * 3 = 4 ;", separator=";"), "results") == ("5 ; 4 ;", ("5 ;", "4 ;"))
    # several equations in a step, marked or not
    assert cut(record("2 <<1+1=2>> and <<2+2=4>> apples\n4 * 2 = 2 * 4 = 8"), "results") == ("2 4\n8", ("2 4", "8"))


def test_a_step_that_says_no_result_is_refused() -> None:
    for cot in ("<<1+1=2>> <<2>>", "1 + 1 = 2\nhence\n", "1 + 1 =\n2 = 2"):
        with pytest.raises(DataError, match=r"^field 'cot': the step '.*' has no result behind '='; expected one in"):
            shortened(record(cot), ShortenConfig(rule="results"))


def test_steps_that_are_not_in_the_text_are_refused() -> None:
    with pytest.raises(DataError, match=r"^field 'steps': 'b' is not in `cot` after .* \(data\.shorten needs them\)\."):
        shortened(record("b then a", steps=("a", "b")), ShortenConfig(rule="drop_left"))


@pytest.mark.parametrize(("rule", "steps", "least"), [("every_r", 1, 2), ("drop_left", 0, 1)])
def test_numbers_of_steps_out_of_range(rule: str, steps: int, least: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.shorten\.steps: got {steps}, expected an integer >= {least}"):
        ShortenConfig(rule=rule, steps=steps)  # type: ignore[arg-type]


def source(path: Path, *cots: str) -> str:
    rows = [{"problem": f"problem {i}", "cot": cot, "answer": "10"} for i, cot in enumerate(cots)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(train: str, rule: str, steps: int = 2, **settings: Any) -> DataConfig:
    shorten = ShortenConfig(rule=rule, steps=steps)  # type: ignore[arg-type]
    return DataConfig(train=train, shorten=shorten, **{"validation": train, "test": "", **settings})


def test_records_are_shortened_while_they_are_read(tmp_path: Path) -> None:
    train = source(tmp_path / "a.jsonl", EQUATIONS, "<<5+5=10>>")
    splits = load_splits(config(train, "drop_left", 4, test=train))
    for found in (splits.train, splits.validation, splits.test):
        assert [(r.cot, r.answer, r.cot_answer) for r in found] == [("<<14-4=10>>", "10", "10"), ("", "10", "10")]
    plain = load_splits(config(train, "none", test=train))
    assert [r.problem for r in plain.train] == [r.problem for r in splits.train]
    # the rule is part of what the data is made from
    made = [splits.sources, plain.sources, load_splits(config(train, "drop_left", 3, test=train)).sources]
    for split in ("train", "validation", "test"):
        assert len({sources[split] for sources in made}) == 3
    assert "shortened" not in plain.sources["train"]


def test_generated_records_are_shortened_too() -> None:
    synthetic = SyntheticConfig(num_train=20, num_validation=5, num_test=5)
    plain = load_splits(DataConfig(synthetic=synthetic))
    short = load_splits(DataConfig(synthetic=synthetic, shorten=ShortenConfig(rule="every_r", steps=9)))
    for split in ("train", "validation", "test"):
        for before, after in zip(getattr(plain, split), getattr(short, split), strict=True):
            assert (after.cot, after.steps) == (before.steps[-1], before.steps[-1:])
            assert (after.problem, after.answer) == (before.problem, before.answer)
    assert short.sources["train"].startswith(f"{plain.sources['train']}; shortened ")


def test_a_bad_row_of_train_is_named_or_skipped_and_an_evaluated_one_loses_its_cot(tmp_path: Path) -> None:
    train = source(tmp_path / "a.jsonl", EQUATIONS, "hence\n1 = 1")
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'cot': the step 'hence' has no result .*on_error=skip"):
        _ = load_splits(config(train, "results")).train
    splits = load_splits(config(train, "results", on_error="skip"))
    assert len(splits.train) == 1
    assert [r.cot for r in splits.validation] == ["13 26 13 14 10", ""]
    # a graph problem's steps say no results
    graphs = SyntheticConfig(task="prosqa", num_train=2, num_validation=1, num_test=1)
    with pytest.raises(DataError, match=r"synthetic prosqa: field 'cot': the step '.*' has no result behind '='"):
        _ = load_splits(DataConfig(synthetic=graphs, shorten=ShortenConfig(rule="results"))).train


def test_a_rule_that_applies_to_no_row_is_refused(tmp_path: Path) -> None:
    one = source(tmp_path / "a.jsonl", "1 2 + 3 4", "5 + 6")
    for rule in ("drop_left", "every_r"):
        with pytest.raises(ConfigError, match=rf"data\.shorten\.rule: got '{rule}', but no CoT of train has two steps"):
            _ = load_splits(config(one, rule)).train
    assert [r.cot for r in load_splits(config(one, "every_r", step_separator="+")).train] == ["3 4", "6"]
    several = source(tmp_path / "b.jsonl", "a\nb", "c")
    with pytest.raises(ConfigError, match=r"data\.shorten\.steps: got 2, which leaves nothing .* longest has 2 steps"):
        _ = load_splits(config(several, "drop_left", 2)).train


def test_no_other_method_learns_from_what_the_baseline_is_given(tiny_config: Any) -> None:
    settings = [
        f"{section}.enabled=false" for section in ("stage1.encoder", "stage1.decoder", "stage1.union", "stage2")
    ]
    assert tiny_config(*settings, "data.shorten.rule=results").data.shorten.rule == "results"
    message = r"data\.shorten\.rule: got 'results', expected none where more than .* a run without stage1-union, stage2"
    with pytest.raises(ConfigError, match=message):
        tiny_config(*settings[:2], "stage1.union.enabled=true", "stage2.enabled=true", "data.shorten.rule=results")


def test_a_row_that_has_no_step_left_trains_the_answer_alone(tiny_config: Any) -> None:
    """As iCoT does once so many steps are gone: the model learns to end its thought at once."""
    stages = [f"{section}.enabled=false" for section in ("stage1.encoder", "stage1.decoder", "stage1.union", "stage2")]
    data = ["data.shorten.rule=drop_left", "data.shorten.steps=3"]  # of three to five steps
    work = Workspace(tiny_config(*stages, "no_cot.enabled=false", *data))
    kept = [len(row["cot"]) for row in work.data["train"]]
    assert set(kept) == {0, 6, 12}  # six tokens per step
    step = train_stage(work.config, "cot")
    assert step.is_finished()
