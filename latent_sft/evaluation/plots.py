"""The figures of the report. Plain matplotlib figures, no windows, no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

COLOURS = {
    "no-cot": "#7d8590",
    "cot": "#2f6fb0",
    "stage1": "#c98a1b",
    "latent-sft": "#b3365e",
    "soft-thinking": "#5aa5d6",
    "coconut": "#8c6d46",
    "codi": "#3b8f7a",
    "pccot": "#7b5ea7",
    "kava": "#d9602b",
}
_SPARE = ("#4f5b93", "#93274a", "#7f9c2e", "#c76aa0", "#2f7f8f", "#a8843c")
# of an accuracy after an intervention; the first is the untouched one
_INTERVENTIONS = {
    "given": ("as decoded", "#3d4450"),
    "zero": ("zero", "#d9602b"),
    "mean": ("mean", "#e0a64a"),
    "shuffle": ("other problem's", "#5aa5d6"),
    "truncate": ("first half", "#9aa3ad"),
}
# what accuracy is plotted against: key of a result -> label, and whether the axis is logarithmic
AGAINST = {
    "reasoning_steps_mean": ("reasoning steps per problem (latents or CoT tokens)", False),
    "forward_passes_mean": ("forward passes per problem, prompt included", True),
    "seconds_per_problem": ("seconds per problem", True),
}
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


def accuracy_against(results: Sequence[Mapping[str, Any]], key: str = "reasoning_steps_mean") -> Figure:
    """Plot accuracy against a cost, one panel a split, one labelled point with error bar a model.

    Args:
        results: rows with `model, split, accuracy, accuracy_se` and the key; error bars are one standard error.
        key: of AGAINST.
    """
    results = [r for r in results if r.get(key) is not None]
    models, splits = _unique(results, "model"), _unique(results, "split")
    label, logarithmic = AGAINST[key]
    costs = [r[key] for r in results]
    logarithmic = logarithmic and min(costs) > 0
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.4, 4.8 * len(splits)), 3.8), layout="constrained")
        panels = figure.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0]
        for axes, split in zip(panels, splits, strict=True):
            for row in (r for r in results if r["split"] == split):
                axes.errorbar(
                    row[key],
                    row["accuracy"],
                    yerr=row.get("accuracy_se") or 0.0,
                    fmt="o",
                    markersize=7,
                    color=colour_of(row["model"], models),
                    markeredgecolor="white",
                    elinewidth=1.4,
                    capsize=3,
                )
            axes.set_title(split)
            axes.set_xlabel(label)
            _percent_axis(axes, [r["accuracy"] for r in results])
        # room for the label of the rightmost point
        if logarithmic:
            panels[0].set_xscale("log")
            low, high = min(costs), max(costs)
            span = max(high / low, 4.0)
            panels[0].set_xlim(low / span**0.06, high * span**0.45)
            panels[0].xaxis.set_major_formatter(_plain)
            panels[0].xaxis.set_minor_formatter(_plain_first)
        else:
            longest = max(costs) or 1.0
            panels[0].set_xlim(-0.05 * longest, 1.45 * longest)
        panels[0].set_ylabel("accuracy")
        figure.draw_without_rendering()  # the layout must be known before labels are spread
        for axes, split in zip(panels, splits, strict=True):
            _label_points(axes, [r for r in results if r["split"] == split], models, key)
    return figure


def interventions(results: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Plot the accuracy after each intervention on the thoughts, a group of bars a model; None where there is none.

    Args:
        results: rows of one split with `model, interventions` (see `causal.intervene`); error bars are one standard
            error.
    """
    rows = [r for r in results if r.get("interventions")]
    if not rows:
        return None
    names = [name for name in _INTERVENTIONS if any(name in r["interventions"] for r in rows)]
    width = 0.82 / len(names)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.6, 1.6 + 1.25 * len(rows)), 3.4), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(names):
            label, colour = _INTERVENTIONS[name]
            at = [(i, r["interventions"][name]) for i, r in enumerate(rows) if name in r["interventions"]]
            axes.bar(
                [i + (number - (len(names) - 1) / 2) * width for i, _ in at],
                [found["accuracy"] for _, found in at],
                width=0.92 * width,
                yerr=[found.get("accuracy_se") or 0.0 for _, found in at],
                color=colour,
                label=label,
                error_kw={"elinewidth": 0.9, "ecolor": _INK},
            )
        axes.set_xticks(range(len(rows)), [r["model"].replace("/", "/\n") for r in rows], color=_INK)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("accuracy")
        _percent_axis(axes, [found["accuracy"] for r in rows for found in r["interventions"].values()])
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="thoughts", alignment="left")
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


def _label_points(axes: Axes, rows: Sequence[Mapping[str, Any]], models: Sequence[str], key: str) -> None:
    # labels stand right of their points, pushed down where the one above is too near
    line_height, character = 13.0, 5.2
    scale = axes.figure.dpi / 72
    taken: list[tuple[float, float, float]] = []
    for row in sorted(rows, key=lambda r: -r["accuracy"]):
        label = f"{row['model']}  {100 * row['accuracy']:.1f} %"
        x, y = axes.transData.transform((row[key], row["accuracy"])) / scale
        width, wanted = character * len(label) + 12, y
        for left, right, used in taken:
            if x < right and left < x + width and used - wanted < line_height:
                wanted = used - line_height
        taken.append((x, x + width, wanted))
        axes.annotate(
            label,
            (row[key], row["accuracy"]),
            xytext=(9, wanted - y),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour_of(row["model"], models),
        )


def _plain(value: float, _: int) -> str:
    return f"{value:,.10g}"


def _plain_first(value: float, _: int) -> str:
    # of the marks between powers of ten
    return _plain(value, 0) if f"{value:e}"[0] in "25" else ""


def _percent_axis(axes: Axes, values: Sequence[float]) -> None:
    top = max(values, default=1.0)
    axes.set_ylim(-0.03 * max(top, 0.05), min(1.06, max(1.25 * top, 0.05)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.08 else 1))


def _short(tag: str) -> str:
    kind, _, name = tag.partition("/")
    return f"{name} ({kind})" if name else tag


def _unique(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
