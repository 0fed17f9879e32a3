"""The report of one run, or of a comparison of many: rows -> sections of tables and figures -> `templates/`.

Writes
    <run>/report/report.html, <run>/comparison.html   one file, opens from disk, nothing loaded from elsewhere
    <run>/report/report.md, <run>/comparison.md       the tables, and beside them the pictures that they show
    <run>/report/report.json                          {"title", "run", "results": rows, "stages": manifests by name}
    <run>/comparison.json                             {"title", "split", "rows" (`results.rows_of`), "lines", "missing"}
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from latent_sft.config.experiment import Config
from latent_sft.errors import ArtefactError
from latent_sft.evaluation import plots
from latent_sft.evaluation.results import SPLITS, Job, Row, Run, collect, read_run, rows_of
from latent_sft.evaluation.tables import (
    Table,
    accuracy,
    difference_table,
    duration,
    intervention_table,
    latent_table,
    result_table,
)
from latent_sft.methods import MODELS
from latent_sft.runs import write_atomically, write_json

# what accuracy is plotted against -> PNG file, or none
RUN_COSTS = {plots.STEPS: "accuracy_vs_steps.png", plots.PASSES: ""}
COMPARISON_COSTS = {
    plots.PASSES: "accuracy-vs-forward-passes.png",
    plots.POSITIONS: "accuracy-vs-cache-positions.png",
    plots.SECONDS: "accuracy-vs-seconds.png",
    plots.ALONE: "accuracy-vs-seconds-alone.png",
}


class Picture(NamedTuple):
    """A figure; with a file name it is also written as a PNG, for the Markdown."""

    figure: Figure | None
    caption: str
    file: str = ""
    title: str = ""


class Section(NamedTuple):
    """A part of the report, with its name in `templates/notes.jinja`; `latents`: records of problems by model."""

    name: str
    table: Table = Table([], [])
    pictures: Sequence[Picture] = ()
    latents: Mapping[str, Sequence[Row]] = {}


def write_report(run_dir: str | Path, *, title: str) -> Path:
    """Write the report of a run and return the path of `report.html`.

    Args:
        run_dir: run directory with at least one evaluation.
        title: heading of the report.

    Raises:
        ArtefactError: no evaluation results, or a damaged result file.
    """
    run = read_run(Path(run_dir))
    rows = [evaluation.row for evaluation in run.evaluations]
    stem = Path(run_dir) / "report" / "report"
    write_json(stem.with_suffix(".json"), {"title": title, "run": str(run_dir), "results": rows, "stages": run.stages})
    sections = sections_of("run", rows, RUN_COSTS, run)
    return _write(stem, title, rows, sections, config=run.config)


def write_comparison(config: Config, jobs: Sequence[Job]) -> Path:
    """Write the comparison of those jobs that are finished and return the path of `comparison.html`.

    Raises:
        ArtefactError: no job is finished.
    """
    done = [job for job in jobs if job.is_finished()]
    if not done:
        raise ArtefactError(f"{config.directory}: no finished run to compare; `latent-sft run` makes them.")
    splits = ["", *config.sets()]
    rows = [row for s in splits for row in rows_of(collect(done, s), resamples=config.compare.bootstrap)]
    missing = [{"run": job.name, "console": str(job.console)} for job in jobs if job not in done]
    stem = Path(config.directory) / "comparison"
    lines = config.compare.lines
    found = {"title": config.name, "split": rows[0]["split"], "rows": rows, "lines": lines, "missing": missing}
    write_json(stem.with_suffix(".json"), found)
    sections = sections_of("comparison", rows, COMPARISON_COSTS, lines=lines)
    return _write(stem, config.name, rows, sections, missing=missing)


def sections_of(
    name: str,
    rows: Sequence[Row],
    costs: Mapping[str, str],
    run: Run | None = None,
    lines: Mapping[str, float] = {},
) -> list[Section]:
    """Return the sections that have something to show.

    Args:
        name: of the first one.
        rows: of a run or of a comparison.
        costs: what accuracy is plotted against, with the names of the PNG files.
        run: where there is one run only: its training curves and latents.
        lines: accuracies for reference, by name.
    """
    first = [r for r in rows if r["split"] == rows[0]["split"]]
    drawn = [r for r in rows if r["split"] in SPLITS] or first  # benchmarks are in the tables alone
    costly = [
        Picture(plots.accuracy_against(drawn, key, lines), f"Accuracy against {plots.AGAINST[key][0]}.", file)
        for key, file in costs.items()
    ]
    by_steps = Picture(plots.accuracy_by_cot_steps(first), f"Accuracy by steps of the gold CoT, {first[0]['split']}.")
    sweep = Picture(plots.accuracy_by_latents(first), f"Accuracy by number of latents, {first[0]['split']}.")
    spread = "with one standard error" if run else "mean over seeds"
    caption = f"Accuracy after each intervention, {first[0]['split']}, {spread}."
    bars = Picture(plots.interventions(first), caption, "" if run else "interventions.png")
    training, latents = [], {}
    if run:
        for stage, curves in run.curves.items():
            seconds, examples = (run.stages[stage].get(key, 0) for key in ("train_seconds", "examples_seen"))
            caption = f"{duration(seconds)}, {examples:,} training examples seen."
            training.append(Picture(plots.training_curves(curves), caption, title=stage))
        shown = {e.row["model"]: [p for p in e.problems if p.get("latents")] for e in run.evaluations[: len(first)]}
        latents = {model: problems for model, problems in shown.items() if problems}
    sections = [
        Section(name, result_table(rows, lines)),
        Section("differences", difference_table(rows)),
        Section("cost", pictures=costly),
        Section("difficulty", pictures=[by_steps]),
        Section("number of latents", pictures=[sweep]),
        Section("interventions", intervention_table(rows), [bars]),
        Section("training", pictures=training),
        Section("latents", latent_table(rows), latents=latents),
    ]
    sections = [s._replace(pictures=[p for p in s.pictures if p.figure]) for s in sections]
    return [s for s in sections if s.table.rows or s.pictures]


def _write(stem: Path, title: str, rows: Sequence[Row], sections: Sequence[Section], **more: Any) -> Path:
    """Write the Markdown with its pictures, and the page; return the path of the page."""
    first = [r for r in rows if r["split"] == rows[0]["split"]]
    sizes = sorted({r["num_examples"] for r in first})
    seeds = sorted({seed for r in rows for seed in r.get("seeds", ())})
    subtitle = f"{first[0]['split']} split, {' to '.join(f'{n:,}' for n in sorted({sizes[0], sizes[-1]}))} problems"
    named = {kind: [r["model"] for r in first if r["kind"] == kind] for kind in MODELS}
    for picture in (p for section in sections for p in section.pictures if p.file):
        write_atomically(stem.parent / picture.file, plots.to_bytes(picture.figure, "png"))
    environment = Environment(
        loader=PackageLoader("latent_sft.evaluation"),
        autoescape=lambda name: name == "report.html.jinja",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"svg": _svg, "visible": _visible}
    for ending in ("md", "html"):
        text = environment.get_template(f"report.{ending}.jinja").render(
            title=title,
            subtitle=subtitle + (f", seeds {', '.join(map(str, seeds))}" if seeds else ""),
            cards=first,
            models=[f"{', '.join(names)}: {MODELS[kind].meaning}" for kind, names in named.items() if names],
            colours=plots.colours_of(rows),
            accuracy=accuracy,
            sections=sections,
            html=f"{stem.name}.html",
            **{"missing": (), "config": "", **more},
        )
        write_atomically(stem.with_suffix(f".{ending}"), text)
    return stem.with_suffix(".html")


def _svg(figure: Figure) -> str:
    return base64.b64encode(plots.to_bytes(figure, "svg")).decode()


def _visible(text: str) -> str:
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() else "␣" * max(1, len(shown))
