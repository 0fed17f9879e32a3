"""An experiment is found by path first, then by the name of a preset; published recipes say what is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_cases import BASES, INSTRUCTION, QUESTION, base_tokenizer, data_overrides

from latent_sft.config import presets
from latent_sft.config.load import load_config
from latent_sft.data.prompts import build_spec, fix_date, tokenize_record
from latent_sft.data.records import load_splits
from latent_sft.errors import ConfigError
from latent_sft.experiment.graph import graph_of
from latent_sft.experiment.workspace import Experiment


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two presets, and an empty folder to stand in."""
    found = {name: tmp_path / "presets" / f"{name}.yaml" for name in ("quickstart", "prosqa")}
    monkeypatch.setattr(presets, "preset_paths", lambda: found)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_preset_by_name(installed: dict[str, Path], name: str) -> None:
    assert presets.resolve_config(name) == installed["quickstart"]


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_an_existing_file_wins(installed: dict[str, Path], name: str) -> None:
    Path(name).write_text("name: mine\n")
    assert presets.resolve_config(name) == Path(name)


def test_a_folder_of_that_name_does_not_hide_the_preset(installed: dict[str, Path]) -> None:
    Path("quickstart").mkdir()
    assert presets.resolve_config("quickstart") == installed["quickstart"]


def test_unknown_name_is_suggested(installed: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"quikstart: no such configuration file.*Did you mean 'quickstart'\?"):
        presets.resolve_config("quikstart")


def test_unknown_path_suggests_its_neighbours(installed: dict[str, Path]) -> None:
    Path("experiments").mkdir()
    Path("experiments/large.yaml").touch()
    with pytest.raises(ConfigError, match=r"Did you mean 'experiments/large.yaml'\?"):
        presets.resolve_config("experiments/larg.yaml")


def test_folder_is_refused(installed: dict[str, Path]) -> None:
    Path("runs").mkdir()
    with pytest.raises(ConfigError, match="runs: is a folder; expected a YAML file"):
        presets.resolve_config("runs")


def test_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert presets.preset_paths() == {}
    with pytest.raises(ConfigError, match="Give the path of a YAML file"):
        presets.resolve_config("quickstart")


Q = QUESTION.format(10)
# prompt, CoT, delimiter, answer and its end, as the published code writes them; «» is around what is ours instead
PUBLISHED = {
    "gsm8k_llama1b": (
        f"«<|begin_of_text|>»<|start_header_id|>user<|end_header_id|>\n\n{INSTRUCTION}\n{Q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>",
        "<<10-3=7>> <<7*2=14>>",
        "</think>",
        "«14»<|eot_id|>",
    ),
    "math_qwen7b": (
        f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n<think>",
        "Okay, 10 eggs.\n\nThen 7 are left, so $14.",
        "</think>",
        "He makes $\\boxed{14}$ dollars.<|endoftext|>",
    ),
    "kava_llama1b": (
        f"<|begin_of_text|>{Q}«<think>»",
        "<<10-3=7>>«\n»<<7*2=14>>",
        "«</think>»The answer is:",
        "14<|eot_id|>",
    ),
    "codi_llama1b": (
        f"<|begin_of_text|>{Q}«<think>»",
        "<<10-3=7>> <<7*2=14>>",
        "«</think>»The answer is: ",
        "14<|eot_id|>",
    ),
    "simcot_llama1b": (
        f"<|begin_of_text|>{Q}«<think>»",
        "<<10-3=7>> <<7*2=14>>",
        "«</think>»The answer is: ",
        "14<|eot_id|>",
    ),
    "pccot_gpt2": (f"{Q}«<think>»", "<<10-3=7>>«\n»<<7*2=14>>", "«</think>»The answer is:", "14<|endoftext|>"),
    "lotus_llama1b": (f"<|begin_of_text|>{Q}\n«<think>»", "<<10-3=7>>\n<<7*2=14>>", "«</think>»", "14<|eot_id|>"),
    "coconut_gpt2": (f"{Q}\n«<think>»", "<<10-3=7>>\n<<7*2=14>>", "«</think>»", "14<|endoftext|>"),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_writes_published_rows_as_published(recipe: str, tmp_path: Path) -> None:
    path = presets.resolve_config(recipe)
    config = load_config(path, [*data_overrides(recipe, 4, tmp_path), "data.validation_size=1", "data.on_error=raise"])
    splits, tokenizer = load_splits(config.data), base_tokenizer(BASES[recipe])
    fix_date(tokenizer, config.prompt.date)
    spec = build_spec(tokenizer, config.prompt, config.latent, len(tokenizer))
    row = tokenize_record(tokenizer, spec, {r.problem: r for r in (*splits.train, *splits.validation)}[Q])
    found = [tokenizer.decode(part) for part in (row["prompt"], row["cot"], spec.end_think_ids, row["answer"])]
    expected = [part.replace("«", "").replace("»", "") for part in PUBLISHED[recipe]]
    assert found == expected
    assert (row["reference"], len(row["step_lengths"])) == ("14", 2)
    marks, ours = path.read_text().count("deviation: "), sum(part.count("«") for part in PUBLISHED[recipe])
    assert marks >= ours, "what is not as published is marked in the recipe"
    # test rows have other fields; they are asked in the same words and graded by their own answer
    asked = tokenize_record(tokenizer, spec, splits.test[0])
    assert tokenizer.decode(asked["prompt"]) == expected[0].replace(" 10 eggs", " 2010 eggs")
    assert (asked["reference"], len(splits.test)) == ("4014", 4)
    assert {"data", "report"} < {*graph_of(Experiment(config))}


def test_the_distilled_position_is_the_token_before_the_number() -> None:
    for recipe, last in (("kava_llama1b", ":"), ("pccot_gpt2", ":"), ("codi_llama1b", " ")):
        tokenizer = base_tokenizer(BASES[recipe])
        config = load_config(presets.resolve_config(recipe))
        spec = build_spec(tokenizer, config.prompt, config.latent, len(tokenizer))
        assert tokenizer.decode(spec.end_think_ids[-1:]) == last
