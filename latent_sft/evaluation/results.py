"""What finished runs hold, from their files alone: one run as rows, and many runs as rows over their seeds.

Reads, of a run
    eval/<model>/<split>.json           {"model", "split", "summary", "problems"}, the last two from `score.score`
    eval/<model>/<split>/manifest.json  fingerprint and inputs of the evaluation
    <step>/manifest.json                fingerprint, inputs, and of a training stage train_seconds, examples_seen
    <stage>/metrics.jsonl               one object per line: {"step": 20, "train/loss": 1.5, "eval/accuracy": 0.8, ...}
    config.yaml                         shown
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_sft.config.experiment import Config
from latent_sft.config.load import to_yaml
from latent_sft.errors import ArtefactError
from latent_sft.evaluation.intervals import accuracy_error, paired_difference
from latent_sft.methods import MODELS, STAGES
from latent_sft.runs import MANIFEST, outcome_of, read_json

Row = Mapping[str, Any]
SPLITS = ("test", "validation")


class Job(NamedTuple):
    """One run of a comparison.

    Attributes:
        variant: its name.
        config: the experiment: the file, the variant's settings, those of the command line, and its seed.
    """

    variant: str
    config: Config

    @property
    def name(self) -> str:
        """`<variant>/seed-<n>`, its folder below the comparison's."""
        return f"{self.variant}/seed-{self.config.seed}"

    @property
    def directory(self) -> Path:
        """Run directory."""
        return Path(self.config.directory)

    @property
    def console(self) -> Path:
        """File of its output."""
        return self.directory / "console.log"

    def is_finished(self) -> bool:
        """Return whether a run with exactly these settings came to its end."""
        path = self.directory / "config.yaml"
        done = (self.directory / "summary.json").exists() and path.exists()
        return done and path.read_text(encoding="utf-8") == to_yaml(self.config)


@dataclass(frozen=True)
class Evaluation:
    """A model on a split.

    Attributes:
        row: its summary plus `model, kind` (both its name), `split, train_seconds, examples_seen`; a model costs every
            stage that led to it.
        problems: records of the problems.
        fingerprint: of everything that decided the result; equal for the same model in two variants.
    """

    row: Row
    problems: Sequence[Row]
    fingerprint: str

    @cached_property
    def correct(self) -> dict[str, float]:
        """Share of right answers by problem id."""
        samples: dict[str, list[bool]] = {}
        for problem in self.problems:
            samples.setdefault(str(problem["id"]), []).append(problem["correct"])
        return {name: sum(right) / len(right) for name, right in samples.items()}


class Run(NamedTuple):
    """A run: its evaluations, the most important split first, and by trained stage its manifest and its curves."""

    evaluations: Sequence[Evaluation]
    stages: Mapping[str, Row]
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    config: str


@dataclass
class Method:
    """A model of a variant (the first that has it), with its evaluation by seed, and its name in tables."""

    variant: str
    model: str
    runs: dict[int, Evaluation]
    label: str = ""


