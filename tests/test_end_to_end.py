"""The real command line, every step, on a tiny experiment; and what happens when one is killed or repeated."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

from latent_sft.cli import main
from latent_sft.config.load import load_config, to_yaml
from latent_sft.data.labels import LabelStore
from latent_sft.experiment.stores import make_labels
from latent_sft.runs import CLAIM, LOCK

SETTINGS = ("stage1.init=cot", "labels.shard_size=4", "launch.concurrent_baseline=true", "launch.cpu_threads=1")
COMMAND = [sys.executable, "-m", "latent_sft.cli"]


def config_file(folder: Path, *settings: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(load_config(None, [*TINY, "name=tiny", f"run_dir={folder / 'run'}", *settings])))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole experiment, all three phases of stage 1, by `latent-sft run` in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    words = [*COMMAND, "run", str(config_file(folder, *SETTINGS))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "latent-sft" in done.stdout
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished experiment that a test may spoil; its configuration file points to it."""
    shutil.copytree(finished / "run", tmp_path / "run")
    config_file(tmp_path, *SETTINGS)
    return tmp_path


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


def test_a_second_run_does_nothing_again(finished, caplog):
    run = finished / "run"
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/final/**/*.safetensors")}
    with caplog.at_level("INFO", logger="latent_sft"):
        assert main(["run", str(finished / "tiny.yaml")]) == 0
    assert caplog.text.count("finished already, skipped") == 7  # six stages and the labels
    assert {p: p.stat().st_mtime_ns for p in run.glob("*/final/**/*.safetensors")} == before


def test_plan_lists_the_steps_as_commands(finished, capsys):
    assert main(["plan", str(finished / "tiny.yaml")]) == 0
    out = capsys.readouterr().out
    order = [out.index(f"train {stage}") for stage in ("no-cot", "cot", "stage1-encoder", "stage1-union", "stage2")]
    assert order == sorted(order)
    assert "finished" in out


@pytest.mark.parametrize("checkpoint", ["stage2/final", "export", "cot/final", "no-cot/final"])
def test_generate_shows_latents_and_answer(finished, checkpoint, capsys):
    folder, problem = str(finished / "run" / checkpoint), "bob has 3 . wins 2 . how many ?"
    assert main(["generate", folder, problem, "--json"]) == 0
    assert "answer" in json.loads(capsys.readouterr().out)
    assert main(["generate", folder, problem]) == 0
    assert "answer" in capsys.readouterr().out.lower()


def test_another_experiment_in_the_same_folder_is_refused(finished, capsys):
    assert main(["run", str(finished / "tiny.yaml"), "latent.rate=4"]) == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert "latent.rate was 2, now 4" in error
    assert "Traceback" not in error


def test_a_corrupted_label_shard_is_refused_before_anything_is_written(copied, capsys):
    shutil.rmtree(copied / "run" / "stage2")
    shard = copied / "run" / "labels" / "store" / "labels-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    assert main(["train", "stage2", str(copied / "tiny.yaml")]) == 2
    assert "labels-00001.arrow" in capsys.readouterr().err
    assert {path.name for path in (copied / "run" / "stage2").iterdir()} == {LOCK, CLAIM}


def test_labels_of_another_rate_are_refused(copied, capsys):
    """Somebody else's store put in place of ours: same rows, other settings."""
    shutil.rmtree(copied / "run" / "stage2")
    manifest = copied / "run" / "labels" / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rate": 2', '"rate": 4'))
    assert main(["train", "stage2", str(copied / "tiny.yaml")]) == 2
    assert "rate" in capsys.readouterr().err


def test_labels_resume_after_a_kill(copied):
    """Batches of one row and shards of four: the kill falls between the first shard and the last."""
    config = str(copied / "tiny.yaml")
    shutil.rmtree(copied / "run" / "labels")
    store = copied / "run" / "labels" / "store"
    words = [*COMMAND, "label", config, "labels.batch_size=1"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        end = time.monotonic() + 120
        while len(list(store.glob("labels-*.json"))) < 3 and time.monotonic() < end and job.poll() is None:
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
    done = {p: p.stat().st_mtime_ns for p in store.glob("labels-*.json")}
    assert 3 <= len(done) < 30, "the kill came too late to show anything"
    assert main(["label", config]) == 0
    assert len(LabelStore(store)) == 120
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in done.items())


def test_two_processes_make_the_same_labels(copied):
    config = load_config(copied / "tiny.yaml", ["labels.num_processes=2"])
    store = copied / "run" / "labels" / "store"
    before = [p.read_bytes() for p in sorted(store.glob("*.arrow"))]
    shutil.rmtree(copied / "run" / "labels")
    make_labels(config)
    assert len(before) == 30
    assert [p.read_bytes() for p in sorted(store.glob("*.arrow"))] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["latent.rte=3"], "Did you mean 'latent.rate'?"),
        (["latent.rate=0"], "latent.rate: got 0"),
        (["latent.top_k=5000"], "latent.top_k: got 5000, expected 1 to"),
        (["data.train=nothing.jsonl", "data.test="], "nothing.jsonl: no such file"),
        (["model.name_or_path=./nowhere"], "model.name_or_path"),
    ],
)
def test_mistakes_give_one_message_and_status_two(tmp_path, settings, message, capsys):
    assert main(["train", "cot", str(config_file(tmp_path)), *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_evaluation_reads_its_own_split_and_leaves_no_problem_out_for_its_cot(tmp_path, capsys):
    """Six problems, of which one has a usable CoT: six are graded, and the oracle latents says what it lacks."""
    good = [{"problem": f"{i} + 1", "cot": f"{i} + 1 = {i + 1}", "answer": i + 1} for i in range(30)]
    odd = [{"cot": "1 + 7 = 8"}, {"cot": "1 " * 500}, {"cot": "1 </think> 1"}, {}, {"cot": ["1"]}, {"steps": "1"}]
    test = [{"problem": f"{i} + 7", "answer": i + 7, **cot} for i, cot in enumerate(odd, start=1)]
    for name, values in (("train", good), ("test", [*test, {"problem": "1 " * 200, "answer": 1}, {"problem": "p"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    settings = [f"data.train={tmp_path}/train.jsonl", f"data.test={tmp_path}/test.jsonl", "data.validation_size=6"]
    settings += ["data.max_cot_tokens=100", "data.max_prompt_tokens=100", "data.on_error=skip", "eval.splits=[test]"]
    settings += ["stage1.decoder.enabled=false", "stage1.union.enabled=false", "stage2.enabled=false"]
    words = [str(config_file(tmp_path, *settings)), "cot.enabled=false"]
    for stage in ("no-cot", "stage1-encoder"):
        assert main(["train", stage, *words]) == 0, capsys.readouterr().err
    assert not (tmp_path / "run/data/test").exists(), "training reads no test set"
    shutil.rmtree(tmp_path / "run/data/train")
    assert main(["eval", *words]) == 0, capsys.readouterr().err
    assert not (tmp_path / "run/data/train").exists(), "evaluation on test reads no training set"

    results = {
        model: json.loads((tmp_path / "run/eval" / model / "test.json").read_text()) for model in ("no-cot", "stage1")
    }
    assert [p["reference"] for p in results["no-cot"]["problems"]] == ["8", "9", "10", "11", "12", "13"]
    assert results["no-cot"]["summary"]["skipped"] == {"bad row": 1, "too long": 1}
    assert results["stage1"]["summary"]["num_examples"] == 1
    assert results["stage1"]["summary"]["skipped"] == {"bad row": 1, "too long": 1, "no usable CoT": 5}
