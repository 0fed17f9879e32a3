"""Tables, pictures and pages of a comparison, from what `comparison.json` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from latent_sft.evaluation import plots
from latent_sft.evaluation.markup import document, note, picture, table
from latent_sft.evaluation.page import CAUSAL_NOTE
from latent_sft.evaluation.tables import (
    Table,
    accuracy,
    duration,
    interval,
    intervention_table,
    markdown,
    number,
)

PICTURES = {
    "accuracy-vs-forward-passes.png": "forward_passes_mean",
    "accuracy-vs-seconds.png": "seconds_per_problem",
}
NOTE = (
    "Accuracy: mean over seeds and problems with one standard error, for which both count as samples (two-way random "
    "effects; with one seed it is the binomial one). Other columns are means over seeds; training adds up every stage "
    "that led to the model, and stages shared by variants count for each. Differences are paired, in points, with "
    "bootstrap intervals of 95 % that resample problems and, with two seeds or more, seeds; with few seeds they are "
    "rather too narrow. The best latent method was chosen by these very results, so its lead is flattered. `stage1` is "
    "the gold path: its encoder has read the reference CoT. Seconds are wall-clock of a whole batch divided by its "
    "problems, on the machine of the run, and whatever else ran there.\n"
)


def render(found: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Return the HTML page and the PNG pictures by file name.

    Args:
        found: content of `comparison.json`.
    """
    rows = found["rows"]
    # the passes of the gold path leave out those of its encoder, and what that has read
    plotted = [r for r in rows if r["kind"] != "stage1"] or rows
    figures = {name: plots.accuracy_against(plotted, key) for name, key in PICTURES.items()}
    bars = plots.interventions(rows)
    caption = "Without gold paths. Error bars are one standard error over seeds and problems."
    body = [
        f"<h1>{escape(found['title'])}</h1>",
        f'<p class="muted">{escape(_subtitle(found))}</p>',
        _missing(found),
        "<h2>Results</h2>",
        table(comparison_table(rows)),
        note(NOTE),
        "<h2>Differences</h2>",
        table(difference_table(rows)),
        "<h2>Accuracy against what it costs</h2>",
        *(picture(plots.to_bytes(figure, "svg"), caption) for figure in figures.values()),
    ]
    changed = intervention_table(rows)
    if changed[1]:
        body += ["<h2>Is the reasoning used?</h2>", table(changed), note(CAUSAL_NOTE)]
    if bars is not None:
        body.append(picture(plots.to_bytes(bars, "svg"), "Mean accuracy over seeds after each intervention."))
    pictures = {name: plots.to_bytes(figure, "png") for name, figure in figures.items()}
    if bars is not None:
        pictures["interventions.png"] = plots.to_bytes(bars, "png")
    return document(found["title"], body), pictures


def write_tables(found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Return the comparison in Markdown; `pictures` are file names beside it."""
    rows = found["rows"]
    parts = [f"# {found['title']}\n", f"{_subtitle(found)}\n"]
    if found["missing"]:
        parts.append("Not finished: " + ", ".join(f"`{m['run']}`" for m in found["missing"]) + ".\n")
    parts += [markdown(comparison_table(rows)), NOTE, "## Differences\n", markdown(difference_table(rows))]
    changed = intervention_table(rows)
    if changed[1]:
        parts += ["## Is the reasoning used?\n", markdown(changed), CAUSAL_NOTE]
    parts += [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})\n" for name in pictures]
    return "\n".join(parts)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return header and rows of the main table."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("method", lambda r: r["model"]),
        ("seeds", lambda r: " ".join(map(str, r["seeds"]))),
        ("accuracy %", accuracy),
        ("by seed", lambda r: " ".join(f"{100 * v:.1f}" for v in r["accuracy_by_seed"].values())),
        ("forward passes", lambda r: number(r["forward_passes_mean"], 1)),
        ("reasoning steps", lambda r: number(r["reasoning_steps_mean"], 1)),
        ("s / problem", lambda r: number(r["seconds_per_problem"], 4)),
        ("train time", lambda r: duration(r["train_seconds"])),
        ("examples seen", lambda r: number(r["examples_seen"], 0)),
    ]
    return _cells(columns, rows)


def difference_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return header and rows of the paired differences, in points with their intervals."""
    best = next((r["model"] for r in rows if r["best"]), None)
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("method", lambda r: r["model"]),
        ("n", lambda r: f"{r['num_examples']:,}"),
        ("against CoT", lambda r: interval(r["against_cot"])),
    ]
    if best is not None:
        columns.append((f"against {best}, the best latent method", lambda r: interval(r["against_best"])))
    return _cells(columns, rows)


def _cells(columns: Sequence[tuple[str, Callable[[Any], str]]], rows: Sequence[Mapping[str, Any]]) -> Table:
    return [name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows]


def _subtitle(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    seeds = sorted({seed for r in rows for seed in r["seeds"]})
    sizes = sorted({r["num_examples"] for r in rows})
    problems = " to ".join(f"{n:,}" for n in (sizes if len(sizes) < 2 else (sizes[0], sizes[-1])))
    return f"{found['split']} split, {problems} problems, seeds {', '.join(map(str, seeds))}"


def _missing(found: Mapping[str, Any]) -> str:
    if not found["missing"]:
        return ""
    items = "".join(f"<li><code>{escape(m['run'])}</code>: {escape(m['console'])}</li>" for m in found["missing"])
    return f'<div class="problem"><b class="wrong">Not finished, and not in these tables</b><ul>{items}</ul></div>'
