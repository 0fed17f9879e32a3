"""Start a training stage on several processes: build the torchrun command (pure), then run it.

Where a stage runs is decided here and in `launch/`; what it does is decided by the configuration alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_sft.config.schema import LaunchConfig


def build_command(stage: str, config_path: str | Path, overrides: Sequence[str], launch: LaunchConfig) -> list[str]:
    """Return the command line that trains one stage on `launch.nproc` processes of this machine.

    The interpreter is the running one, so that the workers use the same environment; `--standalone` lets torchrun
    pick a free port, so that two jobs on one machine do not meet.
    """
    stage_command = ["-m", "latent_sft.cli", "train", stage, str(config_path), *overrides]
    if launch.nproc == 1:
        return [sys.executable, *stage_command]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.nproc}"]
    return [*torchrun, *stage_command]


def is_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process was started by a distributed launcher (torchrun, deepspeed, srun wrappers)."""
    return "LOCAL_RANK" in environ and "WORLD_SIZE" in environ


def start(command: Sequence[str]) -> int:
    """Run a command with this process's terminal and return its exit status (128 + n where signal n ended it).

    Raises:
        KeyboardInterrupt: after the command and its workers have been told to end and have ended.
    """
    with subprocess.Popen(command) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # torchrun answers SIGTERM by ending its workers; killing it would leave them running
            process.terminate()
            process.wait()
            raise
    return status if status >= 0 else 128 - status


def relaunch_if_needed(
    stage: str, config_path: str | Path, overrides: Sequence[str], launch: LaunchConfig
) -> int | None:
    """Train the stage on several processes where the configuration asks for them and this process is not one of them.

    Returns:
        The exit status of the launched job, or None where this process has to train by itself.
    """
    if launch.nproc == 1 or is_worker():
        return None
    return start(build_command(stage, config_path, overrides, launch))
