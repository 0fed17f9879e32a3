"""Every published recipe as a user starts it, from rows of the published schema to an export that answers.

Two steps per stage on a model of two layers. Precision, adapters, prompts, formats and methods are those of the recipe;
only sizes, steps and paths are set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_cases import BASES, QUESTION, data_overrides, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from latent_sft.config.load import load_config
from latent_sft.config.presets import resolve_config
from latent_sft.data.prompts import render_prompt
from latent_sft.inference.show import read_spec
from latent_sft.methods import MODELS, STAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EXPORTED = {"gsm8k_llama1b": "latent-sft", "math_qwen7b": "latent-sft", "kava_llama1b": "kava", "codi_llama1b": "codi",
            "pccot_gpt2": "pccot", "coconut_gpt2": "coconut", "simcot_llama1b": "simcot-codi",
            "lotus_llama1b": "lotus", "spans_llama1b": "latent-spans"}  # fmt: skip
SIZES = [
    "data.validation_size=3",
    "labels.batch_size=4",
    "labels.shard_size=4",
    "eval.batch_size=4",
    "eval.num_samples=1",
    "eval.max_cot_tokens=8",
    "latent.max_latents=8",
    "latent.max_answer_tokens=8",
    *(
        f"train.{setting}"
        for setting in (
            "max_steps=2",
            "log_every=1",
            "eval_every=1",
            "eval_examples=2",
            "micro_batch_size=2",
            "gradient_accumulation_steps=1",
            "global_batch_size=4",
        )
    ),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {base: save_base(base, folder / base) for base in sorted(set(BASES.values()))}


def latent_sft(*words: str) -> None:
    command = [sys.executable, "-m", "latent_sft.cli", *words]
    job = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert job.returncode == 0, f"{' '.join(words)}\n{job.stderr[-4000:]}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("recipe", EXPORTED)
def test_a_recipe_runs_to_its_export(recipe: str, nproc: int, bases: dict[str, Path], tmp_path: Path) -> None:
    run, model = tmp_path / "run", EXPORTED[recipe]
    settings = [
        *data_overrides(recipe, 12, tmp_path),
        *SIZES,
        f"run_dir={run}",
        f"model.name_or_path={bases[BASES[recipe]]}",
        f"launch.nproc={nproc}",
        f"labels.num_processes={nproc}",
    ]
    latent_sft("run", recipe, *settings)
    latent_sft("export", recipe, *settings, "--model", model, "--out", str(tmp_path / "export"))

    config = load_config(resolve_config(recipe), settings)
    trained = [name for name in STAGES if config.stage(name).enabled]
    assert trained[-1] == MODELS[model].stages[-1]
    for name in trained:
        manifest = read(run / name / "manifest.json")
        assert manifest["status"] == "finished"
        lines = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert losses and torch.tensor(losses).isfinite().all()
    assert not list((run / "data").rglob("skipped.jsonl")), "rows of the published schema were left out"
    summary = read(run / "summary.json")
    models = [name for name, row in summary.items() if isinstance(row, dict)]
    assert models and all(summary[name]["num_examples"] == 12 for name in models)
    for name in models:
        assert {path.name for path in (run / "eval" / name).glob("*.json")} == {"validation.json", "test.json"}
    assert (run / "report" / "report.html").is_file()

    # the export thinks in the caller's own process, from the prompt that it was trained on
    out = tmp_path / "export"
    tokenizer = AutoTokenizer.from_pretrained(out)
    reasoner = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    spec = read_spec(out)
    prompt = render_prompt(tokenizer, spec, QUESTION.format(5000))
    output = reasoner.generate(torch.tensor([prompt]), max_new_tokens=4)
    assert output.shape[1] > len(prompt)
