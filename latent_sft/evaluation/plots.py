"""The figures of the report. Plain matplotlib figures, no windows, no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

COLOURS = {"no-cot": "#7d8590", "cot": "#2f6fb0", "stage1": "#c98a1b", "latent-sft": "#b3365e"}
_SPARE = ("#3b8f7a", "#7b5ea7", "#8c6d46", "#4f5b93")
_INK, _MUTED, _GRID = "#24292f", "#6b7280", "#e5e7eb"
_STYLE = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#c4c9d0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "latent_sft",  # the same data gives the same bytes
}
# what a training curve is drawn in, by a word in its tag
_PANELS = (
    ("loss", "loss"),
    ("accuracy", "accuracy"),
    ("entropy", "latent entropy (nats)"),
    ("end", "share of </think>"),
)
_MAX_POINTS = 600


def colour_of(model: str, models: Sequence[str]) -> str:
    """Return the colour of a model: its own, or the next spare one in the order of `models`."""
    if model in COLOURS:
        return COLOURS[model]
    return _SPARE[[m for m in models if m not in COLOURS].index(model) % len(_SPARE)]


def accuracy_against_steps(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot accuracy against reasoning length, one panel a split, one labelled point with error bar a model.

    Args:
        results: rows with `model, split, accuracy, accuracy_se, reasoning_steps_mean`; error bars are one standard
            error.
    """
    models, splits = _unique(results, "model"), _unique(results, "split")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.6, 4.4 * len(splits)), 3.6), layout="constrained")
        panels = figure.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0]
        for axes, split in zip(panels, splits, strict=True):
            rows = [r for r in results if r["split"] == split]
            for row in rows:
                colour = colour_of(row["model"], models)
                axes.errorbar(
                    row["reasoning_steps_mean"],
                    row["accuracy"],
                    yerr=row.get("accuracy_se") or 0.0,
                    fmt="o",
                    markersize=7,
                    color=colour,
                    markeredgecolor="white",
                    elinewidth=1.4,
                    capsize=3,
                )
            axes.set_title(split)
            axes.set_xlabel("reasoning steps per problem (latents or CoT tokens)")
            _percent_axis(axes, [r["accuracy"] for r in results])
        longest = max(r["reasoning_steps_mean"] for r in results) or 1.0
        panels[0].set_xlim(-0.05 * longest, 1.3 * longest)  # room for the label of the rightmost point
        panels[0].set_ylabel("accuracy")
        figure.draw_without_rendering()  # the layout must be known before labels are spread
        for axes, split in zip(panels, splits, strict=True):
            _label_points(axes, [r for r in results if r["split"] == split], models)
    return figure


def accuracy_by_cot_steps(results: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Plot accuracy against the number of steps of the gold CoT, one line a model; None where there is nothing to see.

    Args:
        results: rows of one split with `model, accuracy_by_steps`.
    """
    models = _unique(results, "model")
    if len({steps for r in results for steps in r.get("accuracy_by_steps") or {}}) < 2:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for row in results:
            groups = sorted((int(steps), group) for steps, group in (row.get("accuracy_by_steps") or {}).items())
            axes.errorbar(
                [steps for steps, _ in groups],
                [group["accuracy"] for _, group in groups],
                yerr=[group.get("accuracy_se") or 0.0 for _, group in groups],
                marker="o",
                markersize=4.5,
                elinewidth=1.0,
                capsize=2,
                label=row["model"],
                color=colour_of(row["model"], models),
            )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("steps of the gold CoT")
        axes.set_ylabel("accuracy")
        _percent_axis(axes, [g["accuracy"] for r in results for g in (r.get("accuracy_by_steps") or {}).values()])
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def training_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure | None:
    """Plot one stage's training: panels for loss parts, accuracy, latent entropy and share of `</think>`.

    Args:
        curves: `(step, value)` pairs by tag, as `train/loss_kl`; tags of no panel are left out.
    """
    panels = [
        (title, {tag: points for tag, points in curves.items() if word in tag.split("/")[-1] and points})
        for word, title in _PANELS
    ]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(3.6, 3.2 * len(panels)), 2.5), layout="constrained")
        for axes, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for tag, points in sorted(found.items()):
                thin = points[:: max(1, len(points) // _MAX_POINTS)]
                marker = "o" if len(thin) < 25 else ""
                axes.plot([s for s, _ in thin], [v for _, v in thin], marker=marker, markersize=3, label=_short(tag))
            if title == "loss" and all(v > 0 for points in found.values() for _, v in points):
                axes.set_yscale("log")
            if title == "accuracy":
                _percent_axis(axes, [v for points in found.values() for _, v in points])
            axes.set_title(title)
            axes.set_xlabel("step")
            if len(found) > 1:
                axes.legend(fontsize=7)
    return figure


def to_bytes(figure: Figure, kind: str) -> bytes:
    """Render a figure as `svg` or `png`."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _label_points(axes: Axes, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    # labels stand right of their points, pushed down where the one above is too near
    line_height = 13.0
    scale = axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda r: -r["accuracy"]):
        x, y = axes.transData.transform((row["reasoning_steps_mean"], row["accuracy"])) / scale
        wanted = y
        for left, used in taken:
            if abs(x - left) < 75 and used - wanted < line_height:
                wanted = used - line_height
        taken.append((x, wanted))
        axes.annotate(
            f"{row['model']}  {100 * row['accuracy']:.1f} %",
            (row["reasoning_steps_mean"], row["accuracy"]),
            xytext=(9, wanted - y),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour_of(row["model"], models),
        )


def _percent_axis(axes: Axes, values: Sequence[float]) -> None:
    top = max(values, default=1.0)
    axes.set_ylim(-0.03 * max(top, 0.05), min(1.06, max(1.25 * top, 0.05)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.08 else 1))


def _short(tag: str) -> str:
    kind, _, name = tag.partition("/")
    return f"{name} ({kind})" if name else tag


def _unique(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
