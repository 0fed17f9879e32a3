"""What `import latent_sft` offers, on a checkpoint of a random model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import latent_sft
from latent_sft.config.schema import LatentConfig, PromptConfig, TinyModelConfig
from latent_sft.data.prompts import build_spec
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.experiment.run import run_experiment
from latent_sft.method.types import SPEC_FILE
from latent_sft.models.load import build_tiny, save_lm
from latent_sft.models.tiny_tokenizer import build_tokenizer
from latent_sft.train.run import train_stage

PROBLEMS = ["2 + 3", "4 + 4 + 1", "7"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer(["0 1 2 3 4 5 6 7 8 9 +"], TinyModelConfig(), PromptConfig())
    tiny = TinyModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32)
    folder = tmp_path_factory.mktemp("run") / "final"
    save_lm(build_tiny(tiny, tokenizer, seed=0), folder, tokenizer)
    latent = LatentConfig(top_k=4, min_latents=2, max_latents=3, max_answer_tokens=5)
    (folder / SPEC_FILE).write_text(json.dumps(build_spec(tokenizer, PromptConfig(), latent, len(tokenizer)).to_dict()))
    return folder


@pytest.fixture(scope="module")
def reasoner(checkpoint: Path) -> latent_sft.Reasoner:
    return latent_sft.load(checkpoint)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, latent_sft\n"
        "heavy = {'torch', 'transformers', 'datasets', 'omegaconf', 'numpy'}\n"
        "assert {'load', 'run', '__version__'} <= set(dir(latent_sft))\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "latent_sft.LatentSpec\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", latent_sft.__all__)
def test_every_name_is_there_with_a_docstring(name: str) -> None:
    assert getattr(latent_sft, name).__doc__


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'latent_sft' has no attribute 'lod'"):
        _ = latent_sft.lod


def test_a_list_is_solved_as_each_of_its_problems(reasoner: latent_sft.Reasoner) -> None:
    together = reasoner.generate(PROBLEMS, batch_size=2)
    assert [solution.problem for solution in together] == PROBLEMS
    for problem, solution in zip(PROBLEMS, together, strict=True):
        alone = reasoner.generate(problem)
        assert (alone.answer, alone.num_steps) == (solution.answer, solution.num_steps)
        assert len(alone.latents) == alone.num_steps
    assert reasoner.generate([]) == []


def test_latents_come_as_text_and_as_tensors(reasoner: latent_sft.Reasoner) -> None:
    solution = reasoner.generate("2 + 3", top=4)
    assert isinstance(solution.superposition, latent_sft.Superposition)
    ids, weights = solution.superposition
    assert ids.shape == weights.shape == (solution.num_steps, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(solution.num_steps))
    for latent, row in zip(solution.latents, ids, strict=True):
        assert [text for text, _ in latent.tokens] == [reasoner.tokenizer.decode([i]) for i in row.tolist()]
    assert "superposition" not in json.loads(solution.to_json())


def test_limits_replace_those_of_training_for_one_call(reasoner: latent_sft.Reasoner) -> None:
    assert reasoner.generate("2 + 3", min_latents=1, max_latents=1).num_steps == 1
    assert reasoner.generate("2 + 3").num_steps >= reasoner.spec.min_latents == 2


@pytest.mark.parametrize(
    ("problems", "options", "message"),
    [
        ("2 + 3", {"max_latent": 3}, r"generate: unknown option 'max_latent'\. Did you mean 'max_latents'\?"),
        ("2 + 3", {"max_latents": 1}, r"latent\.min_latents: got 2, expected 0 to max_latents=1"),
        (5, {}, "generate: got 5, expected the text of a problem, or a list of texts"),
        (["2", 3], {}, r"generate: got \['2', 3\], expected"),
    ],
)
def test_what_cannot_be_generated(reasoner: latent_sft.Reasoner, problems: object, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reasoner.generate(problems, **options)


def test_what_cannot_be_loaded(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"there is no latent_spec\.json\. Expected an exported folder"):
        latent_sft.load(tmp_path)
    encoder = Path(shutil.copytree(checkpoint, tmp_path / "decoder"))
    (encoder / "thinker.json").write_text('{"thinker": "oracle"}')
    with pytest.raises(ArtefactError, match=r"decoder: its thoughts are made from the reference CoT \('oracle'\)"):
        latent_sft.load(encoder)


def test_presets_and_overrides() -> None:
    config = latent_sft.load_config("quickstart", ["seed=7"])
    assert (config.name, config.seed) == ("quickstart", 7)


def test_stages_and_comparisons_are_refused_by_name(tmp_path: Path) -> None:
    config = latent_sft.load_config("quickstart", [f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"unknown stage 'stge2'\. Did you mean 'stage2'\?"):
        latent_sft.train_stage(config, "stge2")
    with pytest.raises(ConfigError, match="run_comparison runs a comparison"):
        latent_sft.run(latent_sft.load_config("compare_arithmetic", [f"run_dir={tmp_path}"]))
    assert not list(tmp_path.iterdir())


def test_stages_and_experiments_are_those_of_the_command() -> None:
    assert latent_sft.train_stage is train_stage
    assert latent_sft.run is run_experiment
