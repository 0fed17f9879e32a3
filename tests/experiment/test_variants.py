"""The runs of a comparison are read before anything runs, and take over from each other only what fits."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from conftest import NAMED

from latent_sft import cli
from latent_sft.config.load import load_config, to_yaml
from latent_sft.config.schema import CompareConfig
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.experiment.compare import jobs_of
from latent_sft.experiment.graph import plan_comparison
from latent_sft.runs import Step, write_json

FILE = """
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
def path(tmp_path: Path) -> Path:
    found = tmp_path / "compare.yaml"
    found.write_text(FILE.format(folder=tmp_path))
    return found


def test_every_variant_with_every_seed(path, tmp_path):
    jobs = jobs_of(path)
    assert [job.name for job in jobs] == ["base/seed-3", "wide/seed-3", "base/seed-5", "wide/seed-5"]
    wide = jobs[3].config
    assert (wide.seed, wide.latent.rate, wide.cot.max_steps, wide.stage2.enabled) == (5, 4, 7, True)
    assert (wide.name, wide.directory) == ("demo-wide", f"{tmp_path}/run/wide/seed-5")
    assert wide.compare == CompareConfig()  # or the run would be a comparison itself
    assert (jobs[0].config.latent.rate, jobs[0].config.cot.max_steps, jobs[0].config.stage2.enabled) == (2, 5, False)


def test_the_command_line_wins_over_a_variant_and_its_file(path):
    jobs = jobs_of(path, ["cot.max_steps=1", "compare.seeds=[9]"])
    assert [(job.config.seed, job.config.cot.max_steps, job.config.latent.rate) for job in jobs] == [
        (9, 1, 2),
        (9, 1, 4),
    ]


def test_a_job_is_what_its_file_says(path, tmp_path):
    for job in jobs_of(path):
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
def test_a_mistake_in_any_variant_comes_before_anything_runs(path, setting, message, capsys, tmp_path):
    path.write_text(path.read_text().replace("latent.rate=4", setting))
    with pytest.raises(ConfigError, match=message):
        jobs_of(path)
    assert cli.main(["run", str(path)]) == 2
    assert "compare.variants.wide" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["train", "cot"], ["label"], ["eval"], ["export"]])
def test_a_comparison_is_no_experiment(path, words, capsys):
    assert cli.main([*words, str(path)]) == 2
    error = capsys.readouterr().err
    assert "is a comparison (compare.variants), expected one experiment" in error
    assert "run/VARIANT/seed-N/config.yaml" in error


