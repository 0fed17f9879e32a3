"""However a step is cut over processes and micro-batches, the losses and gradient norms are the recorded ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from golden import record

from latent_sft.methods import STAGES
from latent_sft.train.sampler import LengthBucketSampler

# sums taken in another order move them by 2e-7 on one machine; another processor or BLAS moves them a little more
LOSS, GRAD_NORM = 1e-5, 1e-4


def assert_golden(found: dict[str, dict[str, list[float]]]) -> None:
    golden = json.loads(record.GOLDEN.read_text())["trajectories"]
    assert found.keys() == golden.keys() == {*STAGES}
    for name, expected in golden.items():
        assert len(expected["loss"]) == 10
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=LOSS), name
        assert found[name]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=GRAD_NORM), name


def test_one_process(tmp_path):
    assert_golden(record.trajectories(tmp_path / "run"))


def test_cut_otherwise(tmp_path, monkeypatch):
    """Four micro-batches, filled with the rows of a step in another order; gradient checkpointing."""

    def shuffled(self):
        rows = list(original(self))
        for start in range(0, len(rows), self.batch_size):
            step = rows[start : start + self.batch_size]
            yield from step[1::2] + step[::2]

    original = LengthBucketSampler.__iter__
    monkeypatch.setattr(LengthBucketSampler, "__iter__", shuffled)
    cut = record.of_every_stage("micro_batch_size=2", "gradient_accumulation_steps=4", "gradient_checkpointing=true")
    assert_golden(record.trajectories(tmp_path / "run", *cut))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["accumulation", "checkpointing"])
def test_each_alone(tmp_path, setting):
    settings = {
        "accumulation": record.of_every_stage("micro_batch_size=1", "gradient_accumulation_steps=8"),
        "checkpointing": record.of_every_stage("gradient_checkpointing=true"),
    }
    assert_golden(record.trajectories(tmp_path / "run", *settings[setting]))


@pytest.mark.slow
def test_two_processes(tmp_path):
    """2 processes x 2 micro-batches x 2 rows instead of 8 rows."""
    cut = record.of_every_stage("micro_batch_size=2", "gradient_accumulation_steps=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, record.__file__, tmp_path, *cut], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_golden({name: record.read(record.run_of(tmp_path, name) / name) for name in STAGES})


def test_a_modified_tree_is_refused(monkeypatch, capsys):
    class Changed:
        stdout = " M latent_sft/train/loop.py\n"

    monkeypatch.setattr(record.subprocess, "run", lambda *args, **kwargs: Changed)
    monkeypatch.setattr(record, "trajectories", lambda *args: pytest.fail("recorded"))
    assert record.main([]) == 2
    assert "refused: the tree is modified" in capsys.readouterr().err
