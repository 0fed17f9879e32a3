"""Training proofs: experiments that the package runs by itself, some minutes a call, from where the last one ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eval.gpu.parts import MOST_MINUTES, ROOT, Case, Result, Settings
from latent_sft.errors import STOPPED
from latent_sft.methods import SECTIONS
from latent_sft.runs import read_json

HERE = Path(__file__).parent
# a checkpoint is written when it is told to stop
MINUTES_TO_STOP = 1.0
FIVE = ["data.synthetic.num_digits=5", "latent.max_latents=96", "latent.max_answer_tokens=12", "eval.max_cot_tokens=96"]
FIVE += ["icot.remove_per_epoch=12", "icot.train.max_steps=12000"]
TINY = [
    *("data.synthetic.num_train=32", "data.synthetic.num_validation=4", "data.synthetic.num_test=4"),
    *("model.tiny.hidden_size=16", "model.tiny.num_layers=1", "model.tiny.num_heads=2", "model.tiny.num_kv_heads=2"),
    *("model.tiny.intermediate_size=16", "latent.max_latents=4", "eval.max_cot_tokens=4", "labels.shard_size=32"),
]


def cases(settings: Settings, experiment: str) -> Sequence[Case]:
    """Return the one case of an experiment: `4x4`, `5x5` or `prosqa`."""
    return [Case(experiment, partial(_case, settings, experiment), 2 * MINUTES_TO_STOP)]


def _case(settings: Settings, experiment: str) -> Result:
    folder = settings.out / f"train-{experiment}"
    file = HERE / ("graphs.yaml" if experiment == "prosqa" else "multiplication.yaml")
    overrides = [*(FIVE if experiment == "5x5" else []), f"name=gpu-{experiment}", f"run_dir={folder}"]
    if settings.tiny:
        short = ("max_steps=1", "micro_batch_size=8", "eval_every=1", "eval_examples=2", "num_workers=0")
        overrides += [*TINY, *(f"{section}.{setting}" for section in _sections(file) for setting in short)]
    minutes = min(MOST_MINUTES, settings.minutes) - MINUTES_TO_STOP
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "console.log", "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "latent_sft.cli", "run", str(file), *overrides]
        environment = {**os.environ, "TQDM_DISABLE": "1"} | (
            {"CUDA_VISIBLE_DEVICES": ""} if settings.device == "cpu" else {}
        )
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT) as child:
            try:
                status = child.wait(timeout=60 * minutes)
            except subprocess.TimeoutExpired:
                child.terminate()
                status = child.wait()
    if status not in (0, STOPPED):
        raise RuntimeError(f"status {status}: {(folder / 'console.log').read_text(encoding='utf-8')[-1500:]}")
    found = {path.parent.name: read_json(path)["summary"] for path in sorted(folder.glob("eval/*/test.json"))}
    accuracies = {f"{model}, accuracy": summary["accuracy"] for model, summary in found.items()}
    return {"finished": status == 0, **accuracies}


def _sections(file: Path) -> list[str]:
    named = file.read_text(encoding="utf-8")
    return [section for section in SECTIONS.values() if f"\n{section.split('.')[0]}: " in named and section != "no_cot"]
