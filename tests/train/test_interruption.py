"""A stage that is stopped, killed or out of disk goes on to the weights of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import latent_sft.train.loop as loop
import latent_sft.train.run as run
from latent_sft import cli
from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config
from latent_sft.config.training import TrainConfig
from latent_sft.errors import ArtefactError, ConfigError, Interrupted, TrainingError
from latent_sft.experiment.stores import make_labels
from latent_sft.runs import exclusive
from latent_sft.train.interruption import MARKER, drop_after, last_checkpoint, mark_complete, same_step
from latent_sft.train.run import train_stage

ONLY_UNION = ["stage1.encoder.enabled=false", "stage1.decoder.enabled=false"]
NOISE = [*ONLY_UNION, "stage1.noise_scale=1", "stage1.noise_start=0.25", "latent.noise_scale=1"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "final").rglob("*.safetensors"))
    assert files
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def logged(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def stop_at(patch: pytest.MonkeyPatch, step: int, act) -> None:
    """Call `act` in the middle of the optimizer step `step`."""
    original = loop.TrainingLoop._prepared

    def act_now(self, batches):
        if self.state.global_step == step - 1:
            act()
        return original(self, batches)

    patch.setattr(loop.TrainingLoop, "_prepared", act_now)


def terminate(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The cot stage, uninterrupted: four steps, evaluated after the last."""
    config = load_config(None, [*TINY, f"run_dir={tmp_path_factory.mktemp('whole')}", "cot.eval_every=4"])
    return train_stage(config, "cot").directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A run with stage 1 and labels, to begin stage 2 from."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    config = load_config(None, [*TINY, f"run_dir={folder}", *NOISE])
    train_stage(config, "stage1-union")
    make_labels(config)
    return folder


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("cot", ["cot.max_steps=6", "cot.eval_every=6", "cot.save_every=2"]),
        # 120 rows of 8: 15 steps an epoch, evaluation at its end
        (
            "cot",
            [
                "cot.max_steps=0",
                "cot.epochs=1.2",
                "cot.eval_every=0",
                "cot.gradient_accumulation_steps=2",
                "cot.micro_batch_size=6",
            ],
        ),
        ("stage1-union", ["stage1.union.max_steps=6", "stage1.union.eval_every=6"]),
        ("stage2", ["stage2.eval_every=4"]),
    ],
    ids=["cot", "cot-epochs", "stage1-union", "stage2"],
)
def test_a_stopped_stage_goes_on_to_the_same_weights(tiny_config, tmp_path, prepared, stage, settings):
    """SIGTERM in the middle of a step; data order, schedule, optimizer and noise go on as if nothing had been."""
    folders = {name: tmp_path / name for name in ("whole", "stopped")}
    configs: dict[str, Config] = {}
    for name, folder in folders.items():
        shutil.copytree(prepared, folder)
        if stage == "stage1-union":
            shutil.rmtree(folder / "stage1-union")
            shutil.rmtree(folder / "labels")
        configs[name] = tiny_config(*NOISE, f"run_dir={folder}", *settings)
    whole = train_stage(configs["whole"], stage).directory
    stopped = folders["stopped"] / stage
    before = signal.getsignal(signal.SIGTERM)
    stops = ((3, signal.SIGTERM), (4, signal.SIGUSR1)) if stage in ("cot", "stage2") else ((3, signal.SIGTERM),)
    for step, number in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step, lambda number=number: terminate(number))
            if stage == "stage2" and step == 4:  # the last step: nothing is left to interrupt
                with pytest.raises(Interrupted, match="stage2: finished, and then stopped"):
                    train_stage(configs["stopped"], stage)
                break
            with pytest.raises(Interrupted, match=rf"{stage}: stopped at step {step} of \d+"):
                train_stage(configs["stopped"], stage)
        assert signal.getsignal(signal.SIGTERM) == before
        assert last_checkpoint(stopped) == str(stopped / f"checkpoint-{step}")
        assert [number for number, _ in logged(stopped)] == list(range(1, step + 1))
    assert train_stage(configs["stopped"], stage).is_finished()
    assert logged(stopped) == logged(whole)
    assert_same_weights(whole, stopped)
    results = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, stopped)]
    assert results[0]["best_step"] == results[1]["best_step"]
    assert results[0]["validation_accuracy"] == results[1]["validation_accuracy"]
    kept = {f"checkpoint-{results[1][which]}" for which in ("steps", "best_step")}
    assert {p.name for p in stopped.glob("checkpoint-*")} == kept


