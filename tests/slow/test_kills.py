"""Training that is killed again and again, at random moments, ends with the weights of training that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from latent_sft.config.load import load_config, to_yaml
from latent_sft.experiment.stores import make_labels
from latent_sft.train.run import train_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KILLS = {
    ("cot", 1): 6,
    ("stage1-union", 1): 5,
    ("stage2", 1): 5,
    ("cot", 2): 3,
    ("stage1-union", 2): 2,
    ("stage2", 2): 3,
}
assert sum(KILLS.values()) >= 20
SETTINGS = [
    *TINY,
    "stage1.encoder.enabled=false",
    "stage1.decoder.enabled=false",
    # noise on the latents of both stages: the state of the random generators has to come back too
    "stage1.noise_scale=1",
    "stage1.noise_start=0.1",
    "latent.noise_scale=1",
    "labels.shard_size=2",
    *(
        f"{section}.{setting}"
        for section in ("cot", "stage1.union", "stage2")
        for setting in ("max_steps=60", "eval_every=60", "save_every=7", "eval_examples=2", "micro_batch_size=4")
    ),
    "stage1.union.eval_every=20",  # here the best checkpoint, an earlier one, has to be kept
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Stage 1 and labels for stage 2 to begin from."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    config = load_config(None, [*SETTINGS, f"run_dir={folder}"])
    train_stage(config, "stage1-union")
    make_labels(config)
    return folder


def experiment(folder: Path, prepared: Path, without: tuple[str, ...], *overrides: str) -> Path:
    """Return the YAML of a copy of the prepared run that lacks some of its steps."""
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns(*without))
    path = folder.with_suffix(".yaml")
    path.write_text(to_yaml(load_config(None, [*SETTINGS, f"run_dir={folder}", *overrides])))
    return path


def family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        own = psutil.Process(process.pid)
        return [own, *own.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def run_until_done(words: list[str], kills: int, progress, rng: random.Random) -> int:
    """Start a command, kill it at random moments, start it again, until it ends by itself; return the kills made.

    Some moments lie anywhere, some in the work: a random number of steps after it goes on. The victim is any of its
    processes; the others have to end by themselves.
    """
    command = [sys.executable, "-m", "latent_sft.cli", *words]
    made, environ = 0, {**os.environ, "OMP_NUM_THREADS": "1"}
    while True:
        job = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if made < kills:
            target = min(progress() + rng.randrange(1, 16), 55)
            anywhere = time.monotonic() + (rng.uniform(0, 15) if rng.random() < 0.2 else 300)
            while job.poll() is None and progress() < target and time.monotonic() < anywhere:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            relatives = family(job)
            if job.poll() is None and relatives:
                rng.choice(relatives).send_signal(signal.SIGKILL)
                made += 1
                job.communicate(timeout=120)
                _, alive = psutil.wait_procs(relatives, timeout=60)
                assert not alive, "a process outlived its job"
                continue
        _, stderr = job.communicate(timeout=300)
        assert job.returncode == 0, stderr[-3000:]
        return made


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "final").rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(("stage", "nproc"), KILLS)
def test_killed_training_ends_with_the_same_weights(prepared, tmp_path, stage, nproc):
    rng = random.Random(f"{stage} {nproc}")
    without = () if stage == "stage2" else ("stage1-union", "labels")
    folders = {}
    for name in ("whole", "killed"):
        path = experiment(tmp_path / name, prepared, without, f"launch.nproc={nproc}")
        folder = folders[name] = tmp_path / name / stage
        made = run_until_done(
            ["train", stage, str(path)],
            KILLS[stage, nproc] if name == "killed" else 0,
            lambda path=folder / "metrics.jsonl": path.read_text().count("\n") if path.exists() else 0,
            rng,
        )
    assert made == KILLS[stage, nproc], "it ended before every kill was made"
    expected, found = weights(folders["whole"]), weights(folders["killed"])
    assert expected and expected.keys() == found.keys()
    far = {name: (expected[name] - found[name]).abs().max().item() for name in expected}
    assert max(far.values()) <= (0 if nproc == 1 else 1e-6), far
    (steps, expected_losses), (_, found_losses) = (zip(*losses(folders[n]), strict=True) for n in ("whole", "killed"))
    assert steps == tuple(range(1, 61))
    assert found_losses == (expected_losses if nproc == 1 else pytest.approx(expected_losses, rel=1e-6))


def test_killed_labels_are_the_same(prepared, tmp_path):
    path = experiment(tmp_path / "killed", prepared, ("labels",), "labels.batch_size=1")
    whole = experiment(tmp_path / "whole", prepared, ("labels",), "labels.batch_size=1")
    store = tmp_path / "killed" / "labels" / "store"
    run_until_done(["label", str(whole)], 0, int, random.Random(0))
    rng = random.Random("labels")
    assert run_until_done(["label", str(path)], 4, lambda: len(list(store.glob("*.json"))), rng) == 4
    shards = sorted(p.name for p in (tmp_path / "whole" / "labels" / "store").iterdir())
    assert len(shards) == 2 * 60 + 1 and shards == sorted(p.name for p in store.iterdir())
    for name in shards:
        assert (store / name).read_bytes() == (tmp_path / "whole" / "labels" / "store" / name).read_bytes(), name


def test_a_dead_rank_ends_the_job_with_a_message(prepared, tmp_path):
    path = experiment(tmp_path / "run", prepared, ("stage1-union", "labels"), "launch.nproc=2")
    command = [sys.executable, "-m", "latent_sft.cli", "train", "cot", str(path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "cot" / "metrics.jsonl"
    while not metrics.exists() and job.poll() is None:
        time.sleep(0.05)
    [rank] = [p for p in family(job) if p.environ().get("RANK") == "1"]
    rank.send_signal(signal.SIGKILL)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGKILL
    assert "[0] cot: starts" in stderr and "[1]" not in stderr, "rank 0 alone on the console"
    assert "cot: rank 1 was ended by SIGKILL, so the job was ended; the output of every rank is in" in stderr
