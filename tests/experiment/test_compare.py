"""Runs of a comparison: which steps they share; as processes: failures, stopping, going on; and a real one."""

from __future__ import annotations

import json
import os
import shutil
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
from latent_sft.config.schema import CompareConfig
from latent_sft.errors import ConfigError, TrainingError
from latent_sft.experiment import compare
from latent_sft.experiment.compare import jobs_of
from latent_sft.experiment.graph import plan_comparison
from latent_sft.experiment.run import run_experiment
from latent_sft.experiment.workspace import Workspace
from latent_sft.runs import read_json

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


VARIANTS = """
name: demo
run_dir: {folder}/run
compare:
  seeds: [3, 5]
  variants:
    base: [stage2.enabled=false]
    wide: [latent.rate=4, cot.max_steps=7]
no_cot: {{}}
cot: {{max_steps: 5}}
stage1:
stage2:
"""


@pytest.fixture
def variants(tmp_path: Path) -> Path:
    found = tmp_path / "variants.yaml"
    found.write_text(VARIANTS.format(folder=tmp_path))
    return found


def test_every_variant_with_every_seed(variants, tmp_path):
    jobs = jobs_of(variants)
    assert [job.name for job in jobs] == ["base/seed-3", "wide/seed-3", "base/seed-5", "wide/seed-5"]
    wide = jobs[3].config
    assert (wide.seed, wide.latent.rate, wide.cot.max_steps, wide.stage2.enabled) == (5, 4, 7, True)
    assert (wide.name, wide.directory) == ("demo-wide", f"{tmp_path}/run/wide/seed-5")
    assert wide.compare == CompareConfig()  # or the run would be a comparison itself
    assert (jobs[0].config.latent.rate, jobs[0].config.cot.max_steps, jobs[0].config.stage2.enabled) == (2, 5, False)


def test_the_command_line_wins_over_a_variant_and_its_file(variants):
    jobs = jobs_of(variants, ["cot.max_steps=1", "compare.seeds=[9]"])
    assert [(job.config.seed, job.config.cot.max_steps, job.config.latent.rate) for job in jobs] == [
        (9, 1, 2),
        (9, 1, 4),
    ]


def test_a_job_is_what_its_file_says(variants, tmp_path):
    for job in jobs_of(variants):
        copy = tmp_path / "job.yaml"
        copy.write_text(to_yaml(job.config))
        assert load_config(copy) == job.config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("latent.rat=4", r"compare\.variants\.wide: .*'latent\.rat'\. Did you mean 'latent\.rate'"),
        ("latent.rate=0", r"compare\.variants\.wide: latent\.rate: got 0"),
        ("seed=4", r"compare\.variants\.wide: 'seed' is decided by the comparison"),
        ("compare.jobs=4", r"compare\.variants\.wide: 'compare\.jobs' is decided by the comparison"),
    ],
)
def test_a_mistake_in_any_variant_comes_before_anything_runs(variants, setting, message, capsys, tmp_path):
    variants.write_text(variants.read_text().replace("latent.rate=4", setting))
    with pytest.raises(ConfigError, match=message):
        jobs_of(variants)
    assert cli.main(["run", str(variants)]) == 2
    assert "compare.variants.wide" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["train", "cot"], ["label"], ["eval"], ["export"]])
def test_a_comparison_is_no_experiment(variants, words, capsys):
    assert cli.main([*words, str(variants)]) == 2
    error = capsys.readouterr().err
    assert "is a comparison (compare.variants), expected one experiment" in error
    assert "run/VARIANT/seed-N/config.yaml" in error


