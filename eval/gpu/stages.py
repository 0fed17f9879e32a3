"""Every stage of every method, two steps in bf16 with LoRA; and ZeRO 1 to 3 on one GPU, against no ZeRO."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eval.gpu.parts import ROOT, Case, Result, Settings
from eval.gpu.sync import OWN_DATA, SHORT, train
from latent_sft.config.load import load_config
from latent_sft.config.schema import LaunchConfig
from latent_sft.experiment.stores import make_labels
from latent_sft.launcher import build_command
from latent_sft.methods import SECTIONS, STAGES
from latent_sft.runs import write_atomically

# whole, SIM-CoT's decoder would have to be float32
ADAPTERS = ["model.dtype=bfloat16", "model.lora.rank=4", "sim_cot.decoder=lora"]
AUTOCAST = [f"{section}.mixed_precision=bf16" for section in SECTIONS.values()]
LOGGED = [f"{section}.log_every=1" for section in SECTIONS.values()]
TINY_STAGES = ("cot", "stage1-union", "kava")
UNION = ("stage1.encoder.enabled=false", "stage1.decoder.enabled=false")
# stage 1 holds two models, stage 2 reads what it stored, KaVa thinks in hidden states beside its model
SHARDED = ("cot", "stage1-union", "stage2", "kava")
APART = 1e-2


def cases(settings: Settings) -> Sequence[Case]:
    """Return a case for every stage, in an order in which what one starts from is there."""
    chosen = TINY_STAGES if settings.tiny else tuple(STAGES)
    return [Case(stage, partial(_stage, settings, stage), 0.3) for stage in chosen]


def _stage(settings: Settings, stage: str) -> Result:
    more = [*ADAPTERS, *AUTOCAST, *LOGGED, *(UNION if settings.tiny else ())]
    folder = train(settings.out / "stages", stage, *more).step(stage).directory
    losses = logged(folder)
    return {
        "same": len(losses) == 2 and all(map(math.isfinite, losses)),
        "losses": " ".join(f"{x:.4g}" for x in losses),
    }


def logged(folder: Path) -> list[float]:
    """Return the losses that a stage has logged."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def zero_cases(settings: Settings) -> Sequence[Case]:
    """Return a case for every level of ZeRO; level 0 is what the others are compared with."""
    levels = (0, 3) if settings.tiny else (0, 1, 2, 3)
    return [Case(f"ZeRO {level}", partial(_zero, settings, level), 2.0) for level in levels]


def _zero(settings: Settings, level: int) -> Result:
    assert not OWN_DATA.keys() & set(SHARDED)
    stages = SHARDED[:1] if settings.tiny else SHARDED
    folder = settings.out / "zero" / str(level)
    overrides = [*SHORT, *LOGGED, *UNION, "model.dtype=bfloat16", "model.lora.rank=4", f"run_dir={folder}"]
    config, empty = load_config(None, overrides), settings.out / "zero.yaml"
    write_atomically(empty, "{}\n")
    for stage in stages:
        if stage == "stage2":
            make_labels(config)
        launch = LaunchConfig(zero=level)
        more = [f"launch.zero={level}", "launch.nproc=1"] if level else []
        command = build_command(stage, empty, [*overrides, *more], launch)
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{stage}: {(done.stdout + done.stderr)[-2000:]}")
    found = {stage: logged(folder / stage) for stage in stages}
    expected = {stage: logged(settings.out / "zero" / "0" / stage) for stage in stages}
    apart = max(abs(a - b) / abs(b) for stage in stages for a, b in zip(found[stage], expected[stage], strict=True))
    return {"same": apart <= APART, "largest difference of losses": apart, "stages": " ".join(stages)}
