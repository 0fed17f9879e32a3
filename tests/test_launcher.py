"""Starting a stage on several processes: the command line, who starts it, and what its exit status becomes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from latent_sft import launcher
from latent_sft.config.schema import LaunchConfig


def test_command() -> None:
    command = launcher.build_command("stage2", Path("configs/a b.yaml"), ["seed=1"], LaunchConfig(nproc=4))
    assert command == [
        sys.executable, "-m", "latent_sft.launcher", "--standalone", "--nproc-per-node=4",
        "--", "stage2", "configs/a b.yaml", "seed=1",
    ]  # fmt: skip
    alone = launcher.build_command("stage2", "a.yaml", ["seed=1"], LaunchConfig(nproc=1))
    assert alone == [sys.executable, "-m", "latent_sft.cli", "train", "stage2", "a.yaml", "seed=1"]


def test_torchrun_understands_the_command(tmp_path: Path) -> None:
    from torch.distributed.run import config_from_args, parse_args

    options = ["--nnodes=2", "--nproc-per-node=3", "--rdzv-backend=c10d", "--rdzv-endpoint=a:1", "--rdzv-id=x"]
    arguments = launcher.torchrun_arguments(options, tmp_path, ["cot", "a.yaml", "seed=1"])
    config, program, words = config_from_args(parse_args(arguments))
    assert (config.min_nodes, config.nproc_per_node, config.rdzv_endpoint, config.run_id) == (2, 3, "a:1", "x")
    assert config.max_restarts == 0
    assert "SIGTERM" not in config.signals_to_handle
    assert config.logs_specs.root_log_dir == str(tmp_path)
    assert [program, *words] == [sys.executable, "-u", "-m", "latent_sft.cli", "train", "cot", "a.yaml", "seed=1"]


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


def test_a_signal_is_handed_on_and_the_status_returns(tmp_path: Path) -> None:
    # the inner process stands for the launcher: it answers SIGUSR1 with the status of a stopped job
    inner = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    outer = (
        "import sys; from latent_sft import launcher\n"
        f"raise SystemExit(launcher.start([sys.executable, '-c', {inner!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", outer], cwd=tmp_path) as process:
        wait_for(tmp_path / "ready")
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(timeout=30) == 75


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    inner = (
        "import os, pathlib, time; from latent_sft import launcher\n"
        "launcher.end_with_parent(os.getppid())\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], cwd=tmp_path) as process:
        wait_for(tmp_path / "ready")
        rank = int((tmp_path / "pid").read_text())
        process.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def failure(exitcode: int, local_rank: int, timestamp: int = 5) -> types.SimpleNamespace:
    """Like torchrun's ProcessFailure."""
    return types.SimpleNamespace(exitcode=exitcode, local_rank=local_rank, timestamp=timestamp)


@pytest.mark.parametrize(
    ("ended", "status", "message"),
    [
        ({0: 1, 1: -signal.SIGKILL}, 137, "rank 1 was ended by SIGKILL, so the job was ended"),
        ({0: -signal.SIGTERM, 3: 2}, 2, "rank 3 ended with 2, so the job was ended"),
        ({0: 1, 1: 75, 2: -signal.SIGTERM}, 75, "stopped as told; run the same command again to go on"),
    ],
)
def test_the_rank_that_failed_first_explains_the_job(tmp_path, ended, status, message) -> None:
    assert launcher.explain({r: failure(code, r) for r, code in ended.items()}, tmp_path)[0] == status
    assert launcher.explain({r: failure(code, r) for r, code in ended.items()}, tmp_path)[1].startswith(message)


def test_the_last_lines_of_a_rank_that_is_not_on_the_console_are_shown(tmp_path: Path) -> None:
    for rank in (0, 1):
        folder = tmp_path / "job_x" / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        (folder / "stderr.log").write_text(f"words of {rank}\nerror: data.train is empty in rank {rank}\n")
    _, message = launcher.explain({1: failure(2, 1)}, tmp_path)
    assert message.endswith(f"in {tmp_path}\n  words of 1\n  error: data.train is empty in rank 1")
    _, message = launcher.explain({0: failure(2, 0)}, tmp_path)
    assert "words" not in message


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_interrupt_ends_the_job_before_it_returns(tmp_path: Path) -> None:
    # the inner process stands for torchrun: on SIGTERM it ends its workers, here: it writes a file
    inner = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path('ended').touch()\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    # a shell starts what runs in the background with SIGINT ignored, and children inherit that
    listens = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    outer = f"{listens}; from latent_sft import launcher; launcher.start([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "ready")
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
