"""The report of a run, from its result files alone: `report.json`, `report.md`, `report.html` and one picture.

Reads
    <run>/eval/<model>/<split>.json   {"model", "split", "summary", "problems"}, the last two from `score.score`
    <run>/<stage>/manifest.json       train_seconds, examples_seen (where the stage was trained)
    <run>/<stage>/metrics.jsonl       one object a line: {"step": 20, "train/loss": 1.5, "eval/accuracy": 0.8, ...}
    <run>/config.yaml                 shown, and asked which stages start from the cot stage
Writes
    <run>/report/report.html          one file, opens from disk, nothing loaded from elsewhere
    <run>/report/report.md            the tables
    <run>/report/report.json          {"title", "run", "results": [...], "stages": {...}}; a result is its summary plus
                                      model, split, train_seconds, examples_seen
    <run>/report/accuracy_vs_steps.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latent_sft.errors import ArtefactError
from latent_sft.evaluation import page, plots
from latent_sft.evaluation.tables import intervention_table, latent_table, markdown, result_table
from latent_sft.methods import MODELS, STAGES
from latent_sft.runs import MANIFEST, read_json, write_atomically, write_json

SPLITS = ("test", "validation")
_STAGE1 = ("stage1-encoder", "stage1-decoder", "stage1-union")
STAGES_OF = {"stage1": _STAGE1, "latent-sft": (*_STAGE1, "stage2"), "soft-thinking": ("cot",)}
"""Models that are not the outcome of the one stage of their name."""
PICTURE = "accuracy_vs_steps.png"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the report says about a run.

    Attributes:
        directory: run directory.
        results: one a model and split: its summary plus `model, split, train_seconds, examples_seen`.
        problems: records of the problems by (model, split).
        stages: manifest by trained stage.
        curves: by stage, by tag: `(step, value)` pairs.
        config: text of the configuration, may be empty.
    """

    directory: Path
    results: Sequence[Mapping[str, Any]]
    problems: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
    stages: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    config: str


def write_report(run_dir: str | Path, *, title: str) -> Path:
    """Write the report of a run and return the path of `report.html`.

    Args:
        run_dir: run directory with at least one evaluation.
        title: heading of the report.

    Raises:
        ArtefactError: no evaluation results, or a damaged result file.
    """
    run = read_run(Path(run_dir))
    out = run.directory / "report"
    picture = plots.accuracy_against(run.results)
    figures = {stage: plots.training_curves(curves) for stage, curves in run.curves.items()}
    first = [r for r in run.results if r["split"] == run.results[0]["split"]]
    others = {"by_steps": plots.accuracy_by_cot_steps(first), "interventions": plots.interventions(first)}
    if any(r.get("forward_passes_mean") for r in run.results):
        others["passes"] = plots.accuracy_against(run.results, "forward_passes_mean")
    write_atomically(out / PICTURE, plots.to_bytes(picture, "png"))
    write_json(
        out / "report.json", {"title": title, "run": str(run.directory), "results": run.results, "stages": run.stages}
    )
    write_atomically(out / "report.md", _markdown(run, title))
    html = page.render(
        title=title,
        results=run.results,
        problems=run.problems,
        pictures={
            "accuracy": plots.to_bytes(picture, "svg"),
            **{name: plots.to_bytes(figure, "svg") for name, figure in {**others, **figures}.items() if figure},
        },
        stages=run.stages,
        config=run.config,
    )
    write_atomically(out / "report.html", html)
    return out / "report.html"


def read_run(directory: Path) -> Run:
    """Read what the report is made from.

    Raises:
        ArtefactError: no evaluation results, or a damaged file.
    """
    config = (directory / "config.yaml").read_text(encoding="utf-8") if (directory / "config.yaml").exists() else ""
    stages = {s: read_json(directory / s / MANIFEST) for s in STAGES if (directory / s / MANIFEST).exists()}
    settings = yaml.safe_load(config) or {}
    results, problems = [], {}
    for path in (directory / "eval").glob("*/*.json"):
        found = read_json(path)
        if not isinstance(found, dict) or {"model", "split", "summary"} - found.keys():
            if path.name == MANIFEST:  # of the evaluation step itself
                continue
            raise ArtefactError(f"{path}: not an evaluation result; delete it and run latent-sft eval again.")
        model, split = found["model"], found["split"]
        led = _led_to(model, settings)
        cost = {key: _total(stages, led, key) for key in ("train_seconds", "examples_seen")}
        results.append({"model": model, "split": split, **found["summary"], **cost})
        problems[model, split] = found.get("problems", [])
    if not results:
        raise ArtefactError(f"{directory / 'eval'}: no evaluation results; run latent-sft eval first.")
    results.sort(key=lambda r: (_rank(r["split"], SPLITS), _rank(r["model"], list(MODELS))))
    curves = {s: read_curves(p) for s in STAGES if (p := directory / s / "metrics.jsonl").exists()}
    return Run(directory=directory, results=results, problems=problems, stages=stages, curves=curves, config=config)


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


def _led_to(model: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    # a model costs every stage that led to it
    stages = STAGES_OF.get(model, (model,))
    section = settings.get("stage1" if model in ("stage1", "latent-sft") else model) or {}
    return ("cot", *stages) if section.get("init") == "cot" else stages


def _total(stages: Mapping[str, Any], names: Sequence[str], key: str) -> float | None:
    values = [stages[name][key] for name in names if name in stages and stages[name].get(key) is not None]
    return sum(values) if values else None


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _markdown(run: Run, title: str) -> str:
    parts = [f"# {title}\n", markdown(result_table(run.results)), page.COST_NOTE]
    parts.append(f"![accuracy against reasoning length]({PICTURE})\n")
    changed = intervention_table(run.results)
    if changed[1]:
        parts += ["## Is the reasoning used?\n", markdown(changed), page.CAUSAL_NOTE]
    latents = latent_table(run.results)
    if latents[1]:
        parts += ["## Latents\n", markdown(latents), page.LATENT_NOTE]
    parts.append("Training curves and what the latents say: `report.html`.\n")
    return "\n".join(parts)