def test_plan_lists_the_runs(path, capsys):
    jobs = jobs_of(path)
    jobs[1].directory.mkdir(parents=True)
    jobs[2].directory.mkdir(parents=True)
    (jobs[2].directory / "config.yaml").write_text(to_yaml(jobs[2].config))
    (jobs[2].directory / "summary.json").write_text("{}")
    lines = plan_comparison(load_config(path), jobs, path).splitlines()
    stages = "no-cot, cot, stage1-encoder, stage1-decoder, stage1-union"
    assert lines[1:5] == [
        f"# 1. base/seed-3: {stages} [to do]",
        f"# 2. wide/seed-3: {stages}, stage2 [begun, not finished]",
        f"# 3. base/seed-5: {stages} [finished]",
        f"# 4. wide/seed-5: {stages}, stage2 [to do]",
    ]
    assert lines[-1] == f"latent-sft run {path}"
    assert cli.main(["plan", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    # finished with other settings is not finished
    assert not jobs_of(path, ["cot.max_steps=1"])[2].is_finished()


def made(config, name: str, **files: str) -> Path:
    """Write a finished step as far as `reuse` looks at it."""
    step = Step(directory=Path(config.directory) / name, inputs={})
    step.begin(seed=0)
    step.finish()
    for file, text in {"weights": "abc", ".lock": "process 7", **files}.items():
        (step.directory / file).write_text(text)
    return step.directory


@pytest.fixture
def pair(tmp_path):
    source = load_config(None, [*NAMED, f"run_dir={tmp_path}/one", "stage2.enabled=false"])
    return source, dataclasses.replace(source, run_dir=f"{tmp_path}/two")


def test_finished_steps_are_linked_without_lock_and_checkpoints(pair):
    source, target = pair
    folder = made(source, "cot")
    (folder / "checkpoint-5").mkdir()
    (folder / "final").mkdir()
    (folder / "final" / "model").write_text("w")
    made(source, "base")
    (Path(source.directory) / "data" / "train").mkdir(parents=True)
    (Path(source.directory) / "data" / "train" / "rows.arrow").write_text("rows")
    Step(directory=Path(source.directory) / "no-cot", inputs={}).begin(seed=0)  # not finished
    assert reuse_steps(source, target) == ["base", "data", "cot"]
    new = Path(target.directory) / "cot"
    assert sorted(p.name for p in new.iterdir()) == ["final", "manifest.json", "weights"]
    assert os.path.samefile(new / "final" / "model", folder / "final" / "model")
    # what is there stays; a step finished later is still taken
    (new / "weights").unlink()
    (new / "weights").write_text("own")
    made(source, "no-cot")
    assert reuse_steps(source, target) == ["no-cot"]
    assert (new / "weights").read_text() == "own" and (folder / "weights").read_text() == "abc"


def test_an_evaluation_is_taken_where_all_its_splits_are_done(pair):
    source, target = pair
    made(source, "eval/cot/test")
    unfinished = Step(directory=Path(source.directory) / "eval/cot/validation", inputs={})
    unfinished.begin(seed=0)
    assert reuse_steps(source, target) == []
    unfinished.finish()
    write_json(Path(source.directory) / "eval/cot/test.json", {"model": "cot"})
    assert reuse_steps(source, target) == ["eval/cot"]
    assert (Path(target.directory) / "eval/cot/test.json").exists()


@pytest.mark.parametrize(
    ("setting", "taken"),
    [
        ("seed=1", []),
        ("data.synthetic.modulus=7", []),
        ("model.dtype=bfloat16", []),
        ("prompt.think=<t>", []),
        ("cot.max_steps=7", ["base", "data", "no-cot"]),
        ("cot.enabled=false", ["base", "data", "no-cot"]),
        ("latent.rate=4", ["base", "no-cot", "cot"]),
        ("eval.limit=7", ["base", "data", "no-cot", "cot"]),
    ],
)
def test_only_what_both_would_make_alike_is_taken(tmp_path, setting, taken):
    source = load_config(None, [*NAMED, f"run_dir={tmp_path}/one"])
    target = load_config(None, [*NAMED, f"run_dir={tmp_path}/two", "stage2.max_steps=3", setting])
    for name in ("base", "no-cot", "cot", "eval/cot/test"):
        made(source, name)
    (Path(source.directory) / "data").mkdir()
    evaluation = ["eval/cot"] if "cot" in taken and "data" in taken and "eval" not in setting else []
    assert reuse_steps(source, target) == [*taken, *evaluation]


def test_files_are_copied_where_they_cannot_be_linked_and_nothing_partial_stays(pair, monkeypatch):
    source, target = pair
    made(source, "cot")

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    left_over = Path(target.directory) / ".cot.part"
    left_over.mkdir(parents=True)
    (left_over / "junk").touch()
    assert reuse_steps(source, target) == ["cot"]
    new = Path(target.directory) / "cot"
    assert (new / "weights").read_text() == "abc" and not (new / "junk").exists()
    monkeypatch.setattr("shutil.copy2", refuse)
    made(source, "no-cot")
    with pytest.raises(ArtefactError, match=r"no-cot: could not be taken over from .*cross-device"):
        reuse_steps(source, target)
    assert [p.name for p in Path(target.directory).iterdir()] == ["cot"]
