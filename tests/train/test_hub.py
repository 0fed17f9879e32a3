"""Checkpoints on the Hub: pushed while a stage trains, and back from there into an empty folder."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, Hub, Request
from huggingface_hub import constants
from safetensors.torch import load_file

import latent_sft.train.loop as loop
from latent_sft.config.load import to_yaml
from latent_sft.errors import ArtefactError, ConfigError, Interrupted, TrainingError
from latent_sft.train.interruption import last_checkpoint
from latent_sft.train.run import train_stage

SETTINGS = ("hub.repo=me/run", "cot.max_steps=6", "cot.eval_every=3", "cot.save_every=1")


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    original = loop.TrainingLoop._prepared

    def begin(self, batches):
        self.signals.requested |= self.state.global_step == step - 1
        return original(self, batches)

    patch.setattr(loop.TrainingLoop, "_prepared", begin)


def checkpoints(hub: Hub, stage: str = "cot") -> set[str]:
    found = (re.match(rf"{stage}/(checkpoint-\d+)/complete\.json", path) for path in hub.files[("me/run", "main")])
    return {match[1] for match in found if match}


@pytest.mark.usefixtures("client")
def test_a_stage_goes_on_from_the_hub_on_a_wiped_machine(tiny_config, hub: Hub, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    whole = train_stage(tiny_config(*SETTINGS, "hub.repo=", f"run_dir={tmp_path / 'whole'}"), "cot").directory
    config = tiny_config(*SETTINGS)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            train_stage(config, "cot")
    assert hub.repos == {"me/run": True}, "private"
    assert checkpoints(hub) == {"checkpoint-3", "checkpoint-4"}, "the best and the newest"
    shutil.rmtree(config.directory)
    assert "cot/final/model.safetensors" not in hub.files[("me/run", "main")]

    step = train_stage(config, "cot")
    assert (
        "cot: fetched from me/run" in caplog.text and f"cot: goes on from {step.directory}/checkpoint-4" in caplog.text
    )
    assert losses(step.directory) == losses(whole) and len(losses(whole)) == 6
    expected, found = weights(whole), weights(step.directory)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)

    # a finished stage is fetched too, and only taken over
    shutil.rmtree(config.directory)
    again = train_stage(config, "cot")
    assert f"cot: finished already, skipped ({again.directory})" in caplog.text
    assert all(torch.equal(expected[name], value) for name, value in weights(again.directory).items())
    card = hub.files[("me/run", "main")]["README.md"].decode()
    assert card.startswith("---\n") and "stage `cot` at step 6" in card
    shown = capfd.readouterr()
    assert TOKEN not in shown.out + shown.err + caplog.text
    assert not [path for path, data in hub.files[("me/run", "main")].items() if TOKEN.encode() in data]


@pytest.mark.usefixtures("client")
def test_another_experiment_is_refused_and_nothing_changes_there(tiny_config, hub: Hub):
    config = tiny_config(*SETTINGS)
    train_stage(config, "cot")
    shutil.rmtree(config.directory)
    before = dict(hub.files[("me/run", "main")])
    message = r"me/run holds cot of another experiment \(train.learning_rate was 0.003, now 0.004\)\. Nothing was over"
    with pytest.raises(ArtefactError, match=message):
        train_stage(tiny_config(*SETTINGS, "cot.learning_rate=4e-3"), "cot")
    assert hub.files[("me/run", "main")] == before
    assert not (Path(config.directory) / "cot" / "manifest.json").exists()


@pytest.mark.usefixtures("client")
def test_a_hub_that_is_down_delays_pushes_and_never_ends_training(tiny_config, hub: Hub, monkeypatch, caplog):
    """It answers until the first step is made, then with errors, and again at the end."""
    original = loop.TrainingLoop._save

    def save(self):
        hub.refuse = 503 if self.state.global_step < 6 else 0
        original(self)
        pushed = next(c.running for c in self.callbacks if hasattr(c, "running"))
        if pushed is not None:
            pushed.result()

    monkeypatch.setattr(loop.TrainingLoop, "_save", save)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with caplog.at_level(logging.WARNING, logger="latent_sft"):
        train_stage(tiny_config(*SETTINGS), "cot")
    assert caplog.text.count("not pushed: me/run: ") == 5
    assert "It is sent with the next checkpoint and at the end of the stage; by hand: `hf upload me/run " in caplog.text
    assert checkpoints(hub) == {"checkpoint-3", "checkpoint-6"}
    assert "cot/final/model.safetensors" in hub.files[("me/run", "main")]


@pytest.mark.usefixtures("client")
def test_what_stops_a_stage_from_being_looked_for_is_said_before_training(tiny_config, hub: Hub, monkeypatch):
    config = tiny_config(*SETTINGS)
    hub.refuse = 403
    with pytest.raises(TrainingError, match=r"me/run: the token may not write there \(403\)"):
        train_stage(config, "cot")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        TrainingError, match=r"cannot reach http://127\.0\.0\.1:9 .* or train without the Hub: hub.repo="
    ):
        train_stage(config, "cot")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(TrainingError, match="no Hugging Face token found"):
        train_stage(config, "cot")
    assert not list(Path(config.directory).glob("cot/checkpoint-*")) and not hub.files


def test_settings_of_the_hub_are_checked(tiny_config):
    with pytest.raises(ConfigError, match=r"hub.repo: got 'me', expected user/name"):
        tiny_config("hub.repo=me")
    with pytest.raises(ConfigError, match=r"hub.repo: got 'me/run', expected empty in a comparison"):
        tiny_config("hub.repo=me/run", "compare.variants.a=[seed=1]")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a push", "in a step"])
def test_killed_and_wiped_it_ends_as_if_nothing_had_happened(tiny_config, hub: Hub, tmp_path, moment):
    """SIGKILL while the second push is under way, or behind it; the folder is deleted; the same command goes on."""
    whole = train_stage(tiny_config(*SETTINGS, "hub.repo=", f"run_dir={tmp_path / 'whole'}"), "cot").directory
    config, path = tiny_config(*SETTINGS, "cot.max_steps=6"), tmp_path / "tiny.yaml"
    path.write_text(to_yaml(config))
    commits, reached, killed = 0, threading.Event(), threading.Event()
    original = hub.answer

    def answer(request: Request):
        nonlocal commits
        commits += "/commit/" in request.path
        if commits == 2 and not killed.is_set() and (moment == "in a push" or "/commit/" not in request.path):
            reached.set()
            killed.wait(60)
            return 500, {}
        return original(request)

    hub.answer = answer
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environ |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "latent_sft.cli", "train", "cot", str(path)]
    job = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert reached.wait(120), job.stderr.read() if job.poll() is not None else "no second push"
    job.send_signal(signal.SIGKILL)
    job.communicate()
    killed.set()
    left = checkpoints(hub)
    assert left and (moment == "in a step" or left == {"checkpoint-1"})
    shutil.rmtree(config.directory)

    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cot: fetched from me/run" in done.stderr and f"cot: goes on from {config.directory}" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    folder = Path(config.directory) / "cot"
    assert losses(folder) == losses(whole)
    assert all(torch.equal(value, weights(folder)[name]) for name, value in weights(whole).items())
    assert last_checkpoint(folder).endswith("checkpoint-6")
