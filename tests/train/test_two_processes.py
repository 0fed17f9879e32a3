"""Two real gloo processes through torchrun give what one process gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from latent_sft.config.load import to_yaml
from latent_sft.launcher import build_command
from latent_sft.train.run import train_stage

EXACT = ("accuracy", "reasoning_steps", "end_token_rate")


def test_two_processes_equal_one(tiny_config, tmp_path):
    """Token batches, four a step, in the decoder phase, whose latents both processes store."""
    stage, section = "stage1-decoder", "stage1.decoder"
    losses, seen, latents, validation = {}, {}, {}, {}
    for name, nproc, accumulation in (("one", 1, 4), ("two", 2, 2)):
        cut = [
            f"{section}.eval_examples=7",
            f"{section}.max_tokens=400",
            f"{section}.gradient_accumulation_steps={accumulation}",
            "stage1.encoder.enabled=false",
        ]
        config = tiny_config(f"run_dir={tmp_path / name}", f"launch.nproc={nproc}", *cut)
        if nproc == 1:
            train_stage(config, stage)
        else:
            path = tmp_path / "two.yaml"
            path.write_text(to_yaml(config))
            done = subprocess.run(
                build_command(stage, path, [], config.launch), capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / name / stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        validation[name] = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines]
        losses[name] = [v["train/loss"] for v in lines if "train/loss" in v]
        seen[name] = json.loads((folder / "manifest.json").read_text())["examples_seen"]
        latents[name] = [p.read_bytes() for p in sorted((tmp_path / name).glob("*-latents/store/*.arrow"))]
    assert len(losses["one"]) == 4
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert seen["two"] == seen["one"]
    # rows are shared out there too; an odd number of them
    assert sum(map(len, validation["one"])) == 2 * 4
    for one, two in zip(validation["one"], validation["two"], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
        assert [two.get(f"eval/{k}") for k in EXACT] == [one.get(f"eval/{k}") for k in EXACT]
    assert latents["two"] == latents["one"] and len(latents["one"]) == 3
    assert sys.executable in build_command(stage, "x", [], config.launch)