def test_a_stop_at_the_end_of_an_epoch_evaluates_it_first(tiny_config):
    config = tiny_config("cot.max_steps=0", "cot.epochs=2", "cot.eval_every=0", "data.synthetic.num_train=24")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3, terminate)
        with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
            train_stage(config, "cot")
    folder = Path(config.directory) / "cot"
    evaluated = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluated if "eval/accuracy" in line] == [3]
    assert last_checkpoint(folder).endswith("checkpoint-3")


def test_a_killed_stage_uses_the_newest_complete_checkpoint(tiny_config, tmp_path, whole):
    """Whatever file is missing or cut off, the checkpoint before it is used, and the weights end the same."""

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    config = tiny_config("cot.eval_every=4", "cot.save_every=1", "cot.save_total_limit=3")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, kill)
        with pytest.raises(Killed):
            train_stage(config, "cot")
    folder = Path(config.directory) / "cot"
    names = sorted(p.name for p in (folder / "checkpoint-3").iterdir())
    assert {"model.safetensors", "optimizer.pt", "random-0.pt", "trainer_state.json", MARKER} <= {*names}
    for name in names:
        for damage in ("missing", "cut off"):
            copy = tmp_path / f"{name}-{damage}"
            shutil.copytree(folder, copy)
            path = copy / "checkpoint-3" / name
            path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
            if name == MARKER and damage == "cut off":
                path.write_text(path.read_text()[:20])
            assert last_checkpoint(copy) == str(copy / "checkpoint-2"), (name, damage)
            assert not (copy / "checkpoint-3").exists()
    copy = shutil.copytree(folder, tmp_path / "damaged")
    state = copy / "checkpoint-3" / "trainer_state.json"
    state.write_bytes(b"\0" * state.stat().st_size)  # of the right size, as a disk leaves it after a crash
    assert last_checkpoint(copy) == str(copy / "checkpoint-2")
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 3, "train/lo')  # killed while writing
    train_stage(config, "cot")
    assert logged(folder) == logged(whole)
    assert_same_weights(whole, folder)


def test_lines_of_repeated_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_after(tmp_path / "none.jsonl", 2)


def test_checkpoints_rotate_and_the_best_is_kept(tiny_config, monkeypatch):
    """The first evaluation is the best; it stays while newer checkpoints come and go, and becomes the final model."""
    config = tiny_config("cot.max_steps=8", "cot.save_every=1", "cot.save_total_limit=3", "cot.eval_every=2")
    accuracies = iter([0.25, 0.5, 0.5, 0.25])
    monkeypatch.setattr(loop, "validation_metrics", lambda *_: {"accuracy": next(accuracies)})
    folder, seen = Path(config.directory) / "cot", {}
    original = loop.TrainingLoop._save

    def look(self):
        original(self)
        state = self.state
        seen[state.global_step] = sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))
        if state.global_step == 4:
            shutil.copytree(folder / "checkpoint-4", folder / "best")

    monkeypatch.setattr(loop.TrainingLoop, "_save", look)
    train_stage(config, "cot")
    assert seen[4] == [2, 3, 4] or seen[4] == [3, 4]
    assert seen[8] == [4, 7, 8]
    best, final = load_file(folder / "best" / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(best[f"lm.{name}"], final[name]) for name in final)


def test_a_moved_run_still_knows_its_best_checkpoint(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("cot.max_steps=6", "cot.eval_every=2", f"run_dir={tmp_path / 'here'}")
    accuracies = iter([0.5, 0.25, 0.25])
    monkeypatch.setattr(loop, "validation_metrics", lambda *_: {"accuracy": next(accuracies)})
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, terminate)
        with pytest.raises(Interrupted):
            train_stage(config, "cot")
    (tmp_path / "here").rename(tmp_path / "there")
    best = load_file(tmp_path / "there" / "cot" / "checkpoint-2" / "model.safetensors")
    step = train_stage(tiny_config("cot.max_steps=6", "cot.eval_every=2", f"run_dir={tmp_path / 'there'}"), "cot")
    assert step.results()["best_step"] == 2
    final = load_file(step.final / "model.safetensors")
    assert all(torch.equal(best[f"lm.{name}"], final[name]) for name in final)


