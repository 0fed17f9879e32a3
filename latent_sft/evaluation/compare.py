"""The comparison of finished runs: one row a method, over all its seeds.

Reads, of every finished run of a comparison, what its report reads.
Writes
    <run>/comparison.json     {"title", "split", "rows": [...], "missing": [...], "notes"}; see `rows_of`
    <run>/comparison.md       the tables
    <run>/comparison.html     one file with tables and plots
    <run>/accuracy-vs-forward-passes.png  accuracy-vs-seconds.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latent_sft.config.experiment import Config
from latent_sft.errors import ArtefactError
from latent_sft.evaluation.compare_page import render, write_tables
from latent_sft.evaluation.intervals import accuracy_error, paired_difference
from latent_sft.evaluation.report import SPLITS, read_run
from latent_sft.methods import MODELS
from latent_sft.plan import models_of
from latent_sft.runs import MANIFEST, read_json, write_atomically, write_json
from latent_sft.variants import Job

LATENT = ("latent-sft", "coconut", "codi", "pccot", "kava")
"""Models that were trained to think in latents and read nothing but the problem."""
MEANS = (
    "forward_passes_mean",
    "reasoning_steps_mean",
    "seconds_per_problem",
    "train_seconds",
    "examples_seen",
    "gold_recall",
    "gold_recall_chance",
    "gold_recall_top1",
    "gold_recall_top1_chance",
)


@dataclass
class Method:
    """A model of a variant, over its seeds.

    Attributes:
        variant: where it was trained first.
        model: of `methods.MODELS`.
        results: by seed: summary and costs, as in a report.
        correct: by seed: share of right answers by problem id.
        identity: by seed: what it was made from; equal for the same model in two variants.
        label: its name in tables.
    """

    variant: str
    model: str
    results: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    correct: dict[int, dict[str, float]] = field(default_factory=dict)
    identity: dict[int, str] = field(default_factory=dict)
    label: str = ""


def write_comparison(config: Config, jobs: Sequence[Job]) -> Path:
    """Write the comparison of those jobs that are finished and return the path of `comparison.html`.

    Raises:
        ArtefactError: no job is finished.
    """
    done = [job for job in jobs if job.is_finished()]
    if not done:
        raise ArtefactError(f"{config.directory}: no finished run to compare; `latent-sft run` makes them.")
    split = _split(done)
    methods = label_methods(collect(done, split))
    rows = rows_of(methods, resamples=config.compare.bootstrap)
    missing = [{"run": job.name, "console": str(job.console)} for job in jobs if job not in done]
    found = {"title": config.name, "split": split, "rows": rows, "missing": missing}
    out = Path(config.directory)
    write_json(out / "comparison.json", found)
    page, pictures = render(found)
    for name, png in pictures.items():
        write_atomically(out / name, png)
    write_atomically(out / "comparison.md", write_tables(found, list(pictures)))
    write_atomically(out / "comparison.html", page)
    return out / "comparison.html"


def collect(jobs: Sequence[Job], split: str) -> list[Method]:
    """Return the methods of finished jobs on a split; the same model of several variants is one, of the first of them.

    The same: trained with the same settings from the same start (equal fingerprints), and thinking alike.
    """
    methods: list[Method] = []
    by_variant = {job.variant: [j for j in jobs if j.variant == job.variant] for job in jobs}
    for variant, runs in by_variant.items():
        read = {job.config.seed: (job, read_run(job.directory)) for job in runs}
        for model in models_of(runs[0].config):
            found = Method(variant, model)
            for seed, (job, run) in read.items():
                result = next((r for r in run.results if (r["model"], r["split"]) == (model, split)), None)
                if result is not None:
                    found.results[seed] = result
                    found.correct[seed] = _shares(run.problems[model, split])
                    found.identity[seed] = _identity(job.directory / "eval" / model / split / MANIFEST)
            twin = next((m for m in methods if m.model == model and _same(m, found)), None)
            if twin is None:
                methods.append(found)
                continue
            for name in ("results", "correct", "identity"):  # a seed that the first variant lacks
                getattr(twin, name).update({**getattr(found, name), **getattr(twin, name)})
    return [method for method in methods if method.results]


def label_methods(methods: list[Method]) -> list[Method]:
    """Name each method after its variant where that contributes just one, else after its model, or after both.

    The gold path `stage1` comes with every Latent-SFT and does not count.
    """
    for method in methods:
        own = [m for m in methods if m.variant == method.variant and m.model != "stage1"]
        alone = len(own) == 1 and method.model != "stage1"
        unique = sum(m.model == method.model for m in methods) == 1
        method.label = method.variant if alone else method.model if unique else f"{method.variant}/{method.model}"
    taken = [method.label for method in methods]
    for method in methods:
        if taken.count(method.label) > 1:
            method.label = f"{method.variant}/{method.model}"
    return sorted(methods, key=lambda m: list(MODELS).index(m.model))


def rows_of(methods: Sequence[Method], *, resamples: int) -> list[dict[str, Any]]:
    """Return one row a method: costs as means over its seeds, accuracy over seeds and problems, paired differences.

    Row: `model` (label), `kind` (of `methods.MODELS`), `variant`, `split`, `seeds`, `num_examples`, `accuracy`,
    `accuracy_se` (see `intervals.accuracy_error`), `accuracy_by_seed`, MEANS, `interventions` {name: {accuracy,
    difference}}, and the differences `against_cot` and `against_best` {difference, difference_ci, seeds,
    num_examples}: to the model `cot`, and to the method of LATENT with the highest accuracy, which was chosen by
    looking at these results. Pairs are formed over the seeds and problems that both have.
    """
    cot = next((m for m in methods if m.model == "cot"), None)
    latent = [m for m in methods if m.model in LATENT]
    best = max(latent, key=lambda m: float(table_of(m).mean()), default=None)
    rows = []
    for method in methods:
        correct = table_of(method)
        results = list(method.results.values())
        row: dict[str, Any] = {
            "model": method.label,
            "kind": method.model,
            "variant": method.variant,
            "split": results[0]["split"],
            "seeds": sorted(method.results),
            "num_examples": correct.shape[1],
            "accuracy": float(correct.mean()),
            "accuracy_se": accuracy_error(correct),
            "accuracy_by_seed": {
                str(s): float(np.mean(list(method.correct[s].values()))) for s in sorted(method.correct)
            },
        }
        for key in MEANS:
            row[key] = _mean([r.get(key) for r in results])
        row["interventions"] = _interventions(results)
        row["against_cot"] = _against(method, cot, resamples)
        row["against_best"] = _against(method, best, resamples)
        row["best"] = method is best
        rows.append(row)
    return rows


def table_of(method: Method, other: Method | None = None) -> np.ndarray:
    """Return `[S, n]`: share of right answers by seed and problem, of those that it has for all seeds.

    With another method, of the seeds and problems that both have, in the same order for both.
    """
    seeds = sorted(method.correct.keys() & (other or method).correct.keys())
    tables = [m.correct[s] for m in (method, other or method) for s in seeds]
    ids = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return np.array([[method.correct[s][i] for i in ids] for s in seeds]).reshape(len(seeds), len(ids))


def _against(method: Method, other: Method | None, resamples: int) -> dict[str, Any] | None:
    if other is None or other is method:
        return None
    left, right = table_of(method, other), table_of(other, method)
    if left.size == 0:
        return None
    found = paired_difference(left, right, resamples=resamples)
    return {
        "to": other.label,
        "difference": found.value,
        "difference_ci": [found.low, found.high],
        "seeds": left.shape[0],
        "num_examples": left.shape[1],
    }


def _interventions(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    names = dict.fromkeys(name for r in results for name in r.get("interventions") or {})
    return {
        name: {
            key: _mean([(r.get("interventions") or {}).get(name, {}).get(key) for r in results])
            for key in ("accuracy", "difference")
        }
        for name in names
    }


def _split(jobs: Sequence[Job]) -> str:
    there = {path.stem for job in jobs for path in (job.directory / "eval").glob("*/*.json")}
    return next((split for split in SPLITS if split in there), SPLITS[0])


def _shares(problems: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    samples: dict[str, list[bool]] = {}
    for problem in problems:
        samples.setdefault(str(problem["id"]), []).append(problem["correct"])
    return {name: sum(right) / len(right) for name, right in samples.items()}


def _identity(path: Path) -> str:
    inputs = read_json(path)["inputs"]
    return json.dumps([inputs["model"], inputs.get("soft")], sort_keys=True)


def _same(one: Method, other: Method) -> bool:
    shared = one.identity.keys() & other.identity.keys()
    return bool(shared) and all(one.identity[s] == other.identity[s] for s in shared)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
