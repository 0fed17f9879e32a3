"""The real command line, every step, on a tiny experiment; and what happens when one is killed or repeated."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

from latent_sft.data.labels import LabelStore

CLI = [sys.executable, "-m", "latent_sft.cli"]
UNION = ["stage1.init=cot", "stage1.encoder.enabled=false", "stage1.decoder.enabled=false"]


def config_file(folder: Path, *settings: str) -> Path:
    from latent_sft.config.load import load_config, to_yaml

    path = folder / "tiny.yaml"
    path.write_text(to_yaml(load_config(None, [*TINY, "name=tiny", f"run_dir={folder / 'run'}", *settings])))
    return path


def call(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, timeout=280)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole experiment, all three phases of stage 1, by `latent-sft run`."""
    folder = tmp_path_factory.mktemp("whole")
    done = call("run", config_file(folder, "stage1.init=cot"))
    assert "latent-sft" in done.stdout
    return folder


def test_run_writes_everything(finished):
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    for model in ("no-cot", "cot", "stage1", "latent-sft"):
        row = summary[model]
        assert 0 <= row["accuracy"] <= 1
        assert row["num_examples"] == 12
        assert row["train_seconds"] > 0
    assert summary["no-cot"]["reasoning_steps_mean"] == 0
    assert summary["no-cot"]["examples_seen"] == summary["cot"]["examples_seen"] == 32
    assert summary["total_seconds"] > 0
    for path in ("config.yaml", "report/report.html", "report/report.md", "export/latent_spec.json", "labels/store"):
        assert (run / path).exists(), path
    manifest = json.loads((run / "stage2" / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["versions"]["torch"]
    assert manifest["seed"] == 0
    assert (
        manifest["inputs"]["source"] == json.loads((run / "stage1-union" / "manifest.json").read_text())["fingerprint"]
    )


def test_a_second_run_does_nothing_again(finished):
    run = finished / "run"
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/final/**/*.safetensors")}
    done = call("run", finished / "tiny.yaml")
    assert done.stderr.count("finished already, skipped") == 7  # six stages and the labels
    assert {p: p.stat().st_mtime_ns for p in run.glob("*/final/**/*.safetensors")} == before


def test_plan_lists_the_steps_as_commands(finished):
    out = call("plan", finished / "tiny.yaml").stdout
    order = [out.index(f"train {stage}") for stage in ("no-cot", "cot", "stage1-encoder", "stage1-union", "stage2")]
    assert order == sorted(order)
    assert "finished" in out


def test_generate_shows_latents_and_answer(finished):
    problem = "bob has 3 . wins 2 . how many ?"
    for checkpoint in ("stage2/final", "export", "cot/final"):
        found = json.loads(call("generate", finished / "run" / checkpoint, problem, "--json").stdout)
        assert "answer" in found
    shown = call("generate", finished / "run" / "export", problem).stdout
    assert "answer" in shown.lower()


def test_another_experiment_in_the_same_folder_is_refused(finished):
    done = call("run", finished / "tiny.yaml", "latent.rate=4", status=2)
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "latent.rate was 2, now 4" in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_of_another_rate_and_a_corrupted_shard_are_refused(tmp_path):
    config = config_file(tmp_path, *UNION, "no_cot.enabled=false")
    for words in (("train", "cot"), ("train", "stage1-union"), ("label",)):
        call(*words, config)
    shard = tmp_path / "run" / "labels" / "store" / "labels-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    assert "labels-00001.arrow" in call("train", "stage2", config, status=2).stderr
    assert not (tmp_path / "run" / "stage2" / "manifest.json").exists()


def test_labels_resume_after_a_kill(tmp_path):
    config = config_file(tmp_path, *UNION, "no_cot.enabled=false", "labels.shard_size=2", "labels.batch_size=1")
    for stage in ("cot", "stage1-union"):
        call("train", stage, config)
    store = tmp_path / "run" / "labels" / "store"
    job = subprocess.Popen([*CLI, "label", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(store.glob("labels-*.json"))) < 5 and time.monotonic() < end and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    done = {p: p.stat().st_mtime_ns for p in store.glob("labels-*.json")}
    assert 5 <= len(done) < 60, "the kill came too late to show anything"
    call("label", config)
    assert len(LabelStore(store)) == 120
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in done.items())


def test_several_processes_make_the_same_labels(tmp_path):
    stores = []
    for name, processes in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        config = config_file(folder, *UNION, "no_cot.enabled=false", f"labels.num_processes={processes}")
        for words in (("train", "cot"), ("train", "stage1-union"), ("label",)):
            call(*words, config)
        stores.append([p.read_bytes() for p in sorted((folder / "run" / "labels" / "store").glob("*.arrow"))])
    assert len(stores[0]) == 3
    assert stores[0] == stores[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("latent.rte=3", "Did you mean 'latent.rate'?"),
        ("latent.rate=0", "latent.rate: got 0"),
        ("latent.top_k=5000", "latent.top_k: got 5000, expected 1 to"),
        ("data.train=nothing.jsonl", "nothing.jsonl"),
        ("model.name_or_path=./nowhere", "model.name_or_path"),
    ],
)
def test_mistakes_give_one_message_and_status_two(tmp_path, setting, message):
    done = call(
        "train", "cot", config_file(tmp_path), setting, *(["data.test="] if "train=" in setting else []), status=2
    )
    assert message in done.stderr
    assert "Traceback" not in done.stderr
