"""Two real gloo processes through torchrun give what one process gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from latent_sft.config.load import to_yaml
from latent_sft.launcher import build_command
from latent_sft.train.run import train_stage


@pytest.mark.parametrize("stage", ["cot", "stage1-union"])
def test_two_processes_equal_one(tiny_config, tmp_path, stage):
    section = {"cot": "cot", "stage1-union": "stage1.union"}[stage]
    phases = ["stage1.encoder.enabled=false", "stage1.decoder.enabled=false"]
    losses = {}
    for name, nproc, batch in (("one", 1, 8), ("two", 2, 4)):
        config = tiny_config(
            f"run_dir={tmp_path / name}", f"launch.nproc={nproc}", f"{section}.batch_size={batch}", *phases
        )
        if nproc == 1:
            train_stage(config, stage)
        else:
            path = tmp_path / "two.yaml"
            path.write_text(to_yaml(config))
            done = subprocess.run(
                build_command(stage, path, [], config.launch), capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()
        losses[name] = [v["train/loss"] for v in map(json.loads, lines) if "train/loss" in v]
    assert len(losses["one"]) == 4
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert sys.executable in build_command(stage, "x", [], config.launch)