@pytest.mark.parametrize("part", ["optimizer.pt", "model.safetensors", MARKER])
def test_a_full_disk_leaves_the_last_good_checkpoint(tiny_config, whole, monkeypatch, part):
    config = tiny_config("cot.eval_every=4", "cot.save_every=2", "cot.save_total_limit=1")
    folder = Path(config.directory) / "cot"

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    def fill_up():
        if part == "optimizer.pt":
            monkeypatch.setattr(torch, "save", full)
        elif part == "model.safetensors":
            monkeypatch.setattr("latent_sft.train.loop.save_file", full)
        else:
            monkeypatch.setattr("latent_sft.runs.os.fsync", full)

    with monkeypatch.context():
        stop_at(monkeypatch, 4, fill_up)
        with pytest.raises(TrainingError, match=r"checkpoint-4.*No space left on device"):
            train_stage(config, "cot")
        monkeypatch.undo()
    assert last_checkpoint(folder).endswith("checkpoint-2")
    train_stage(config, "cot")
    assert logged(folder) == logged(whole)
    assert_same_weights(whole, folder)


def checkpoint_of(folder: Path, processes: int, accumulation: int) -> str:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    mark_complete(folder, processes=processes, gradient_accumulation_steps=accumulation)
    return str(folder)


def test_another_number_of_processes_shares_the_same_step(tmp_path):
    found = checkpoint_of(tmp_path / "checkpoint-4", processes=4, accumulation=2)
    train = TrainConfig(gradient_accumulation_steps=2)
    assert same_step(train, "cot", None, 16).gradient_accumulation_steps == 2
    assert [same_step(train, "cot", found, n).gradient_accumulation_steps for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match=r"launch.nproc: got 3 processes, expected a divisor of 8: .*checkpoint-4"):
        same_step(train, "cot", found, 3)
    (Path(found) / "global_step4").mkdir()
    with pytest.raises(ConfigError, match=r"launch.nproc: got 8 processes, expected 4: .* is a ZeRO checkpoint"):
        same_step(train, "cot", found, 8)
    assert same_step(train, "cot", found, 4).gradient_accumulation_steps == 2


def test_a_global_batch_is_the_step_of_any_number_of_processes(tmp_path):
    train = TrainConfig(micro_batch_size=4, global_batch_size=64)
    found = checkpoint_of(tmp_path / "checkpoint-4", processes=2, accumulation=8)
    for checkpoint in (None, found):
        assert [same_step(train, "cot", checkpoint, n).gradient_accumulation_steps for n in (1, 2, 8)] == [16, 8, 2]
        # micro-batches of another size are shared out anew
        assert same_step(replace(train, micro_batch_size=8), "cot", checkpoint, 2).gradient_accumulation_steps == 4
    with pytest.raises(
        ConfigError, match=r"cot.global_batch_size: got 64, expected a multiple of 12 \(micro_batch_size=4"
    ):
        same_step(train, "cot", None, 3)
    (tmp_path / "checkpoint-4" / "global_step4").mkdir()
    with pytest.raises(ConfigError, match="is a ZeRO checkpoint"):
        same_step(train, "cot", found, 4)


def test_a_stop_before_training_begins_needs_nothing_to_be_closed(tiny_config, monkeypatch):
    def begin(*_args, **_kwargs):
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(run.TrainingLoop, "run", begin)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        train_stage(tiny_config(), "cot")


def test_the_command_ends_with_the_status_of_a_stopped_job(monkeypatch, capsys):
    """Outside training, too: SIGTERM while a command loads or evaluates."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_env", lambda args: terminate())
    assert cli.main(["env"]) == 75
    assert capsys.readouterr().err == "stopped by SIGTERM; run the same command again to go on\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_jobs_do_not_write_into_one_folder(tmp_path, monkeypatch):
    code = (
        "import sys, time; from pathlib import Path; from latent_sft.runs import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    monkeypatch.setattr("latent_sft.runs.time.sleep", lambda _: None)
    command = [sys.executable, "-c", code, str(tmp_path / "cot")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        message = rf"cot: another job is writing here \(process {other.pid} on .*\)"
        with pytest.raises(ArtefactError, match=message), exclusive(tmp_path / "cot"):
            pass
        with exclusive(tmp_path / "cot", take=False):
            pass
        other.kill()
        other.wait()
        with exclusive(tmp_path / "cot"):
            pass
