"""The comparison table, from result files written by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from latent_sft.config.load import load_config, to_yaml
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.evaluation import plots
from latent_sft.evaluation.intervals import accuracy_error, paired_difference
from latent_sft.evaluation.report import write_comparison
from latent_sft.evaluation.results import Evaluation, Job, Method, collect, label_methods, mean_of, rows_of, table_of
from latent_sft.experiment.compare import jobs_of

FILE = """
name: A <comparison>
run_dir: {folder}/run
cot: {{}}
stage1: {{init: cot, encoder: {{enabled: false}}, decoder: {{enabled: false}}, union: {{enabled: false}}}}
compare:
  seeds: [0, 1]
  bootstrap: 500
  variants:
    baselines: [no_cot.enabled=true, soft_thinking.enabled=true]
    r2: [stage1.union.enabled=true, stage2.enabled=true]
    r4: [stage1.union.enabled=true, stage2.enabled=true, latent.rate=4]
    kava: [kava.train.enabled=true]
"""
# accuracy, forward passes, of 20 problems
FIGURES = {
    "no-cot": (0.3, 3.0),
    "cot": (0.9, 24.0),
    "soft-thinking": (0.8, 22.0),
    "stage1": (0.95, 10.0),
    "latent-sft": (0.7, 13.0),
    "kava": (0.6, 6.0),
}


# stage -> what it started from
SOURCES = {"cot": "base", "stage1-union": "cot", "stage2": "stage1-union", "kava": "base", "no-cot": "base"}
STAGE_OF = {"stage1": "stage1-union", "latent-sft": "stage2", "soft-thinking": "cot"}


def write_run(job: Job, models: list[str]) -> None:
    """Write a finished run: config, summary, evaluations with manifests, and what training cost."""
    job.directory.mkdir(parents=True)
    (job.directory / "config.yaml").write_text(to_yaml(job.config))
    rng = np.random.default_rng([job.config.seed, len(job.variant)])
    for model in models:
        share, passes = FIGURES[model]
        share -= 0.1 * (job.variant == "r4")
        correct = (rng.random(20) < share).tolist()
        made_from = f"{model}-{job.config.seed}" + ("" if model == "cot" else job.variant)
        summary = {
            "accuracy": sum(correct) / 20,
            "accuracy_se": 0.1,
            "num_examples": 20,
            "forward_passes_mean": passes + job.config.seed,
            "reasoning_steps_mean": passes - 3,
            "seconds_per_problem": passes / 1000,
        }
        if model != "no-cot":
            summary["gold_recall"], summary["gold_recall_chance"] = 0.8, 0.5
            summary["interventions"] = {
                "given": {"accuracy": summary["accuracy"], "difference": 0.0},
                "zero": {"accuracy": 0.1 * job.config.seed, "difference": 0.1 * job.config.seed - summary["accuracy"]},
            }
        problems = [{"id": f"t-{i:02}", "sample": 0, "correct": right} for i, right in enumerate(correct)]
        folder = job.directory / "eval" / model
        (folder / "test").mkdir(parents=True)
        content = {"model": model, "split": "test", "summary": summary, "problems": problems}
        (folder / "test.json").write_text(json.dumps(content))
        manifest = {"status": "finished", "fingerprint": made_from, "inputs": {"model": STAGE_OF.get(model, model)}}
        (folder / "test" / "manifest.json").write_text(json.dumps(manifest))
    for stage, seconds in (("cot", 60.0), ("stage1-union", 30.0), ("stage2", 10.0), ("kava", 20.0), ("no-cot", 5.0)):
        if job.config.stage(stage).enabled:
            (job.directory / stage).mkdir()
            manifest = {"status": "finished", "fingerprint": stage, "inputs": {"source": SOURCES[stage]}}
            manifest |= {"train_seconds": seconds, "examples_seen": 100}
            (job.directory / stage / "manifest.json").write_text(json.dumps(manifest))
    (job.directory / "summary.json").write_text("{}")


MODELS = {
    "baselines": ["no-cot", "cot", "soft-thinking"],
    "r2": ["cot", "stage1", "latent-sft"],
    "r4": ["cot", "stage1", "latent-sft"],
    "kava": ["cot", "kava"],
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> tuple[Path, list[Job]]:
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "compare.yaml"
    path.write_text(FILE.format(folder=folder))
    jobs = jobs_of(path)
    for job in jobs:
        write_run(job, MODELS[job.variant])
    return path, jobs


@pytest.fixture(scope="module")
def rows(comparison) -> dict[str, dict]:
    found = rows_of(collect(comparison[1]), resamples=500)
    return {row["model"]: row for row in found}


def test_every_model_once_and_named_after_its_variant_where_that_is_enough(rows):
    # CoT is part of every variant, and one row; the oracle latents comes with each Latent-SFT
    assert list(rows) == ["no-cot", "cot", "r2/stage1", "r4/stage1", "r2", "r4", "soft-thinking", "kava"]
    assert rows["cot"]["variant"] == "baselines"
    assert [row["kind"] for row in rows.values()] == [
        "no-cot",
        "cot",
        "stage1",
        "stage1",
        "latent-sft",
        "latent-sft",
        "soft-thinking",
        "kava",
    ]


def test_costs_are_means_over_seeds_and_hold_every_stage_that_led_to_a_model(rows):
    assert rows["kava"]["forward_passes_mean"] == 6.5
    # kava starts from the base model; stage 1 started from cot; Soft Thinking trains nothing of its own
    seconds = {name: row["train_seconds"] for name, row in rows.items()}
    assert seconds == {
        "no-cot": 5.0,
        "cot": 60.0,
        "r2/stage1": 90.0,
        "r4/stage1": 90.0,
        "r2": 100.0,
        "r4": 100.0,
        "soft-thinking": 60.0,
        "kava": 20.0,
    }
    assert rows["r2"]["examples_seen"] == 300
    assert rows["kava"]["interventions"]["zero"]["accuracy"] == pytest.approx(0.05)
    assert rows["no-cot"]["interventions"] == {} and "gold_recall" not in rows["no-cot"]


def read(jobs: list[Job], variant: str, model: str) -> np.ndarray:
    """The answers of a model as they stand in the files, `[S, n]`, by a plain loop."""
    table = []
    for job in jobs:
        if job.variant == variant:
            content = json.loads((job.directory / "eval" / model / "test.json").read_text())
            table.append([float(problem["correct"]) for problem in content["problems"]])
    return np.array(table)


def test_accuracies_and_differences_are_those_of_the_files(comparison, rows):
    jobs = comparison[1]
    cot, r2, kava = read(jobs, "baselines", "cot"), read(jobs, "r2", "latent-sft"), read(jobs, "kava", "kava")
    assert rows["r2"]["accuracy"] == pytest.approx(r2.mean())
    assert rows["r2"]["accuracy_se"] == pytest.approx(accuracy_error(r2))
    assert rows["r2"]["accuracy_by_seed"] == {"0": pytest.approx(r2[0].mean()), "1": pytest.approx(r2[1].mean())}
    expected = paired_difference(kava, cot, resamples=500)
    assert rows["kava"]["against_cot"] == {
        "to": "cot",
        "difference": pytest.approx(kava.mean() - cot.mean()),
        "difference_ci": [expected.low, expected.high],
        "seeds": 2,
        "num_examples": 20,
    }
    assert rows["cot"]["against_cot"] is None
    # the oracle latents and Soft Thinking, however good, are not the best latent method
    (best,) = [name for name, row in rows.items() if row["best"]]
    assert best == max(("r2", "r4", "kava"), key=lambda name: rows[name]["accuracy"])
    assert rows[best]["against_best"] is None and rows["no-cot"]["against_best"]["to"] == best


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_pages_hold_tables_plots_and_what_is_missing(comparison):
    path, jobs = comparison
    hidden = jobs[-1].directory / "summary.json"
    hidden.unlink()
    try:
        page = write_comparison(load_config(path), jobs)
    finally:
        hidden.write_text("{}")
    run = page.parent
    html, text = page.read_text(), (run / "comparison.md").read_text()
    assert "A &lt;comparison&gt;" in html and "kava/seed-1</code>" in html
    sources = Page(html).sources
    assert len(sources) == 3 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "Not finished: `kava/seed-1`." in text
    rows = [line for line in text.splitlines() if line.startswith("| kava ")]
    assert rows[0].startswith("| kava | test | 0 | ") and "| 20 | 3.0 | 6.0 |" in rows[0]
    for name in ("accuracy-vs-forward-passes.png", "accuracy-vs-seconds.png", "interventions.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    found = json.loads((run / "comparison.json").read_text())
    assert [m["run"] for m in found["missing"]] == ["kava/seed-1"]
    assert next(r for r in found["rows"] if r["model"] == "kava")["against_cot"]["seeds"] == 1


def test_reference_lines_stand_in_table_and_plots(comparison, monkeypatch):
    path, jobs = comparison
    drawn = []
    original = plots.accuracy_against

    def keep(*args):
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(plots, "accuracy_against", keep)
    page = write_comparison(load_config(path, ["compare.lines={majority: 0.373, parity: 0.612}"]), jobs)
    text = page.with_suffix(".md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| majority |", "| parity |"))]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| majority", "–", "–", "37.3"],
        ["| parity", "–", "–", "61.2"],
    ]
    assert json.loads(page.with_suffix(".json").read_text())["lines"] == {"majority": 0.373, "parity": 0.612}
    for axes in drawn[0].axes:
        assert {"majority  37.3 %", "parity  61.2 %"} <= {text.get_text() for text in axes.texts}
        assert {0.373, 0.612} <= {line.get_ydata()[0] for line in axes.lines}
    with pytest.raises(ConfigError, match=r"compare.lines: got {'x': 37.3}, expected accuracies from 0 to 1"):
        load_config(path, ["compare.lines={x: 37.3}"])


def test_a_seed_that_the_first_variant_lacks_comes_from_another_one(comparison):
    jobs = [job for job in comparison[1] if job.name != "baselines/seed-1"]
    rows = {row["model"]: row for row in rows_of(collect(jobs), resamples=100)}
    assert rows["no-cot"]["seeds"] == [0]
    assert rows["cot"]["seeds"] == [0, 1] and rows["cot"]["variant"] == "baselines"
    assert rows["kava"]["against_cot"]["seeds"] == 2


def test_the_same_weights_decoded_otherwise_are_a_row_of_their_own(comparison):
    job = next(job for job in comparison[1] if job.name == "r4/seed-0")
    path = job.directory / "eval/cot/test/manifest.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"fingerprint": "cot-0, other max_cot_tokens"}))
    try:
        rows = {row["model"]: row for row in rows_of(collect(comparison[1]), resamples=100)}
    finally:
        path.write_text(before)
    assert rows["baselines/cot"]["seeds"] == rows["r4/cot"]["seeds"] == [0, 1]


def test_means_are_those_of_numbers_at_any_depth():
    one = {"a": 1, "b": None, "e": 0.5, "ecr": {"1": 0.25}, "accuracy_se": 0.1, "ci": [0, 1], "grader": "auto"}
    two = {"a": 2, "b": 3.0, "e": None, "ecr": {"1": 0.75, "5": 1.0}, "accuracy_se": 0.2, "ci": [0, 1]}
    # of what some lack, over those that have it; errors and intervals do not average
    assert mean_of([one, two]) == {"a": 1.5, "b": 3.0, "e": 0.5, "ecr": {"1": 0.5, "5": 1.0}}


def test_nothing_finished(comparison, tmp_path):
    path, _ = comparison
    config = load_config(path, [f"run_dir={tmp_path}"])
    with pytest.raises(ArtefactError, match="no finished run to compare"):
        write_comparison(config, jobs_of(path, [f"run_dir={tmp_path}"]))


def method(variant: str, model: str, correct: dict[int, dict[str, float]]) -> Method:
    runs = {}
    for seed, shares in correct.items():
        problems = [{"id": name, "correct": share} for name, share in shares.items()]
        runs[seed] = Evaluation({"model": model, "split": "test"}, problems, "x")
    return Method(variant, model, runs)


def test_labels_are_unique():
    one = {0: {"a": 1.0}}
    several = [method("a", "cot", one), method("a", "kava", one), method("b", "kava", one), method("b", "codi", one)]
    assert [m.label for m in label_methods(several)] == ["cot", "codi", "a/kava", "b/kava"]
    # a variant called as another one's model
    clash = [method("kava", "codi", one), method("a", "kava", one), method("a", "cot", one)]
    assert [m.label for m in label_methods(clash)] == ["cot", "kava/codi", "a/kava"]


def test_pairs_are_the_seeds_and_problems_that_both_have():
    left = method("a", "cot", {0: {"p": 1.0, "q": 0.0}, 2: {"p": 0.0, "q": 1.0, "r": 1.0}})
    right = method("b", "kava", {2: {"r": 0.0, "q": 1.0}, 3: {"q": 1.0}})
    assert table_of(left, right).tolist() == [[1.0, 1.0]]  # seed 2, problems q and r
    assert table_of(right, left).tolist() == [[1.0, 0.0]]
    assert table_of(left).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    strangers = method("c", "codi", {0: {"z": 1.0}})
    assert table_of(left, strangers).size == 0
    rows = {row["model"]: row for row in rows_of(label_methods([left, strangers]), resamples=100)}
    assert rows["c"]["against_cot"] is None
