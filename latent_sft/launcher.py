"""Start a training stage on several processes: build the command (pure), run it, and end as its ranks ended.

    latent-sft train STAGE CONFIG launch.nproc=8
      -> python -m latent_sft.launcher --standalone --nproc-per-node=8 -- STAGE CONFIG     (torchrun, and what follows)
        -> 8 x python -m latent_sft.cli train STAGE CONFIG

To torchrun this module adds three things: a file of output for each rank and rank 0 on the console; SIGTERM and SIGUSR1
are handed to the ranks, which finish their step and save, while torchrun would kill them after 30 seconds; and the
exit status of the job is that of the rank that failed first, while torchrun's is always 1.

Where a stage runs is decided here and in `launch/`; what it does is decided by the configuration alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from latent_sft.config.load import load_config
from latent_sft.config.presets import resolve_config
from latent_sft.config.schema import LaunchConfig
from latent_sft.errors import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SHOWN_LINES = 20
FAILED = 1
PARENT = "LATENT_SFT_PARENT"
"""Process of ours that started this one and waits for it; not set where a user, a script or a cluster did."""


def build_command(stage: str, config_path: str | Path, overrides: Sequence[str], launch: LaunchConfig) -> list[str]:
    """Return the command line that trains one stage on `launch.nproc` processes of this machine.

    The interpreter is the running one, so that the workers use the same environment; `--standalone` lets torchrun
    pick a free port, so that two jobs on one machine do not meet.
    """
    if launch.alone:
        return [sys.executable, "-m", "latent_sft.cli", "train", stage, str(config_path), *overrides]
    options = ["--standalone", f"--nproc-per-node={launch.nproc}"]
    return [sys.executable, "-m", "latent_sft.launcher", *options, "--", stage, str(config_path), *overrides]


def is_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process was started by a distributed launcher (torchrun, deepspeed, srun wrappers)."""
    return "LOCAL_RANK" in environ and "WORLD_SIZE" in environ


def start(command: Sequence[str]) -> int:
    """Run a command with this process's terminal and return its exit status (128 + n where signal n ended it).

    SIGTERM and SIGUSR1 are handed on to it.

    Raises:
        KeyboardInterrupt: after the command and its workers have been told to end and have ended.
    """
    with (
        subprocess.Popen(command, env=bound_environ()) as process,
        _handled(lambda number, _: process.send_signal(number)),
    ):
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # the launcher answers SIGTERM by ending its workers; killing it would leave them running
            process.terminate()
            process.wait()
            raise
    return exit_status(status)


def relaunch_if_needed(
    stage: str, config_path: str | Path, overrides: Sequence[str], launch: LaunchConfig
) -> int | None:
    """Train the stage on several processes where the configuration asks for them and this process is not one of them.

    Returns:
        The exit status of the launched job, or None where this process has to train by itself.
    """
    end_if_bound()
    if is_worker():
        end_with_parent(os.getppid())
        return None
    if launch.alone:
        return None
    return start(build_command(stage, config_path, overrides, launch))


def bound_environ() -> dict[str, str]:
    """Return the environment for a command that must not outlive this process."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_if_bound() -> None:
    """End with the process that gave this one `bound_environ`, if one did."""
    if PARENT in os.environ:
        end_with_parent(int(os.environ.pop(PARENT)))


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its launcher dies: a rank left behind would go on writing (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            raise SystemExit(FAILED)  # it died before


def exit_status(returned: int) -> int:
    """Return the status a shell would show for what subprocess or torchrun returned (-n: ended by signal n)."""
    return returned if returned >= 0 else 128 - returned


def torchrun_arguments(options: Sequence[str], logs: Path, command: Sequence[str]) -> list[str]:
    """Return torchrun's arguments: the options, one file of output a rank in `logs`, the first rank on the console."""
    output = [f"--log-dir={logs}", "--tee=3", "--local-ranks-filter=0"]
    # SIGTERM is ours; these end the job at once
    signals = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
    return [*options, *output, *signals, "-m", "latent_sft.cli", "train", *command]


def main(argv: Sequence[str]) -> int:
    """Run `[torchrun options] -- STAGE CONFIG [key=value ...]` and return the status of the rank that failed first."""
    end_if_bound()
    cut = argv.index("--")
    options, command = argv[:cut], argv[cut + 1 :]
    stage, config, *overrides = command
    job = f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
    logs = Path(load_config(resolve_config(config), overrides).directory) / "logs" / stage / job
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar in a file is one endless line
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[${rank}] ")  # torchrun's names the local rank
    with _handled(_hand_to_ranks):
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        logging.disable(logging.ERROR)  # torchrun's own report of a failure says less than ours, at length
        try:
            run.run(run.parse_args(torchrun_arguments(options, logs, command)))
        except ChildFailedError as error:
            sys.stdout.flush()
            status, message = explain(error.failures, logs)
            sys.stderr.write(f"{stage}: {message}\n")
            return status
    return 0


def explain(failures: Mapping[int, Any], logs: Path) -> tuple[int, str]:
    """Return exit status and message for the ranks of this node that failed.

    A rank that was killed explains the others: they notice that it is gone and fail too, or are ended by torchrun's
    SIGTERM.

    Args:
        failures: rank -> torchrun's `ProcessFailure`.
        logs: folder that torchrun wrote their output into.
    """

    def order(rank: int) -> tuple[bool, bool, bool, int, int]:
        ended = failures[rank].exitcode
        return ended == -signal.SIGTERM, ended != STOPPED, ended >= 0, failures[rank].timestamp, rank

    rank = min(failures, key=order)
    failure = failures[rank]
    status = exit_status(failure.exitcode)
    if status == STOPPED:
        return status, "stopped as told; run the same command again to go on"
    how = f"was ended by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"ended with {status}"
    message = f"rank {rank} {how}, so the job was ended; the output of every rank is in {logs}"
    if failure.local_rank > 0:  # what the first one wrote last is on the console
        output = "".join(p.read_text(errors="replace") for p in logs.glob(f"*/*/{failure.local_rank}/stderr.log"))
        message += "".join(f"\n  {line}" for line in output.splitlines()[-SHOWN_LINES:])
    return status, message


def _hand_to_ranks(number: int, frame: FrameType | None) -> None:
    import psutil

    ranks = [child for child in psutil.Process().children() if "latent_sft.cli" in child.cmdline()]
    if not ranks:
        raise SystemExit(STOPPED)  # before training began
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