def read_run(directory: Path) -> Run:
    """Read what a report is made from.

    Raises:
        ArtefactError: no evaluation results, or a damaged file.
    """
    steps = {path.parent.name: read_json(path) for path in directory.glob(f"*/{MANIFEST}")}
    made = {outcome_of(manifest): manifest for manifest in steps.values()}
    evaluations = []
    for path in (directory / "eval").glob("*/*.json"):
        found = read_json(path)
        if not isinstance(found, dict) or {"model", "split", "summary"} - found.keys():
            raise ArtefactError(f"{path}: not an evaluation result; delete it and run latent-sft eval again.")
        manifest_path = path.with_suffix("") / MANIFEST
        manifest = read_json(manifest_path) if manifest_path.exists() else {}
        row = {"model": found["model"], "kind": found["model"], "split": found["split"], **found["summary"]}
        for key in ("train_seconds", "examples_seen"):
            costs = [m[key] for m in _led_to(manifest, made).values() if m.get(key) is not None]
            row[key] = sum(costs) if costs else None
        evaluations.append(Evaluation(row, found.get("problems", []), manifest.get("fingerprint", str(path))))
    if not evaluations:
        raise ArtefactError(f"{directory / 'eval'}: no evaluation results; run latent-sft eval first.")
    evaluations.sort(key=lambda e: (*_rank(e.row["split"], SPLITS), *_rank(e.row["model"], list(MODELS))))
    stages = {stage: steps[stage] for stage in STAGES if stage in steps}
    curves = {s: read_curves(path) for s in stages if (path := directory / s / "metrics.jsonl").exists()}
    config = directory / "config.yaml"
    return Run(evaluations, stages, curves, config.read_text(encoding="utf-8") if config.exists() else "")


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return `(step, value)` pairs by tag from a metrics file, in the order of steps.

    A resumed run repeats steps: the last value counts. A line cut by a kill is left out, as are values that are not
    finite.
    """
    found: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            continue
        for tag, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(tag, {})[step] = value
    return {tag: sorted(points.items()) for tag, points in found.items()}


def collect(jobs: Sequence[Job], split: str = "") -> list[Method]:
    """Return the methods of finished jobs on a split (their most important one), named and in the order of tables.

    The same model in several variants (equal fingerprints in the seeds that both have) is one method, of the first.
    """
    read = {(job.variant, job.config.seed): read_run(job.directory) for job in jobs}
    split = split or min(
        (e.row["split"] for run in read.values() for e in run.evaluations), key=lambda s: _rank(s, SPLITS)
    )
    methods: list[Method] = []
    for variant, config in {job.variant: job.config for job in jobs}.items():
        for model in config.models():
            runs = {
                seed: evaluation
                for (name, seed), run in read.items()
                for evaluation in run.evaluations
                if (name, model, split) == (variant, evaluation.row["model"], evaluation.row["split"])
            }
            twin = next((m for m in methods if m.model == model and _same(m.runs, runs)), None)
            if twin is not None:
                twin.runs = runs | twin.runs  # a seed that the first variant lacks
            elif runs:
                methods.append(Method(variant, model, runs))
    return label_methods(methods)


def label_methods(methods: list[Method]) -> list[Method]:
    """Name each method after its variant where that contributes just one, else after its model, or after both.

    An oracle comes with every model of its method and does not count.
    """
    for method in methods:
        own = [m for m in methods if m.variant == method.variant and role_of(m.model) != "oracle"]
        unique = sum(m.model == method.model for m in methods) == 1
        alone = own == [method]
        method.label = method.variant if alone else method.model if unique else f"{method.variant}/{method.model}"
    taken = [method.label for method in methods]
    for method in methods:
        if taken.count(method.label) > 1:
            method.label = f"{method.variant}/{method.model}"
    return sorted(methods, key=lambda m: _rank(m.model, list(MODELS)))


def rows_of(methods: Sequence[Method], *, resamples: int) -> list[dict[str, Any]]:
    """Return one row per method: accuracy over seeds and problems, paired differences, and means of the other numbers.

    A row is that of a run, and `model` (label), `kind` (of MODELS), `variant`, `seeds`, `num_examples`, `accuracy`,
    `accuracy_se` (see `intervals.accuracy_error`), `accuracy_by_seed`, and the differences `against_cot` and
    `against_best` {to, difference, difference_ci, seeds, num_examples}: to the baseline, and to the latent method
    with the highest accuracy (`best`), which was chosen by looking at these results. Pairs are formed over the seeds
    and problems that both have.
    """
    baseline = next((m for m in methods if role_of(m.model) == "baseline"), None)
    latent = [m for m in methods if role_of(m.model) == "latent"]
    best = max(latent, key=lambda m: float(table_of(m).mean()), default=None)
    rows = []
    for method in methods:
        correct, seeds = table_of(method), sorted(method.runs)
        rows.append(
            {"interventions": {}}
            | mean_of([method.runs[seed].row for seed in seeds])
            | {
                "model": method.label,
                "kind": method.model,
                "variant": method.variant,
                "split": method.runs[seeds[0]].row["split"],
                "seeds": seeds,
                "num_examples": correct.shape[1],
                "accuracy": float(correct.mean()),
                "accuracy_se": accuracy_error(correct),
                "accuracy_by_seed": {str(s): float(np.mean([*method.runs[s].correct.values()])) for s in seeds},
                "against_cot": _against(method, baseline, resamples),
                "against_best": _against(method, best, resamples),
                "best": method is best,
            }
        )
    return rows


def mean_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the means of the numbers that several rows hold, in dictionaries too; errors and intervals have none."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row if not key.endswith("_se")):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values and isinstance(values[0], Mapping):
            found[key] = mean_of(values)
        elif values and isinstance(values[0], int | float):
            found[key] = sum(values) / len(values)
    return found


def table_of(method: Method, other: Method | None = None) -> np.ndarray:
    """Return `[S, n]`: share of right answers by seed and problem, of those that it has for all seeds.

    With another method, of the seeds and problems that both have, in the same order for both.
    """
    seeds = sorted(method.runs.keys() & (other or method).runs.keys())
    tables = [m.runs[s].correct for m in (method, other or method) for s in seeds]
    ids = sorted(set.intersection(*map(set, tables))) if tables else []
    return np.array([[method.runs[s].correct[i] for i in ids] for s in seeds]).reshape(len(seeds), len(ids))


def role_of(model: str) -> str:
    """Return the role of a model, empty where it has none."""
    return MODELS[model].role if model in MODELS else ""


def _led_to(manifest: Row, made: Mapping[Any, Row]) -> dict[Any, Row]:
    # a step names what it was made from by fingerprints among its inputs
    found = {}
    for value in manifest.get("inputs", {}).values():
        if isinstance(value, str) and value in made:
            found |= {value: made[value]} | _led_to(made[value], made)
    return found


def _against(method: Method, other: Method | None, resamples: int) -> dict[str, Any] | None:
    if other is None or other is method or not (left := table_of(method, other)).size:
        return None
    found = paired_difference(left, table_of(other, method), resamples=resamples)
    return {
        "to": other.label,
        "difference": found.value,
        "difference_ci": [found.low, found.high],
        "seeds": left.shape[0],
        "num_examples": left.shape[1],
    }


def _same(one: Mapping[int, Evaluation], other: Mapping[int, Evaluation]) -> bool:
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[seed].fingerprint == other[seed].fingerprint for seed in shared)


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)
