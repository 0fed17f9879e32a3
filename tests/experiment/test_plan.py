"""The plan is a shell script: right order, right quoting, honest about what is finished; and what a job will need.

python tests/experiment/test_plan.py        # writes what the commands of docs/internals/plan.md print into that page
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import NAMED

from latent_sft import cli
from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config
from latent_sft.config.schema import DataConfig, LaunchConfig
from latent_sft.config.training import TrainConfig
from latent_sft.errors import ArtefactError, ConfigError, LatentSFTError
from latent_sft.experiment.graph import plan
from latent_sft.forecast import forecast
from latent_sft.methods.latent_sft import Stage1Config
from latent_sft.runs import Step

OFF, ON = TrainConfig(), TrainConfig(enabled=True)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, [*NAMED, "name=demo", f"run_dir={tmp_path / 'run'}"])


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
        ["eval", "--model", "no-cot"],
        ["eval", "--model", "cot"],
        ["eval", "--model", "stage1"],
        ["eval", "--model", "latent-sft"],
        ["report"],
        ["export", "--model", "latent-sft"],
    ]


def test_stages_that_are_off_are_left_out(config: Config) -> None:
    config = replace(config, no_cot=OFF, stage1=Stage1Config(union=ON))
    text = plan(config, "a.yaml")
    assert [c[1:-1] for c in commands(text)] == [
        ["train", "cot"],
        ["train", "stage1-union"],
        ["label"],
        ["train", "stage2"],
        ["eval", "--model", "cot"],
        ["eval", "--model", "stage1"],
        ["eval", "--model", "latent-sft"],
        ["report"],
        ["export", "--model", "latent-sft"],
    ]


def test_an_experiment_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no stage is enabled; expected one to be named, for example cot: \{\}"):
        plan(load_config(None, ["train.max_steps=5"]), "a.yaml")


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
    # what every command makes that needs it has none of its own
    assert text.splitlines()[2:4] == [
        "# 1. base: tokenizer and initial weights of a tiny model [to do]",
        "# made by the first command that needs it",
    ]


def finish(config: Config, *parts: str) -> None:
    step = Step(directory=Path(config.directory).joinpath(*parts), inputs={})
    step.begin(seed=0)
    step.finish()


def test_an_evaluation_is_finished_once_every_split_is(config: Config) -> None:
    assert comment(plan(config, "a.yaml"), "eval cot").endswith("[to do]")
    finish(config, "eval", "cot", "validation")
    assert comment(plan(config, "a.yaml"), "eval cot").endswith("[begun, not finished]")
    assert comment(plan(config, "a.yaml"), "eval no-cot").endswith("[to do]")
    finish(config, "eval", "cot", "test")
    assert comment(plan(config, "a.yaml"), "eval cot").endswith("[finished]")
    # the empty test source leaves the validation split
    config = replace(config, data=DataConfig(test=""))
    finish(config, "eval", "no-cot", "validation")
    assert comment(plan(config, "a.yaml"), "eval no-cot").endswith("[finished]")


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


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "internals" / "plan.md"
EXAMPLE = re.compile(r"```console\n\$ latent-sft (.*)\n(?s:(.*?))```")
GPUS = {"gpus": 2, "gpu_memory": 80.0}


@pytest.mark.parametrize("number", range(3))
def test_the_worked_plans_are_what_the_commands_print(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) == 3
    command, shown = examples[number]
    assert table(command) == shown, "run python tests/experiment/test_plan.py"


def table(command: str) -> str:
    """Return what a command prints after its steps."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(shlex.split(command)) == 0
    return out.getvalue().rpartition("\n\n")[2]


def test_a_model_that_is_not_here_is_one_clear_error(config: Config) -> None:
    config = replace(config, model=replace(config.model, name_or_path="nobody/no-such-model"))
    with pytest.raises(ConfigError, match=r"no config\.json of 'nobody/no-such-model' here .* model\.name_or_path=FOL"):
        forecast(config, **GPUS, count=10, example_tokens=(5, 5, 5))


