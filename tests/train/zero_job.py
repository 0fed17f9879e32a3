"""Started by torchrun from test_zero.py: trains stages under ZeRO 1, 2 and 3 on two processes, in one job.

zero_job.py FOLDER [hang | KIND of HALVES]
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from train.own_latents import with_own_latents

import latent_sft.train.loop as loop
from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import processes
from latent_sft.methods import SECTIONS, STAGES
from latent_sft.train import share
from latent_sft.train.run import train_stage

PHASES = ("stage1-encoder", "stage1-decoder", "stage1-union")
THOUGHTS = ("kava", "coconut")
UNION = ["stage1.encoder.enabled=false", "stage1.decoder.enabled=false"]
# stage 1 as two adapters on one model, with recomputed activations; ZeRO-3 cuts up every one of its parameters
SHARED = [
    "model.lora.rank=2",
    "stage1.share_backbone=true",
    *UNION,
    "stage1.union.gradient_checkpointing=true",
]
RATES = [f"{section}.learning_rate=1e-3" for section in SECTIONS.values()]
SHORT = [
    f"{s}.{v}" for s in SECTIONS.values() for v in ("max_steps=3", "eval_every=3", "save_every=2", "eval_examples=5")
]


class Killed(BaseException):
    """Nobody catches it, like a signal."""


# a model in 16 bit trained as a whole, and adapters beside it, with autocast too
_HALF = ["model.dtype=bfloat16"]
_ADAPTERS = [*_HALF, "model.lora.rank=2", "sim_cot.decoder=lora"]  # whole, it would have to be float32
HALVES = {
    "whole": _HALF,
    "adapters": _ADAPTERS,
    "autocast": [*_ADAPTERS, *(f"{section}.mixed_precision=bf16" for section in SECTIONS.values())],
}


def config_of(folder: Path, name: str, zero: int, *more: str, shared: bool = False) -> Config:
    """Return the experiment: 8 examples a step in one process, or 2 x 2 x 2 micro-batches with ZeRO."""
    # the model is so small that DeepSpeed would leave all of it in every process
    (folder / "extra.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    overrides = [*TINY, *SHORT, *RATES, "data.synthetic.num_train=60", f"run_dir={folder / name}"]
    overrides += [*(SHARED if shared else []), *more]
    if zero:
        overrides += [
            f"{s}.{v}" for s in SECTIONS.values() for v in ("micro_batch_size=2", "gradient_accumulation_steps=2")
        ]
        overrides += ["launch.nproc=2", f"launch.zero={zero}", f"launch.deepspeed={folder / 'extra.json'}"]
    return load_config(None, overrides)


def killed_at(step: int, config: Config, stage: str) -> None:
    """Train and end as a killed process would, after a step and before its checkpoint."""
    original = loop.StageProgress.advance

    def stop(self, state):
        original(self, state)
        if state.global_step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.StageProgress, "advance", stop)
        train_stage(config, stage)


def train_all(config: Config, *, kill: bool) -> None:
    """Train every stage of the method; `kill`: the last one is ended once and goes on from a checkpoint."""
    for stage in PHASES:
        train_stage(config, stage)
    make_labels(config)
    if kill:
        killed_at(3, config, "stage2")
    for stage in ("stage2", *(THOUGHTS if config.launch.zero in (0, 3) else ())):
        train_stage(config, stage)


def train_with_own_latents(config: Config) -> None:
    """Train stage 2 on latents of its own, of which the processes decode unequally many."""
    train_stage(config, "stage1-union")
    make_labels(config)
    with with_own_latents():
        train_stage(config, "stage2")


def count_decoded(path: Path) -> None:
    """Write down how many rows this process decodes at each validation."""
    original = share.solve

    def solve(thinker, spec, rows, **options):
        with path.open("a") as handle:
            handle.write(f"{len(rows)}\n")
        return original(thinker, spec, rows, **options)

    share.solve = solve


def main(folder: Path) -> None:
    """Train everything at every level."""
    for zero in (1, 2, 3):
        train_all(config_of(folder, f"zero{zero}", zero), kill=True)
    train_stage(config_of(folder, "zero3-shared", 3, shared=True), "stage1-union")
    train_with_own_latents(config_of(folder, "zero3-own", 3, *UNION))
    count_decoded(folder / f"decoded-{processes().process_index}.txt")
    # the second process thinks for longer, and the first one has to go on with it
    longer = f"eval.max_cot_tokens={8 + 24 * processes().process_index}"
    train_stage(config_of(folder, "zero3-uneven", 3, longer), "cot")
    for zero, kind in ((1, "adapters"), (2, "autocast"), (3, "adapters")):
        train_stage(config_of(folder, f"zero{zero}-halves", zero, *HALVES[kind]), "kava")


def halves(folder: Path, kind: str) -> None:
    """Train every stage at every level with a model in 16 bit."""
    short = [f"{section}.{setting}" for section in SECTIONS.values() for setting in ("max_steps=1", "eval_every=1")]
    for zero in (0, 1, 2, 3):
        config = config_of(folder, f"{kind}{zero}", zero, *short, *HALVES[kind])
        for stage in STAGES:
            if stage == "cot2":  # its rows need mixtures
                own = ("data.synthetic.task=mnns", "model.tiny.tokenizer=space", "data.limit_train=64")
                train_stage(config_of(folder, f"{kind}{zero}-own", zero, *short, *HALVES[kind], *own), stage)
                continue
            if stage == "stage2":
                make_labels(config)
            train_stage(config, stage)


def hang(folder: Path) -> None:
    """Let the second process sleep after its second step, with a timeout of six seconds."""
    original = loop.StageProgress.advance

    def sleep(self, state):
        original(self, state)
        if state.global_step == 2 and processes().process_index == 1:
            time.sleep(600)

    loop.StageProgress.advance = sleep
    config = config_of(folder, "hang", 2)
    train_stage(dataclasses.replace(config, launch=dataclasses.replace(config.launch, timeout_minutes=0.1)), "cot")


if __name__ == "__main__":
    if sys.argv[-1] in HALVES:
        halves(Path(sys.argv[1]), sys.argv[-1])
    else:
        (hang if "hang" in sys.argv else main)(Path(sys.argv[1]))
