"""Record the golden trajectories: losses and gradient norms of a tiny fixed run of every stage.

    python -m tests.golden.record                 writes tests/golden/trajectories.json; refuses a modified tree
    python -m tests.golden.record RUN [key=value] trains every stage into RUN, in this process or as a rank of torchrun

Record again only where a change is meant to alter results, and say so in that commit.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from latent_sft.config.load import load_config
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.methods import SECTIONS, STAGES
from latent_sft.runs import environment, write_json
from latent_sft.train.run import train_stage

GOLDEN = Path(__file__).parent / "trajectories.json"
TAGS = ("loss", "grad_norm")
# ten steps of eight examples, into the second epoch; written out, so that no default of the package moves the record
CONFIG = [
    "data.synthetic.num_train=64",
    "data.synthetic.num_validation=8",
    "data.synthetic.num_test=8",
    "model.tiny.hidden_size=16",
    "model.tiny.intermediate_size=32",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=2",
    "latent.top_k=5",
    "latent.max_latents=16",
    "latent.max_answer_tokens=4",
    "labels.dtype=float32",
    "eval.max_cot_tokens=16",
    *(
        f"{section}.{setting}"
        for section in SECTIONS.values()
        for setting in (
            "max_steps=10",
            "eval_every=10",
            "eval_examples=1",
            "micro_batch_size=8",
            "learning_rate=3e-3",
            "warmup_ratio=0.2",
            "log_every=1",
        )
    ),
]
# a stage that needs what those rows lack has data, and a run, of its own
OWN_DATA = {"cot2": ["data.synthetic.task=mnns", "model.tiny.tokenizer=space", "data.limit_train=64"]}


def of_every_stage(*settings: str) -> list[str]:
    """Return the settings, such as `gradient_accumulation_steps=4`, for each stage."""
    return [f"{section}.{setting}" for section in SECTIONS.values() for setting in settings]


def trajectories(run_dir: Path, *overrides: str) -> dict[str, dict[str, list[float]]]:
    """Train every stage and return stage -> `loss`, `grad_norm` -> one number per step."""
    torch.set_num_threads(1)
    config = load_config(None, [*CONFIG, *overrides, f"run_dir={run_dir}"])
    work = Workspace(config)
    for name in STAGES:
        if name == "stage2":
            make_labels(config, work)
        if name in OWN_DATA:
            own = [*CONFIG, *overrides, *OWN_DATA[name], f"run_dir={run_of(run_dir, name)}"]
            train_stage(load_config(None, own), name)
        else:
            train_stage(config, name, work)
    return {name: read(run_of(run_dir, name) / name) for name in STAGES}


def run_of(run_dir: Path, name: str) -> Path:
    """Return the run directory that a stage is trained in."""
    return run_dir / "own" if name in OWN_DATA else run_dir


def read(folder: Path) -> dict[str, list[float]]:
    """Return the trajectory that a stage has logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {tag: [line[f"train/{tag}"] for line in lines if f"train/{tag}" in line] for tag in TAGS}


def main(argv: list[str]) -> int:
    """Record, or train into the folder given."""
    logging.getLogger("latent_sft").setLevel(logging.INFO)
    if argv:
        trajectories(Path(argv[0]), *argv[1:])
        return 0
    here = Path(__file__).resolve().parent
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    if changed.stdout.strip():
        sys.stderr.write("refused: the tree is modified, so nobody could find the code of this record; commit first\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = trajectories(Path(folder) / "run")
    write_json(GOLDEN, {**environment(), "trajectories": found})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
