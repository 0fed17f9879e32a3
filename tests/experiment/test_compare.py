"""Runs of a comparison as processes: order, failures, stopping, going on; and a real one from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TINY

from latent_sft import cli
from latent_sft.config.load import load_config, to_yaml
from latent_sft.errors import ConfigError, TrainingError
from latent_sft.experiment import compare
from latent_sft.experiment.compare import jobs_of
from latent_sft.experiment.run import run_experiment

COMMAND = [sys.executable, "-m", "latent_sft.cli"]
FILE = """
name: demo
run_dir: {folder}/run
stage1: {{}}
compare: {{seeds: [0, 1], jobs: 2, variants: {{base: [cot.max_steps=1], other: [cot.max_steps=2]}}}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "compare.yaml"
    found.write_text(FILE.format(folder=tmp_path))
    return found


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Return a function: Python code that each run executes in place of the experiment, `name` and `folder` given."""

    def use(code: str) -> None:
        head = (
            "import sys, time, pathlib; folder = pathlib.Path(sys.argv[1]).parent; name = '/'.join(folder.parts[-2:]);"
        )
        head += f"log = open({str(tmp_path / 'log')!r}, 'a', buffering=1); log.write('begin ' + name + '\\n')\n"
        monkeypatch.setattr(compare, "command_of", lambda path: [sys.executable, "-c", head + code, str(path)])
        monkeypatch.setattr(compare, "write_comparison", lambda config, jobs: Path("comparison.html"))

    return use


DONE = "(folder / 'summary.json').write_text('{}'); log.write('end ' + name + '\\n')"


def test_the_first_variant_of_a_seed_comes_first_and_finished_runs_are_skipped(path, scripted, tmp_path, caplog):
    # the first two wait for each other, however slowly the machine starts them
    both = "pathlib.Path(log.name).read_text().count('begin base') >= 2"
    scripted(f"start = time.time()\nwhile not {both} and time.time() < start + 60: time.sleep(0.02)\n{DONE}")
    assert compare.run_comparison(path) == Path("comparison.html")
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines[:2]) == ["begin base/seed-0", "begin base/seed-1"]  # two at once
    for seed in (0, 1):
        assert lines.index(f"end base/seed-{seed}") < lines.index(f"begin other/seed-{seed}")
    assert len(lines) == 8
    with caplog.at_level("INFO", logger="latent_sft"):
        compare.run_comparison(path)
    assert "4 of 4 runs are finished already" in caplog.text
    assert len((tmp_path / "log").read_text().splitlines()) == 8
    # other settings are another run
    compare.run_comparison(path, ["stage2.max_steps=3"])
    assert len((tmp_path / "log").read_text().splitlines()) == 16


def test_a_failing_run_stops_no_other_and_is_named_with_its_log(path, scripted, tmp_path, capsys):
    scripted(f"if name == 'base/seed-0':\n    print('the reason'); raise SystemExit(3)\n{DONE}")
    assert cli.main(["run", str(path)]) == 1
    error = capsys.readouterr().err
    console = tmp_path / "run/base/seed-0/console.log"
    assert f"1 of 4 runs did not finish:\n  base/seed-0: status 3, see {console}\n" in error
    assert "the reason" in console.read_text()
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("end")) == [
        "end base/seed-1",
        "end other/seed-0",
        "end other/seed-1",
    ]
    # the same command runs what failed, and only that
    scripted(DONE)
    assert cli.main(["run", str(path)]) == 0
    assert (tmp_path / "log").read_text().splitlines()[len(lines) :] == ["begin base/seed-0", "end base/seed-0"]
    assert capsys.readouterr().out == "comparison.html\n"


def test_runs_that_were_stopped_from_outside_can_go_on(path, scripted, capsys):
    scripted("raise SystemExit(75)")
    assert cli.main(["run", str(path)]) == 75
    assert "run the same command again to go on" in capsys.readouterr().err


def test_sigterm_is_handed_on_and_the_same_command_goes_on(path, scripted, tmp_path, capsys):
    """The runs save and end by themselves; this process waits for them, and its status says that it can go on."""
    scripted(
        "import signal\n"
        "def stop(*_):\n    time.sleep(0.3); log.write('saved ' + name + '\\n'); raise SystemExit(75)\n"
        "signal.signal(signal.SIGTERM, stop); log.write('ready\\n'); time.sleep(60)"
    )

    def terminate() -> None:
        log = tmp_path / "log"
        while not log.exists() or log.read_text().count("ready") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    assert cli.main(["run", str(path)]) == 75
    assert "stopped by SIGTERM; run the same command again to go on" in capsys.readouterr().err
    assert sorted((tmp_path / "log").read_text().splitlines()[-2:]) == ["saved base/seed-0", "saved base/seed-1"]
    scripted(DONE)
    assert cli.main(["run", str(path)]) == 0
    assert (tmp_path / "log").read_text().count("end ") == 4


def test_one_experiment_is_not_a_comparison(path):
    with pytest.raises(ConfigError, match=r"run_comparison runs a comparison"):
        run_experiment(load_config(path))


def test_nothing_finished_is_nothing_to_compare(path, scripted, monkeypatch):
    real = compare.write_comparison
    scripted("raise SystemExit(1)")
    monkeypatch.setattr(compare, "write_comparison", real)
    with pytest.raises(TrainingError, match="4 of 4 runs did not finish"):
        compare.run_comparison(path)
    assert cli.main(["report", str(path)]) == 2


SETTINGS = [
    *TINY,
    "name=small",
    "launch.cpu_threads=1",
    "stage1.encoder.enabled=false",
    "stage1.decoder.enabled=false",
    "stage1.union.enabled=false",
    "stage2.enabled=false",
    "no_cot.enabled=false",
    "data.validation_size=8",
    "eval.splits=[test]",
    "compare.seeds=[0,1]",
    "compare.jobs=2",
    "compare.bootstrap=200",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A comparison of two variants and two seeds by the real command."""
    folder = tmp_path_factory.mktemp("comparison")
    config = load_config(None, [*SETTINGS, f"run_dir={folder / 'run'}"])
    text = to_yaml(config).replace(
        "variants: {}",
        "variants:\n    baselines: [no_cot.enabled=true]\n    latent: [stage1.union.enabled=true, stage2.enabled=true]",
    )
    (folder / "small.yaml").write_text(text)
    words = [*COMMAND, "run", str(folder / "small.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{folder / 'run/comparison.html'}\n"
    assert done.stderr.count(": finished after") == 4
    return folder


def test_a_real_comparison(finished):
    found = json.loads((finished / "run/comparison.json").read_text())
    rows = {row["model"]: row for row in found["rows"]}
    assert list(rows) == ["no-cot", "cot", "stage1", "latent"]
    assert found["missing"] == [] and found["split"] == "test"
    for name, row in rows.items():
        assert row["seeds"] == [0, 1] and row["num_examples"] == 12
        own = [json.loads(path.read_text()) for path in _evaluations(finished, row)]
        assert row["accuracy"] == pytest.approx(sum(o["summary"]["accuracy"] for o in own) / 2)
        assert ("given" in row["interventions"]) == (name != "no-cot")
    assert rows["latent"]["best"] and rows["latent"]["against_best"] is None
    assert rows["latent"]["against_cot"]["seeds"] == 2
    assert rows["cot"]["forward_passes_mean"] > rows["no-cot"]["forward_passes_mean"]
    for name in ("comparison.md", "comparison.html", "accuracy-vs-forward-passes.png", "accuracy-vs-seconds.png"):
        assert (finished / "run" / name).stat().st_size > 1000, name


def _evaluations(finished: Path, row: dict) -> list[Path]:
    run = finished / "run" / row["variant"]
    return [run / f"seed-{seed}/eval/{row['kind']}/test.json" for seed in (0, 1)]


def test_finished_steps_were_taken_over(finished):
    for seed in (0, 1):
        one, two = (finished / f"run/{variant}/seed-{seed}" for variant in ("baselines", "latent"))
        weights = "cot/final/model.safetensors"
        assert os.path.samefile(one / weights, two / weights)
        assert os.path.samefile(one / "eval/cot/test.json", two / "eval/cot/test.json")
        assert "cot: finished already, skipped" in (two / "console.log").read_text()
        assert not (two / "no-cot").exists()  # not part of that variant
        assert not os.path.samefile(one / "config.yaml", two / "config.yaml")


def test_the_report_is_made_again_and_says_what_is_missing(finished, capsys):
    hidden = finished / "run/latent/seed-1/summary.json"
    content = hidden.read_text()
    hidden.unlink()
    try:
        assert cli.main(["report", str(finished / "small.yaml")]) == 0
    finally:
        hidden.write_text(content)
    assert capsys.readouterr().out == f"{finished / 'run/comparison.html'}\n"
    found = json.loads((finished / "run/comparison.json").read_text())
    assert [m["run"] for m in found["missing"]] == ["latent/seed-1"]
    assert {row["model"]: row["seeds"] for row in found["rows"]} == {
        "no-cot": [0, 1],
        "cot": [0, 1],
        "stage1": [0],
        "latent": [0],
    }
    assert "Not finished: `latent/seed-1`." in (finished / "run/comparison.md").read_text()
    assert "latent/seed-1</code>" in (finished / "run/comparison.html").read_text()
    assert found["rows"][-1]["against_cot"]["seeds"] == 1


def test_jobs_of_the_finished_comparison_are_finished(finished):
    assert all(job.is_finished() for job in jobs_of(finished / "small.yaml"))
