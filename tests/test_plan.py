"""The plan is a shell script: right order, right quoting, honest about what is finished."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from latent_sft.config.schema import Config, DataConfig, LaunchConfig, Stage1Config, TrainConfig
from latent_sft.errors import ArtefactError
from latent_sft.plan import plan
from latent_sft.runs import Step

OFF = TrainConfig(enabled=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(name="demo", run_dir=str(tmp_path / "run"))


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def comment(text: str, step: str) -> str:
    (line,) = [line for line in text.splitlines() if f". {step}: " in line]
    return line


def test_whole_experiment_in_order(config: Config) -> None:
    assert [c[1:-1] for c in commands(plan(config, "a.yaml"))] == [
        ["train", "no-cot"],
        ["train", "cot"],
        ["train", "stage1-encoder"],
        ["train", "stage1-decoder"],
        ["train", "stage1-union"],
        ["label"],
        ["train", "stage2"],
        ["eval"],
        ["report"],
        ["export"],
    ]


def test_disabled_stages_are_left_out_and_named(config: Config) -> None:
    config = replace(config, no_cot=OFF, stage1=Stage1Config(encoder=OFF, decoder=OFF))
    text = plan(config, "a.yaml")
    assert [c[1:-1] for c in commands(text)] == [
        ["train", "cot"],
        ["train", "stage1-union"],
        ["label"],
        ["train", "stage2"],
        ["eval"],
        ["report"],
        ["export"],
    ]
    assert "# disabled: no-cot, stage1-encoder, stage1-decoder\n" in text


def test_without_stage2_nothing_needs_labels(config: Config) -> None:
    names = [c[1] for c in commands(plan(replace(config, stage2=OFF), "a.yaml"))]
    assert "label" not in names
    assert "export" not in names


def test_settings_are_repeated_and_quoted(config: Config) -> None:
    overrides = ["seed=1", "prompt.template=Solve: {problem}; $HOME 'now'"]
    for command in commands(plan(config, "my configs/a.yaml", overrides)):
        assert command[0] == "latent-sft"
        assert command[-3:] == ["my configs/a.yaml", *overrides]


def test_status_comes_from_the_manifests(config: Config) -> None:
    finish(config, "cot")
    Step(directory=Path(config.directory) / "labels", inputs={}).begin(seed=0)
    text = plan(config, "a.yaml")
    assert comment(text, "cot").endswith("[finished]")
    assert comment(text, "label").endswith("[begun, not finished]")
    assert comment(text, "stage2").endswith("[to do]")
    assert comment(text, "export").endswith("[to do]")


def finish(config: Config, *parts: str) -> None:
    step = Step(directory=Path(config.directory).joinpath(*parts), inputs={})
    step.begin(seed=0)
    step.finish()


def test_evaluation_is_finished_once_every_model_is(config: Config) -> None:
    # two trained models; the empty test source leaves the validation split
    config = replace(config, no_cot=OFF, stage1=Stage1Config(encoder=OFF, decoder=OFF, union=OFF))
    config = replace(config, data=DataConfig(test=""))
    assert comment(plan(config, "a.yaml"), "eval").endswith("[to do]")
    finish(config, "eval", "cot", "validation")
    assert comment(plan(config, "a.yaml"), "eval").endswith("[begun, not finished]")
    finish(config, "eval", "latent-sft", "validation")
    assert comment(plan(config, "a.yaml"), "eval").endswith("[finished]")


def test_export_is_finished_once_the_folder_holds_something(config: Config) -> None:
    (Path(config.directory) / "export").mkdir(parents=True)
    assert comment(plan(config, "a.yaml"), "export").endswith("[to do]")
    (Path(config.directory) / "export/config.json").touch()
    assert comment(plan(config, "a.yaml"), "export").endswith("[finished]")


def test_damaged_manifest_is_one_clear_error(config: Config) -> None:
    path = Path(config.directory) / "cot/manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"status": ')
    with pytest.raises(ArtefactError, match=r"cot/manifest\.json: damaged JSON"):
        plan(config, "a.yaml")


def test_several_processes_are_announced(config: Config) -> None:
    text = plan(replace(config, launch=LaunchConfig(nproc=8)), "a.yaml")
    # six training stages; labels, evaluation and export run in one process
    assert text.count("# starts 8 processes with torchrun") == 6