def test_data_or_a_tokenizer_that_is_not_here_is_one_clear_error(config: Config) -> None:
    elsewhere = replace(config, data=DataConfig(train="nowhere.jsonl", test=""))
    with pytest.raises(LatentSFTError, match=r"nowhere\.jsonl.* give --rows N and --example-tokens PROMPT,COT,ANSWER"):
        forecast(elsewhere, **GPUS)
    folder = str(ROOT / "tests/fixtures/plans/qwen2.5-7b")
    with pytest.raises(ConfigError, match="To plan without reading data, give --rows N"):
        forecast(replace(config, model=replace(config.model, name_or_path=folder)), **GPUS)


def test_time_comes_from_what_finished_stages_measured(config: Config) -> None:
    options = {**GPUS, "count": 1000, "example_tokens": (10, 20, 2)}
    off = {"no_cot": OFF, "stage1": Stage1Config(), "stage2": OFF}
    config = replace(config, cot=TrainConfig(enabled=True, micro_batch_size=5, gradient_accumulation_steps=2), **off)
    assert "# cot: 0.5 M trained" in forecast(config, **options)
    # 35 tokens per row with three of </think>; 1000 rows in steps of 20 on two GPUs
    assert "50 steps, 3.5e+04 tokens, time unknown (--tokens-per-second)" in forecast(config, **options)
    lines = [{"train/tokens_per_second": rate} for rate in (1, 10, 100)] + [{"eval/accuracy": 0.5}]
    path = Path(config.directory) / "cot/metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "58.3 min at 10/s" in forecast(config, **options)
    assert "1.9 h at 5/s" in forecast(config, **options, tokens_per_second=5)


def test_a_global_batch_takes_as_many_steps_on_any_number_of_gpus(config: Config) -> None:
    options = {"gpu_memory": 80, "count": 1000, "example_tokens": (10, 20, 2)}
    config = replace(config, cot=TrainConfig(enabled=True, micro_batch_size=5, global_batch_size=20))
    assert all("cot: 0.5 M trained, 0.00 GiB of weights; 50 steps" in forecast(config, n, **options) for n in (1, 4))
    with pytest.raises(ConfigError, match=r"cot.global_batch_size: got 20, expected a multiple of 15 .*processes=3"):
        forecast(config, 3, **options)


def test_the_smallest_level_that_fits_is_recommended(config: Config) -> None:
    options = {"count": 1000, "example_tokens": (10, 20, 2)}
    assert "launch.zero=0 (as configured)" in forecast(config, 2, 80, **options)
    assert "no level fits every stage: use gradient_checkpointing=true" in forecast(config, 2, 0.0001, **options)
    marked = [line for line in forecast(config, 2, 80, **options).splitlines() if line.endswith("*") or "* " in line]
    assert len(marked) == 1 + 6 * 8  # the legend, and every level of six stages


def test_a_whole_model_in_16_bit_counts_its_float32_weights(config: Config) -> None:
    """16 bytes a parameter without ZeRO, as in float32, and products in 16 bit; of float16 there is no other level."""
    options = {"count": 1000, "example_tokens": (10, 20, 2)}
    off = {"no_cot": OFF, "stage1": Stage1Config(), "stage2": OFF}
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        text = forecast(replace(config, model=replace(config.model, dtype=dtype), **off), 1, 0.01, **options)
        found[dtype] = [line.split()[3:4] for line in text.splitlines() if re.match(r"# +\d  ", line)]
        assert f"{({'float32': 'no', 'bfloat16': 'bf16', 'float16': 'fp16'})[dtype]} mixed precision" in text
    assert found["float32"][0] == found["bfloat16"][0] == found["float16"][0]
    assert [len(rows) for rows in found.values()] == [8, 8, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "2"], "--gpus and --gpu-memory belong together"),
        (["--gpus", "0", "--gpu-memory", "80"], "expected numbers > 0"),
        (["--gpus", "1", "--gpu-memory", "80", "--rows", "5"], "--rows and --example-tokens belong together"),
    ],
)
def test_options_that_do_not_fit(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "quickstart", *words]) == 2
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    os.chdir(ROOT)
    PAGE.write_text(EXAMPLE.sub(lambda m: f"```console\n$ latent-sft {m[1]}\n{table(m[1])}```", PAGE.read_text()))