def test_plan_lists_the_runs_and_which_steps_they_share(variants, capsys):
    jobs = jobs_of(variants)
    for job in jobs[1:3]:
        job.directory.mkdir(parents=True)
        (job.directory / "config.yaml").write_text(to_yaml(job.config))
    (jobs[2].directory / "summary.json").write_text("{}")
    lines = plan_comparison(load_config(variants), jobs, variants).splitlines()
    first, second = (lines.index(f"# {n}. {job.name} [{how}]") for n, job, how in (
        (1, jobs[0], "to do"), (2, jobs[1], "begun, not finished"),
    ))  # fmt: skip
    assert f"# 3. {jobs[2].name} [finished]" in lines and f"# 4. {jobs[3].name} [to do]" in lines
    assert lines[first + 1 : first + 5] == [f"#      {name} [to do]" for name in ("base", "data", "no-cot", "cot")]
    assert lines[second + 1 : second + 5] == [
        "#      base as in base/seed-3",
        "#      data [to do]",  # other latents are another spec
        "#      no-cot as in base/seed-3",
        "#      cot [to do]",
    ]
    assert lines[-1] == f"latent-sft run {variants}"
    assert cli.main(["plan", str(variants)]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    # finished with other settings is not finished
    assert not jobs_of(variants, ["cot.max_steps=1"])[2].is_finished()


def links(folder: Path) -> dict[str, str]:
    """Return what a run shares: its place in the run, and the shared folder without its fingerprint."""
    found = {path: os.readlink(path) for path in [*folder.iterdir(), *(folder / "eval").glob("*")] if path.is_symlink()}
    return {str(path.relative_to(folder)): Path(to).name.rpartition("-")[0] for path, to in found.items()}


def test_equal_steps_have_one_folder_and_everything_else_stays_in_its_run(variants, tmp_path):
    jobs = jobs_of(variants)
    compare.share(jobs, tmp_path / "run")
    for job in jobs:
        assert links(job.directory) == {"base": "base", "no-cot": "no-cot"}
    one, two, other, _ = (job.directory for job in jobs)
    assert (one / "base").resolve() == (two / "base").resolve() != (other / "base").resolve()
    assert not os.readlink(one / "base").startswith("/")  # the whole can be moved


@pytest.mark.parametrize("before", [False, True])
def test_what_one_run_had_is_shared_once_another_needs_it(path, tmp_path, before):
    """Adding a variant to a finished comparison trains nothing again; settings that changed are another folder."""
    text = path.read_text().replace("[0, 1]", "[0]").replace("jobs: 2", "jobs: 1")
    path.write_text(text.replace(", other: [cot.max_steps=2]", ""))
    (old,) = jobs_of(path, ["cot.enabled=true"])
    compare.share([old], tmp_path / "run")
    assert not old.directory.exists()  # alone it shares nothing
    (old.directory / "cot").mkdir(parents=True)
    (old.directory / "cot" / "weights").touch()
    (old.directory / "config.yaml").write_text(to_yaml(old.config))
    if before:
        (old.directory / "summary.json").touch()
    path.write_text(text.replace("[cot.max_steps=2]", "[cot.max_steps=1, stage1.noise_scale=1.0]"))
    both = jobs_of(path, ["cot.enabled=true"])
    for _ in range(2):  # a command that goes on finds the same
        compare.share(both, tmp_path / "run")
        # what is not known to be of these settings stays where it is
        assert (old.directory / "cot").is_symlink() == before
        assert (both[1].directory / "cot" / "weights").exists() == before
    assert (old.directory / "cot" / "weights").exists()
    path.write_text(path.read_text().replace("max_steps=1", "max_steps=2"))
    changed = jobs_of(path, ["cot.enabled=true"])
    compare.share(changed, tmp_path / "run")
    assert not (changed[1].directory / "cot" / "weights").exists()
    assert len(list((tmp_path / "run" / "shared").glob("cot-*/weights"))) == before


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


def test_a_variant_after_the_other_and_finished_runs_are_skipped(path, scripted, tmp_path, caplog):
    # the first two wait for each other, however slowly the machine starts them
    both = "pathlib.Path(log.name).read_text().count('begin base') >= 2"
    scripted(f"start = time.time()\nwhile not {both} and time.time() < start + 60: time.sleep(0.02)\n{DONE}")
    assert compare.run_comparison(path) == Path("comparison.html")
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines[:2]) == ["begin base/seed-0", "begin base/seed-1"]  # two at once
    assert len(lines) == 8
    with caplog.at_level("INFO", logger="latent_sft"):
        compare.run_comparison(path)
    assert "4 of 4 runs are finished already" in caplog.text
    assert len((tmp_path / "log").read_text().splitlines()) == 8
    # other settings are another run
    compare.run_comparison(path, ["stage2.max_steps=3"])
    assert len((tmp_path / "log").read_text().splitlines()) == 16


def test_without_locks_one_run_at_a_time(path, scripted, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("latent_sft.runs.fcntl.flock", refuse)
    scripted(DONE)
    compare.run_comparison(path)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["begin", "end"] * 4


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
    """A comparison of two variants and two seeds by the real command, killed once."""
    folder = tmp_path_factory.mktemp("comparison")
    config = load_config(None, [*SETTINGS, f"run_dir={folder / 'run'}"])
    text = to_yaml(config).replace(
        "variants: {}",
        "variants:\n    baselines: [no_cot.enabled=true]\n    latent: [stage1.union.enabled=true, stage2.enabled=true]",
    )
    (folder / "small.yaml").write_text(text)
    words = [*COMMAND, "run", str(folder / "small.yaml")]
    # killed as soon as the first shared stage trains, whoever trains it
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        end = time.monotonic() + 120
        while not any(folder.glob("run/shared/cot-*/manifest.json")) and time.monotonic() < end and job.poll() is None:
            time.sleep(0.02)
        job.kill()
    assert any(folder.glob("run/shared/cot-*/manifest.json"))
    assert not (folder / "run/comparison.html").exists()
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


def test_what_both_variants_have_was_made_once(finished):
    shared = {"base": "base", "cot": "cot", "data": "data", "eval/cot": "eval-cot"}
    assert len(list((finished / "run/shared").iterdir())) == 2 * len(shared)
    for seed in (0, 1):
        one, two = (finished / f"run/{variant}/seed-{seed}" for variant in ("baselines", "latent"))
        assert links(one) == links(two) == shared
        assert (one / "cot").resolve() == (two / "cot").resolve()
        assert not (two / "no-cot").exists()  # not part of that variant
        trained = [line for run in (one, two) for line in (run / "console.log").read_text().splitlines()]
        assert any("cot: finished already, skipped" in line for line in trained)
        # every step of training once, in whichever process it was
        steps = [json.loads(line) for line in (one / "cot/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "train/loss" in line] == [1, 2, 3, 4]


def test_fingerprints_say_the_same_as_the_links(finished):
    """What the configuration tells to be equal is equal by the content of files; runs stay ordinary runs."""
    for seed in (0, 1):
        runs = [finished / f"run/{variant}/seed-{seed}" for variant in ("baselines", "latent")]
        works = [Workspace(load_config(run / "config.yaml")) for run in runs]
        assert works[0].step("cot").inputs == works[1].step("cot").inputs
        assert all(work.step("cot").is_finished() for work in works)
    assert cli.main(["eval", str(runs[1] / "config.yaml"), "--model", "cot"]) == 0
    assert cli.main(["report", str(runs[1] / "config.yaml")]) == 0
    assert cli.main(["export", str(runs[1] / "config.yaml"), "--out", str(finished / "export")]) == 0
    shutil.copytree(runs[1], finished / "copy")  # links are followed: a run of its own
    assert read_json(finished / "copy/cot/manifest.json")["status"] == "finished"


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
