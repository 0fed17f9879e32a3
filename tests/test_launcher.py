"""Starting a stage on several processes: the command line, who starts it, and what its exit status becomes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_sft import launcher
from latent_sft.config.schema import LaunchConfig


def test_command() -> None:
    command = launcher.build_command("stage2", Path("configs/a b.yaml"), ["seed=1"], LaunchConfig(nproc=4))
    assert command == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
        "-m", "latent_sft.cli", "train", "stage2", "configs/a b.yaml", "seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
        # a cluster may set the size of the job without starting one process for each
        ({"WORLD_SIZE": "2"}, False),
    ],
)
def test_worker_is_recognised(environ: dict[str, str], expected: bool) -> None:
    assert launcher.is_worker(environ) is expected


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the commands instead of running them."""
    commands: list[list[str]] = []

    def start(command: list[str]) -> int:
        commands.append(command)
        return 7

    monkeypatch.setattr(launcher, "start", start)
    return commands


def test_one_process_trains_here(started: list[list[str]]) -> None:
    assert launcher.relaunch_if_needed("cot", "a.yaml", [], LaunchConfig(nproc=1)) is None
    assert not started


def test_a_worker_trains_here(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher.relaunch_if_needed("cot", "a.yaml", [], LaunchConfig(nproc=2)) is None
    assert not started


def test_several_processes_are_launched(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launch = LaunchConfig(nproc=2)
    assert launcher.relaunch_if_needed("cot", "a.yaml", ["seed=1"], launch) == 7
    assert started == [launcher.build_command("cot", "a.yaml", ["seed=1"], launch)]


def test_output_streams_and_status_returns(capfd: pytest.CaptureFixture[str]) -> None:
    assert launcher.start([sys.executable, "-c", "print('step 1'); raise SystemExit(3)"]) == 3
    assert capfd.readouterr().out == "step 1\n"


def test_death_by_signal_is_a_failure() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert launcher.start([sys.executable, "-c", code]) == 128 + signal.SIGKILL


def test_interrupt_ends_the_job_before_it_returns(tmp_path: Path) -> None:
    # the inner process stands for torchrun: on SIGTERM it ends its workers, here: it writes a file
    inner = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path('ended').touch()\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    outer = f"import sys; from latent_sft import launcher; launcher.start([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        process.wait(timeout=30)
    assert process.returncode != 0
    assert (tmp_path / "ended").exists()


def test_local_script_passes_everything_on(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "launch/local.sh"
    (tmp_path / "latent-sft").write_text('#!/bin/sh\necho "$OMP_NUM_THREADS: $*"\n')
    (tmp_path / "latent-sft").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": "2", "OMP_NUM_THREADS": "3"}
    command = [str(script), "stage2", "quickstart", "seed=1"]
    run = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    assert run.stdout == "3: train stage2 quickstart launch.nproc=2 seed=1\n"
    refused = subprocess.run([str(script)], env=environ, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("usage: local.sh STAGE CONFIG")
