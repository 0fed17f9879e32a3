"""The files of launch/: clean, without settings of the experiment, and each tried as far as one machine goes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_sft.config.load import dotted_keys, to_yaml
from latent_sft.train.run import train_stage

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
IMAGES = {"Dockerfile", "latent_sft.def"}
FILES = sorted(path for path in LAUNCH.iterdir() if path.name not in IMAGES)
BIN = Path(sys.executable).parent
ENVIRON = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_shellcheck_finds_nothing() -> None:
    assert {"local.sh", "multi_node.sh", "deepspeed_hostfile.sh", "slurm.sbatch"} == {p.name for p in FILES}
    found = subprocess.run([BIN / "shellcheck", *FILES], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_launch_file_says_where_and_not_what(path: Path) -> None:
    text = path.read_text()
    head = text.split("\nset -euo pipefail")[0].splitlines()
    assert len(head) >= 5 and all(line.startswith("#") for line in head), "documented at its top"
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    given = {*re.findall(r"([a-z][\w.]*)=", code)} & {*dotted_keys()}
    assert given <= {"launch.nproc", "seed", "run_dir"}
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_without_a_stage_a_launch_file_says_how_to_use_it(path: Path) -> None:
    refused = subprocess.run([path, "cot"], env=ENVIRON, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("usage: ") and "STAGE CONFIG [key=value ...]" in refused.stderr


def stub(folder: Path, name: str, text: str) -> None:
    """Put a command that stands for another one into a folder."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder at the head of PATH that records calls in `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "python", "scontrol"):
        stub(folder, name, f'echo "{name} $*" >> {tmp_path}/calls; echo node7; echo node8')
    stub(folder, "latent-sft", 'if [[ $1 == config ]]; then echo "runs/demo"; fi')
    return folder


def called(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_deepspeed_hostfile(stubs: Path, tmp_path: Path) -> None:
    environ = {"PATH": f"{stubs}:{os.environ['PATH']}", "HOSTFILE": "hosts"}
    command = [LAUNCH / "deepspeed_hostfile.sh", "cot", "a b.yaml", "seed=1"]
    subprocess.run(command, env=environ, cwd=tmp_path, check=True)
    [call] = called(tmp_path)
    logs = next((tmp_path / "runs/demo/logs/cot").iterdir()).relative_to(tmp_path)
    options = f"--hostfile=hosts --enable_each_rank_log={logs} --no_local_rank --module"
    assert call == f"deepspeed {options} latent_sft.cli train cot a b.yaml seed=1"


def test_deepspeed_reads_that_command_line(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    options = ["--hostfile=h", "--enable_each_rank_log=l", "--no_local_rank", "--module"]
    args = parse_args([*options, "latent_sft.cli", "train", "cot"])
    assert (args.user_script, args.user_args) == ("latent_sft.cli", ["train", "cot"])
    assert args.module and args.no_local_rank
    (tmp_path / "hosts").write_text("node7 slots=8\nnode8 slots=8\n")
    assert dict(fetch_hostfile(str(tmp_path / "hosts"))) == {"node7": 8, "node8": 8}


@pytest.mark.slow
def test_deepspeed_trains_on_the_machine_of_a_hostfile(tiny_config, stubs: Path, tmp_path: Path) -> None:
    """DeepSpeed's own launcher starts two ranks; only ssh, which it asks for the address of the first host, is ours."""
    for name in ("deepspeed", "python", "latent-sft"):
        (stubs / name).unlink()
    stub(stubs, "ssh", "echo 127.0.0.1")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_config(f"run_dir={tmp_path / 'run'}")))
    environ = {**ENVIRON, "PATH": f"{stubs}:{ENVIRON['PATH']}", "HOSTFILE": str(tmp_path / "hosts")}
    command = [LAUNCH / "deepspeed_hostfile.sh", "cot", str(tmp_path / "tiny.yaml")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "cot" / "manifest.json").read_text())["steps"] == 4
    assert len(list((tmp_path / "run" / "logs" / "cot").glob("*/*_rank[01].log"))) == 2


def slurm(stubs: Path, tmp_path: Path, srun: str, **environ: str) -> subprocess.Popen:
    stub(stubs, "srun", f'echo "srun $* ; $NNODES $HEAD $PORT $JOB" >> {tmp_path}/calls\n{srun}')
    environ = {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": "/repo",
        **environ,
    }
    return subprocess.Popen([LAUNCH / "slurm.sbatch", "stage2", "demo.yaml", "name=x"], env=environ, cwd=tmp_path)


def test_slurm_starts_one_launcher_a_node(stubs: Path, tmp_path: Path) -> None:
    with slurm(stubs, tmp_path, "exit 3") as job:
        assert job.wait(timeout=30) == 3
    assert called(tmp_path) == [
        "scontrol show hostnames node[7-8]",
        "srun --kill-on-bad-exit=0 /repo/launch/multi_node.sh stage2 demo.yaml name=x ; 2 node7 24321 4321-0",
    ]


