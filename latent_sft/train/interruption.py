"""Stopping and going on: signals that end a stage at a step, and checkpoints that are complete or do not count.

A checkpoint is a folder `checkpoint-<step>` of the Trainer (weights, optimizer, schedule, one random state a process,
`trainer_state.json`) with our `complete.json` in it: the size of every file, written last, once every process has
written its part. Only then are older ones deleted, so that at any moment one complete checkpoint is on disk.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from latent_sft.config.training import TrainConfig
from latent_sft.errors import ArtefactError, ConfigError, Interrupted, TrainingError
from latent_sft.runs import read_json, write_atomically, write_json

MARKER = "complete.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger(__name__)


def mark_complete(folder: Path, **facts: int) -> None:
    """Write `complete.json`: the facts, and the size of every file, which is on the disk by then."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MARKER):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / MARKER, {**facts, "files": files})


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete `checkpoint-*` of a stage, or None; half-written ones are deleted."""
    for checkpoint in reversed(_checkpoints(folder)):
        problem = _problem(checkpoint)
        if not problem:
            return str(checkpoint)
        log.warning("%s is incomplete (%s) and is not used.", checkpoint, problem)
        shutil.rmtree(checkpoint)
    return None


def same_step(train: TrainConfig, section: str, checkpoint: str | None, num_processes: int) -> TrainConfig:
    """Return the settings with the accumulation that makes an optimizer step what it was before a checkpoint.

    Where `global_batch_size` is given, that is it.

    The step of a stage (its examples, and so its schedule) is fixed when the stage begins; more or fewer processes
    only share it out anew.

    Args:
        train: settings of the stage.
        section: of the configuration they stand in, for errors.
        checkpoint: where the stage goes on from, or None.
        num_processes: of this job.

    Raises:
        ConfigError: this number of processes cannot share the step, or cannot read the checkpoint.
    """
    train = train.shared(section, num_processes)
    if checkpoint is None:
        return train
    facts = read_json(Path(checkpoint) / MARKER)
    before, accumulated = facts["processes"], facts["gradient_accumulation_steps"]
    if before != num_processes and any(Path(checkpoint).glob("global_step*")):
        raise ConfigError(
            f"launch.nproc: got {num_processes} processes, expected {before}: {checkpoint} is a ZeRO checkpoint, which "
            "holds one part of the optimizer for each process. Go on with as many, or delete the checkpoints."
        )
    if train.global_batch_size:
        return train
    if before == num_processes:
        return dataclasses.replace(train, gradient_accumulation_steps=accumulated)
    if (before * accumulated) % num_processes:
        raise ConfigError(
            f"launch.nproc: got {num_processes} processes, expected a divisor of {before * accumulated}: a step of "
            f"{checkpoint} takes {before} processes x {section}.gradient_accumulation_steps={accumulated} "
            "micro-batches."
        )
    log.info(
        "%d processes instead of %d: %s.gradient_accumulation_steps becomes %d, so that a step stays what it was",
        num_processes, before, section, before * accumulated // num_processes,
    )  # fmt: skip
    return dataclasses.replace(train, gradient_accumulation_steps=before * accumulated // num_processes)


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints fail with a message and can be read by another number of processes."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / MARKER).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
            raise _unwritten(folder, error) from error

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # save_strategy "best" saves if this is true, and forgets that a callback has asked for it
        return super()._determine_best_metric(metrics, trial) or self.control.should_save

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is not None and not (Path(checkpoint) / own).exists():
            # another number of processes: noise and dropout are drawn anew, the same at every such resumption
            set_seed(self.args.seed + 1_000_003 * self.state.global_step + self.args.process_index)


class Interruption(TrainerCallback):
    """Saves when it is time, makes a checkpoint count once it is complete, and ends the stage at a signal.

    SIGTERM or SIGUSR1, on any process, lets every process finish the step, write a checkpoint and raise Interrupted.
    Where that step is evaluated, the evaluation comes first, as it would have. Add it after callbacks that write into
    the checkpoint.

    Args:
        name: of the stage.
        keep: newest checkpoints that stay, the best one among them.
        save_every: steps between checkpoints, beside one at each new best evaluation and the last step; 0: one at every
            evaluation.

    Attributes:
        requested: whether this process was told to stop.
    """

    def __init__(self, name: str, keep: int, save_every: int) -> None:
        self.name, self.keep, self.save_every = name, keep, save_every
        self.requested, self.stopping, self._after_epoch = False, False, False
        self.group: Any = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to signals; bring what is outside the checkpoint back to its step."""
        if args.world_size > 1:
            # on the CPU: asking the accelerator at every step would make the host wait for it
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        _keep_loader_workers(kwargs.get("train_dataloader"))
        if args.process_index and not state.global_step:
            set_seed(args.seed + args.process_index)  # else every process draws the same noise
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)  # as seen from here: the run may have moved
        # the optimizer was saved with the learning rate of the schedule it had, which a prolonged stage leaves
        schedule = kwargs["lr_scheduler"]
        for group, peak, share in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * share(schedule.last_epoch)
        if state.is_world_process_zero:
            drop_after(Path(args.output_dir) / "metrics.jsonl", state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint where one is due, and stop where any process was told to."""
        last = state.global_step >= state.max_steps
        self.stopping = self._anyone_stops() and not last
        if self.stopping:
            log.info("%s: told to stop; finishing step %d", self.name, state.global_step)
            control.should_training_stop = True
        due = self.stopping or last or (self.save_every > 0 and state.global_step % self.save_every == 0)
        # an evaluation at the end of the epoch belongs to its last step, and into its checkpoint
        self._after_epoch = due and args.eval_strategy == "epoch" and (last or float(state.epoch).is_integer())
        control.should_save = control.should_save or (due and not self._after_epoch)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what waited for the evaluation of the epoch."""
        control.should_save = control.should_save or self._after_epoch

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Save every evaluated model, unless `save_every` says when."""
        control.should_save = control.should_save or not self.save_every

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint complete, then delete old ones; end here if that was asked for.

        Raises:
            Interrupted: the stage was told to stop.
            TrainingError: the disk is full.
        """
        folder = Path(args.output_dir)
        self._wait()
        if state.is_world_process_zero:
            newest = folder / f"checkpoint-{state.global_step}"
            try:
                accumulated = args.gradient_accumulation_steps
                mark_complete(newest, processes=args.world_size, gradient_accumulation_steps=accumulated)
            except (OSError, ArtefactError) as error:
                raise _unwritten(newest, error) from error
            rotate(folder, self.keep, {state.global_step, state.best_global_step})
        self._wait()  # a process that ends here makes the launcher end the others
        if self.stopping:
            raise Interrupted(f"{self.name}: stopped at step {state.global_step} of {state.max_steps}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _anyone_stops(self) -> bool:
        if self.group is None:
            return self.requested
        flag = torch.tensor(int(self.requested))
        distributed.all_reduce(flag, group=self.group)
        return flag.item() > 0

    def _wait(self) -> None:
        if self.group is not None:
            distributed.barrier(group=self.group)


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of a metrics file that belong to steps a resumed stage repeats, and a torn last line."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        write_atomically(path, "".join(f"{line}\n" for line in kept))


def rotate(folder: Path, keep: int, needed: set[int | None]) -> None:
    """Delete the oldest checkpoints until `keep` are left; those of the steps `needed` stay."""
    checkpoints = _checkpoints(folder)
    spare = [c for c in checkpoints if _number(c) not in needed]
    for checkpoint in spare[: max(0, len(checkpoints) - keep)]:
        (checkpoint / MARKER).unlink(missing_ok=True)  # first: a half-deleted one does not count
        shutil.rmtree(checkpoint, ignore_errors=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _problem(checkpoint: Path) -> str:
    """Return what is missing of a checkpoint, or nothing."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no {MARKER}"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut off"
    try:
        read_json(checkpoint / "trainer_state.json")
    except ArtefactError as error:
        return str(error)
    return ""


def _unwritten(checkpoint: Path, error: Exception) -> TrainingError:
    shutil.rmtree(checkpoint, ignore_errors=True)
    return TrainingError(
        f"{checkpoint}: could not be written ({error}). The checkpoints before it are untouched; make room on the disk "
        "and run the same command again, it goes on from the newest one."
    )


def _keep_loader_workers(loader: Any) -> None:
    # Slurm signals every process of a step; a dead loader worker would end the step that is to be finished
    if loader is None or not getattr(loader, "num_workers", 0):
        return
    loader.worker_init_fn = partial(_start_loader_worker, before=loader.worker_init_fn)


def _start_loader_worker(worker: int, before: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if before is not None:
        before(worker)
