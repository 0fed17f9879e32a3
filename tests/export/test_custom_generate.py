"""An exported folder runs with `transformers` alone and does exactly what the package does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from latent_sft.data.prompts import render_prompt
from latent_sft.export.checkpoint import export_checkpoint, generate_source
from latent_sft.inference.generate import Decoded, generate
from latent_sft.method.types import LatentSpec

REFUSED = {
    "num_beams": {"num_beams": 2},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": 1},
    "a typo": {"max_new_token": 1},
    "input_ids": {"input_ids": None},
}


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def prompts(problems: list[str], tokenizer: PreTrainedTokenizerBase, spec: LatentSpec) -> list[list[int]]:
    return [render_prompt(tokenizer, spec, problem) for problem in problems]


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, spec: LatentSpec, prompts: list[list[int]]) -> list[Decoded]:
    rows = generate(model, spec, prompts, thinker="latent")
    # the comparison only means something where rows differ in everything
    assert len({row.num_steps for row in rows}) >= 4
    assert {row.finished for row in rows} == {True, False}
    return rows


@pytest.fixture(scope="module")
def results(
    checkpoint: Path,
    spec: LatentSpec,
    prompts: list[list[int]],
    problems: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Run `alone.py` on the export, in a process of its own that cannot import the package."""
    work = tmp_path_factory.mktemp("alone")
    folder = export_checkpoint(checkpoint, work / "export")
    card = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len(card) == 2
    card[0] = card[0].replace('problem = "..."', f"problem = {problems[0]!r}")
    request = {
        "prompts": prompts,
        "delimiter": len(spec.think_ids),
        "refused": REFUSED,
        "card": card,
        "continuous": False,
    }
    (work / "request.json").write_text(json.dumps(request))
    run = subprocess.run(
        [sys.executable, "-I", Path(__file__).with_name("alone.py"), folder, work / "request.json"],
        cwd=folder,  # the card says folder = "."
        env={"PATH": os.environ["PATH"], "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def written(row: Decoded, spec: LatentSpec) -> list[int]:
    return [*spec.end_think_ids, *row.answer_ids, *([spec.eos_id] if row.finished else [])]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_with_padding_on_either_side_decode_as_in_the_package(
    side: str, results: dict[str, Any], expected: list[Decoded], spec: LatentSpec
) -> None:
    found = results[side]
    width = max(len(written(row, spec)) for row in expected)
    for prompt, sequence, latent, row in zip(
        found["inputs"], found["sequences"], found["latents"], expected, strict=True
    ):
        tail = written(row, spec)
        assert sequence == [*prompt, *tail, *[spec.pad_id] * (width - len(tail))]
        assert latent["ids"] == row.latent_ids.tolist()
        torch.testing.assert_close(
            torch.tensor(latent["weights"]).reshape(-1, spec.top_k), row.latent_weights.reshape(-1, spec.top_k)
        )
    assert results[f"{side}, loaded with trust"] == found["sequences"]


def test_ids_may_be_positional_and_both_ways_of_loading_may_meet(
    results: dict[str, Any], prompts: list[list[int]], model: PreTrainedModel, spec: LatentSpec
) -> None:
    row = generate(model, spec, prompts[:1], thinker="latent")[0]
    assert results["positional"] == [[*prompts[0], *written(row, spec)]]
    assert results["both ways"] == results["positional"]


def test_a_missing_delimiter_is_added_after_the_prompt(results: dict[str, Any]) -> None:
    # the same ids in the same order: the delimiter counts as written instead of given
    assert results["closed"] == results["positional"]


def test_arguments_replace_the_spec(
    results: dict[str, Any], prompts: list[list[int]], model: PreTrainedModel, spec: LatentSpec
) -> None:
    changed = dataclasses.replace(spec, min_latents=3, max_latents=3, max_answer_tokens=1)
    row = generate(model, changed, prompts[:1], thinker="latent")[0]
    assert results["limits"] == [[*prompts[0], *written(row, changed)]]


def test_noise_and_sampling_follow_the_global_seed(results: dict[str, Any]) -> None:
    first, again, other = results["noise"]
    assert first == again
    assert first != other
    samples = results["sampled"]
    assert samples[0] == samples[1]
    assert len({json.dumps(sample) for sample in samples}) > 1


def test_arguments_that_mean_nothing_here_are_refused(results: dict[str, Any]) -> None:
    assert results["errors"] == {
        "num_beams": "ValueError: num_beams: not available in latent decoding.",
        "prefix_allowed_tokens_fn": "ValueError: prefix_allowed_tokens_fn: not available in latent decoding.",
        "a typo": "ValueError: max_new_token: not available in latent decoding.",
        "input_ids": "ValueError: input_ids: expected token ids of shape [batch, length].",
    }


def test_code_does_not_run_without_trust(results: dict[str, Any]) -> None:
    assert results["untrusted"] == "ValueError"


def test_a_model_is_not_loaded_without_trust(results: dict[str, Any]) -> None:
    """It would write plain tokens, and nobody would know."""
    assert "contains custom code which must be executed to correctly load the model" in results["loaded without trust"]
    assert "trust_remote_code=True" in results["loaded without trust"]


def test_what_transformers_saves_thinks_in_latents_too(results: dict[str, Any]) -> None:
    assert results["saved"] == [results["positional"]] * 2
    exported, saved = results["saved files"]
    assert saved == exported


def test_the_code_of_the_card_runs_as_written(
    results: dict[str, Any], expected: list[Decoded], tokenizer: PreTrainedTokenizerBase, spec: LatentSpec
) -> None:
    answer, latents = results["card"]
    assert answer == tokenizer.decode([*spec.think_ids, *written(expected[0], spec)]) + "\n"
    tops = [row.split("'")[1] for row in latents.splitlines()]
    assert tops == [tokenizer.decode([ids[0]]) for ids in expected[0].latent_ids.tolist()]


def test_another_model_is_refused(spec: LatentSpec, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("exported")
    monkeypatch.setitem(sys.modules, "exported", module)
    exec(generate_source(dataclasses.replace(spec, vocab_size=17)), module.__dict__)
    with pytest.raises(ValueError, match="a model of 17 vocabulary entries, not 16"):
        module.generate(torch.tensor([[1]]), model=model)