def test_slurm_runs_in_a_container(stubs: Path, tmp_path: Path) -> None:
    stub(stubs, "apptainer", f'echo "apptainer $*" >> {tmp_path}/calls; shift 3; "$@"')
    with slurm(stubs, tmp_path, "exit 0", CONTAINER="my image.sif", SLURM_ARRAY_TASK_ID="2") as job:
        assert job.wait(timeout=30) == 0
    first, _, second = called(tmp_path)
    assert first == "apptainer exec --nv my image.sif latent-sft config --directory demo.yaml name=x"
    launched = "srun --kill-on-bad-exit=0 apptainer exec --nv my image.sif /repo/launch/multi_node.sh stage2 demo.yaml"
    assert second.startswith(f"{launched} name=x seed=2 run_dir=runs/demo-seed2")


def test_hadolint_finds_nothing() -> None:
    found = subprocess.run([BIN / "hadolint", LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_images_are_built_from_the_constraints() -> None:
    """Neither can be built here: both install by constraints.txt, with the Python it was made for."""
    texts = [(LAUNCH / name).read_text() for name in sorted(IMAGES)]
    for text in texts:
        assert re.search(r"^\s*(?:FROM |From: )python:3\.11-slim-bookworm", text, re.M)
        installs = re.findall(r"pip install (?!\|)(.*)", text)
        assert installs and all("-c constraints.txt" in line for line in installs)
        assert not re.findall(r"==\s*\d", text), "versions stand in constraints.txt alone"
        assert "python -m pytest -n 2" in text.replace("-p no:cacheprovider ", "")
    copied = re.findall(r"^    (\S+) /opt/latent_sft/$", texts[1], re.M)
    tracked = {name.split("/")[0] for name in git_files()} - {".gitignore", ".dockerignore"}
    assert {*copied} == tracked


def git_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=LAUNCH.parent, capture_output=True, text=True, check=False)
    return listed.stdout.split() or [str(path.relative_to(LAUNCH.parent)) for path in LAUNCH.parent.glob("*/*")]


def test_a_seed_of_a_slurm_array_has_its_own_run(stubs: Path, tmp_path: Path) -> None:
    with slurm(stubs, tmp_path, "exit 0", SLURM_ARRAY_TASK_ID="2", SLURM_RESTART_COUNT="1") as job:
        assert job.wait(timeout=30) == 0
    assert "name=x seed=2 run_dir=runs/demo-seed2 ; 2 node7 24321 4321-1" in called(tmp_path)[1]


def test_slurm_preemption_saves_and_requeues(stubs: Path, tmp_path: Path) -> None:
    # srun ends its tasks on SIGTERM, and hands SIGUSR1 on
    trap = f"trap 'touch {tmp_path}/told; sleep 0.3; exit 75' USR1"
    srun = f"{trap}; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    with slurm(stubs, tmp_path, srun) as job:
        wait_for(lambda: (tmp_path / "ready").exists(), job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 75
    assert (tmp_path / "told").exists()
    assert called(tmp_path)[-1] == "scontrol requeue 4321"


def wait_for(condition, *jobs: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited for two minutes"
        assert all(job.poll() is None for job in jobs), "a job ended early"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_nodes_stop_together_and_one_process_goes_on(tiny_config, tmp_path: Path) -> None:
    """Two "nodes" of one process on loopback; one is told to stop. One process goes on, with steps as large.

    Against one process that was never interrupted: the same losses. (Two and two, with noise: tests/slow.)
    """
    only_union = ["stage1.encoder.enabled=false", "stage1.decoder.enabled=false"]
    train = ["stage1.union.max_steps=40", "stage1.union.eval_every=40"]
    configs = {
        name: tiny_config(f"run_dir={tmp_path / name}", *only_union, *train, f"stage1.union.micro_batch_size={batch}")
        for name, batch in (("whole", 8), ("stopped", 4))
    }
    path, folder = tmp_path / "stopped.yaml", tmp_path / "stopped" / "stage1-union"
    path.write_text(to_yaml(configs["stopped"]))
    environ = {**ENVIRON, "NNODES": "2", "HEAD": "127.0.0.1", "PORT": str(free_port()), "NPROC": "1", "JOB": "t"}
    command = [LAUNCH / "multi_node.sh", "stage1-union", str(path)]
    nodes = [subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(lines(folder)) > 3, *nodes)
    nodes[1].send_signal(signal.SIGTERM)
    output = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], output
    shown = {"0" if "[0] stage1-union: starts" in text else "1": text for text in output}
    for rank, text in shown.items():
        assert f"[{rank}] stage1-union: stopped at step" in text and f"[{1 - int(rank)}]" not in text
        assert text.endswith("stage1-union: stopped as told; run the same command again to go on\n")
    stopped_at = len(lines(folder))
    assert [p.name for p in folder.glob("checkpoint-*")] == [f"checkpoint-{stopped_at}"] and stopped_at < 40
    logs = list((tmp_path / "stopped" / "logs" / "stage1-union").glob("*/*/attempt_0/0/stderr.log"))
    assert len(logs) == 2 and all("stage1-union: starts" in log.read_text() for log in logs)

    for config in configs.values():
        train_stage(config, "stage1-union")
    assert [line["step"] for line in lines(folder)] == list(range(1, 41))
    losses = [[line["train/loss"] for line in lines(tmp_path / name / "stage1-union")] for name in configs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def lines(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if "train/loss" in line]
