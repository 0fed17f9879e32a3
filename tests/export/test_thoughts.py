"""Exports of models that think in hidden states: they run with `transformers` alone, and do what the package does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export.conftest import THOUGHTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from latent_sft.config.experiment import Config
from latent_sft.data.prompts import render_prompt
from latent_sft.errors import ArtefactError, ConfigError, ExportError
from latent_sft.export.checkpoint import export_checkpoint, export_run, generate_source
from latent_sft.inference.generate import Decoded, generate
from latent_sft.inference.show import as_table, load
from latent_sft.method.types import LatentSpec
from latent_sft.models.thoughts import load_thoughts
from latent_sft.runs import Step

REFUSED = {name: {name: 2} for name in ("num_beams", "min_latents", "max_latents", "noise_scale")}


@pytest.fixture(scope="module")
def prompts(problems: list[str], tokenizer: PreTrainedTokenizerBase, spec: LatentSpec) -> list[list[int]]:
    return [render_prompt(tokenizer, spec, problem) for problem in problems]


def decode(folder: Path, spec: LatentSpec, name: str, prompts: list[list[int]]) -> list[Decoded]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    thoughts = load_thoughts(folder / "thoughts.safetensors", THOUGHTS[name], torch.device("cpu"))
    return generate(model, spec, prompts, thinker="continuous", thoughts=thoughts)


def written(row: Decoded, spec: LatentSpec) -> list[int]:
    return [*spec.end_think_ids, *row.answer_ids, *([spec.eos_id] if row.finished else [])]


def run_alone(source: Path, work: Path, spec: LatentSpec, prompts: list[list[int]], problem: str) -> dict[str, Any]:
    """Export and run `alone.py` on it, in a process of its own that cannot import the package."""
    folder = export_checkpoint(source, work / "export")
    card = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    card[0] = card[0].replace('problem = "..."', f"problem = {problem!r}")
    request = {"prompts": prompts, "delimiter": len(spec.think_ids), "refused": REFUSED, "card": card}
    (work / "request.json").write_text(json.dumps({**request, "continuous": True}))
    run = subprocess.run(
        [sys.executable, "-I", Path(__file__).with_name("alone.py"), folder, work / "request.json"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["codi", "kava"])
def test_the_folder_alone_decodes_as_the_package(
    name: str,
    thinking: dict[str, Path],
    tmp_path: Path,
    spec: LatentSpec,
    prompts: list[list[int]],
    problems: list[str],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    results = run_alone(thinking[name], tmp_path, spec, prompts, problems[0])
    expected = decode(thinking[name], spec, name, prompts)
    assert len({tuple(row.answer_ids) for row in expected}) > 2 and {row.finished for row in expected} == {True, False}
    width = max(len(written(row, spec)) for row in expected)
    for side in ("left", "right"):
        found = results[side]
        tails = [[*written(row, spec), *[spec.pad_id] * (width - len(written(row, spec)))] for row in expected]
        assert found["sequences"] == [[*prompt, *tail] for prompt, tail in zip(found["inputs"], tails, strict=True)]
        assert results[f"{side}, loaded with trust"] == found["sequences"]
        for latent, row in zip(found["latents"], expected, strict=True):
            assert latent["ids"] == row.latent_ids.tolist()
            torch.testing.assert_close(torch.tensor(latent["weights"]), row.latent_weights)
        torch.testing.assert_close(torch.tensor(found["embeds"]), torch.stack([d.latent_embeds for d in expected]))
    assert results["positional"] == results["closed"] == results["both ways"]
    (short,) = decode(thinking[name], dataclasses.replace(spec, max_answer_tokens=1), name, prompts[:1])
    assert results["limits"] == [[*prompts[0], *written(short, spec)]]
    assert results["sampled"][0] == results["sampled"][1]
    assert results["errors"] == {name: f"ValueError: {name}: not available in latent decoding." for name in REFUSED}
    answer, latents = results["card"]
    assert answer == tokenizer.decode([*spec.think_ids, *written(expected[0], spec)]) + "\n"
    tops = [row.split("'")[1] for row in latents.splitlines()]
    assert tops == [tokenizer.decode([ids[0]]) for ids in expected[0].latent_ids.tolist()]


@pytest.mark.parametrize("name", THOUGHTS)
def test_the_folder_is_complete_and_can_be_exported_again(name: str, thinking: dict[str, Path], tmp_path: Path) -> None:
    out = export_checkpoint(thinking[name], tmp_path / "out")
    for file in ("thoughts.safetensors", "thinker.json", "latent_spec.json", "model.safetensors"):
        assert (out / file).read_bytes() == (thinking[name] / file).read_bytes()
    again = export_checkpoint(out, tmp_path / "again")
    code = "custom_generate/generate.py"
    assert (again / code).read_bytes() == (out / code).read_bytes()
    assert "deepspeed" not in (out / code).read_text()


@pytest.mark.parametrize("name", THOUGHTS)
def test_the_bundled_code_decodes_every_way_of_thinking(
    name: str,
    thinking: dict[str, Path],
    spec: LatentSpec,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = export_checkpoint(thinking[name], tmp_path / "out")
    module = type(sys)("exported_thoughts")
    monkeypatch.setitem(sys.modules, "exported_thoughts", module)
    exec((out / "custom_generate" / "generate.py").read_text(), module.__dict__)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = module.generate(torch.tensor(prompts[:1]), model=model, return_latents=True)
    (row,) = decode(thinking[name], spec, name, prompts[:1])
    assert found.sequences.tolist() == [[*prompts[0], *written(row, spec)]]
    torch.testing.assert_close(found.latent_embeds[0], row.latent_embeds)
    model.name_or_path = str(tmp_path)
    with pytest.raises(OSError, match=r"thoughts\.safetensors: not found beside the model"):
        module.generate(torch.tensor(prompts[:1]), model=model)


def test_code_of_mixes_of_tokens_reads_no_such_file(spec: LatentSpec) -> None:
    assert "HOW = None" in generate_source(spec)
    how = "HOW = ThoughtSpec(num_latents=5, iterations=2, projection=True, added=False)"
    assert how in generate_source(spec, THOUGHTS["kava"])


def halve(path: Path) -> None:
    save_file({key: value[:8] for key, value in load_file(path).items()}, path)


def without_projection(path: Path) -> None:
    save_file({"placeholder": load_file(path)["placeholder"]}, path)


def other_size(path: Path) -> None:
    save_file({"placeholder": torch.zeros(9)}, path)


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("kava", "thoughts.safetensors", Path.unlink, r"thoughts\.safetensors: missing; a model that thinks in hidden"),
        (
            "kava",
            "thoughts.safetensors",
            lambda p: p.write_bytes(p.read_bytes()[:-9]),
            r"thoughts\.safetensors: damaged",
        ),
        ("kava", "thoughts.safetensors", halve, r"thoughts\.safetensors: damaged, or of another model"),
        ("kava", "thoughts.safetensors", without_projection, r"thoughts\.safetensors: damaged, or of another model"),
        ("coconut", "thoughts.safetensors", other_size, r"is for hidden states of 9 numbers, the model has 16"),
        ("kava", "model.safetensors", Path.unlink, r"no \*\.safetensors"),
        ("kava", "thinker.json", lambda p: p.write_text('{"thinker": "continuous"}'), r"thinker\.json: unusable"),
        ("kava", "thinker.json", lambda p: p.write_text('{"thinker": "none"}'), r"does not think in latents .*'none'"),
    ],
)
def test_a_damaged_source_is_one_clear_error(
    name: str,
    file: str,
    damage: Callable[[Path], object],
    message: str,
    thinking: dict[str, Path],
    tmp_path: Path,
) -> None:
    source = Path(shutil.copytree(thinking[name], tmp_path / "source"))
    damage(source / file)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def finished_run(folder: Path, run: Path, stage: str) -> Config:
    step = Step(directory=run / stage, inputs={})
    step.begin(seed=3)
    shutil.copytree(folder, step.final)
    step.finish(train_seconds=1.0, train_rows=1234)
    return Config(name="demo", run_dir=str(run), seed=3)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("coconut", "Coconut ([arXiv 2412.06769]"),
        ("codi", "thinks in 3 latents: hidden states of its last layer, fed back through a small network as input"),
        ("kava", "all at once, 2 times over (Jacobi iterations)."),
    ],
)
def test_a_stage_is_exported_with_its_facts(stage: str, says: str, thinking: dict[str, Path], tmp_path: Path) -> None:
    config = finished_run(thinking[stage], tmp_path, stage)
    trained = json.loads((tmp_path / stage / "manifest.json").read_text())["fingerprint"]
    (tmp_path / "eval" / stage / "test").mkdir(parents=True)
    inputs = {"model": trained, "eval": {"sample": True, "temperature": 0.6, "top_p": 0.95}}
    (tmp_path / "eval" / stage / "test" / "manifest.json").write_text(json.dumps({"inputs": inputs}))
    summary = {"accuracy": 0.5, "num_examples": 10, "reasoning_steps_mean": 4.0, "grader": "numeric"}
    (tmp_path / "eval" / stage / "test.json").write_text(json.dumps({"summary": summary, "problems": []}))
    out = export_run(config, stage, tmp_path / "export")
    card = (out / "README.md").read_text()
    assert says in card and f"\n- {stage}\n" in card
    assert "| test | 50.0 % | 10 | 4.0 | numeric | sampled, temperature 0.6, top-p 0.95 |" in card
    assert "superposition" not in card and "min_latents" not in card
    with pytest.raises(ArtefactError, match="not finished yet"):
        export_run(config, "pccot", tmp_path / "other")


def test_pause_tokens_are_called_so(thinking: dict[str, Path], tmp_path: Path) -> None:
    card = (export_checkpoint(thinking["pauses"], tmp_path / "out") / "README.md").read_text()
    assert "reads 3 pause tokens, one trained embedding fed 3 times, in the pass that reads the prompt." in card


@pytest.mark.parametrize("exported", [False, True])
def test_one_problem_is_shown_with_what_its_latents_say(
    exported: bool, thinking: dict[str, Path], tmp_path: Path, spec: LatentSpec, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = export_checkpoint(thinking["kava"], tmp_path / "out") if exported else thinking["kava"]
    (row,) = decode(thinking["kava"], spec, "kava", [render_prompt(tokenizer, spec, "2 + 3")])
    shown = load(folder).generate("2 + 3", top=2)
    assert (shown.thinker, shown.num_steps, shown.thought) == ("continuous", 5, "")
    assert shown.answer == tokenizer.decode(row.answer_ids).strip()
    assert [latent.tokens[0][0] for latent in shown.latents] == [tokenizer.decode([i]) for i in row.thought_ids]
    assert all(len(latent.tokens) == 2 for latent in shown.latents)
    assert "latents, as the LM head reads them: 5" in as_table(shown)


def test_what_cannot_be_shown_is_one_clear_error(thinking: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="always thinks in 5 latents, and without noise; max_latents cannot be set"):
        load(thinking["kava"]).generate("2 + 3", max_latents=3)
    folder = Path(shutil.copytree(thinking["kava"], tmp_path / "copy"))
    (folder / "thoughts.safetensors").write_bytes(b"short")
    with pytest.raises(ArtefactError, match=r"thoughts\.safetensors: damaged"):
        load(folder)
    (folder / "thoughts.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"thoughts\.safetensors is missing"):
        load(folder)
