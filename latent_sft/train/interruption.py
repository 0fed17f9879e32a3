"""Stopping and going on: signals that end a stage at a step, and checkpoints that are complete or do not count.

A checkpoint is a folder `checkpoint-<step>` (trained weights, optimizer, a random state of each process, and where
training stands) with a `complete.json` in it: the size of every file, written last, once every process has written its
part. Only then are older ones deleted, so that at any moment one complete checkpoint is on disk.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed

from latent_sft.config.training import TrainConfig
from latent_sft.errors import ArtefactError, ConfigError, TrainingError
from latent_sft.experiment.workspace import processes
from latent_sft.methods.base import TrainState
from latent_sft.runs import read_json, write_atomically, write_json

MARKER = "complete.json"
STATE_FILE = "trainer_state.json"
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


class Signals:
    """Listens to SIGTERM and SIGUSR1 in a `with` block, and lets the processes of a job agree.

    Attributes:
        requested: whether this process was told to stop.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.requested, self.timeout = False, timeout
        self.group: Any = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        """Listen, where this is the thread that gets signals."""
        if processes().num_processes > 1:
            # on the CPU: asking the accelerator at every step would make the host wait for it
            self.group = distributed.new_group(backend="gloo", timeout=self.timeout)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        """Listen no longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def anyone(self) -> bool:
        """Return whether any process was told to stop."""
        if self.group is None:
            return self.requested
        flag = torch.tensor(int(self.requested))
        distributed.all_reduce(flag, group=self.group)
        return flag.item() > 0

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.group is not None:
            distributed.barrier(group=self.group)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def ignore_signals(worker: int) -> None:
    """Keep a loader's worker alive: Slurm signals every process of a step, which is to be finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def state_of(checkpoint: str) -> TrainState:
    """Return where training stood at a checkpoint."""
    found = read_json(Path(checkpoint) / STATE_FILE)
    return TrainState(**{name: found[name] for name in TrainState.__dataclass_fields__ if name in found})


def load_tensors(checkpoint: str, name: str) -> Any:
    """Return a file of torch in a checkpoint, on the CPU."""
    return torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)


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
        read_json(checkpoint / STATE_FILE)
    except ArtefactError as error:
        return str(error)
    return ""


@contextmanager
def deleted_unless_written(checkpoint: Path) -> Iterator[None]:
    """Delete a checkpoint while whose writing the disk filled up.

    Raises:
        TrainingError: it was not written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, ArtefactError) as error:  # torch's for a full disk: RuntimeError
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise TrainingError(
            f"{checkpoint}: could not be written ({error}). The checkpoints before it are untouched; make room on the "
            "disk and run the same command again, it goes on from the newest one."
        ) from error
