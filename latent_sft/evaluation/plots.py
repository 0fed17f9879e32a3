"""The figures of a report, as plain matplotlib figures without global state; None where there is nothing to see."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from latent_sft.evaluation.results import Row, role_of
from latent_sft.methods import MODELS

_SPARE = ("#4f5b93", "#93274a", "#7f9c2e", "#c76aa0", "#2f7f8f", "#a8843c")
# of an accuracy after an intervention; the first is the untouched one
_INTERVENTIONS = {
    "given": ("as decoded", "#3d4450"),
    "zero": ("zero", "#d9602b"),
    "mean": ("mean", "#e0a64a"),
    "shuffle": ("other problem's", "#5aa5d6"),
    "truncate": ("first half", "#9aa3ad"),
}
STEPS, PASSES, SECONDS = "reasoning_steps_mean", "forward_passes_mean", "seconds_per_problem"
# what accuracy is plotted against: key of a row -> label, and whether the axis is logarithmic
AGAINST = {
    STEPS: ("reasoning steps per problem (latents or CoT tokens)", False),
    PASSES: ("forward passes per problem, prompt included", True),
    SECONDS: ("seconds per problem", True),
}
_INK = "#24292f"
_STYLE = Path(__file__).with_name("templates") / "report.mplstyle"
# what a training curve is drawn in, by a word in its tag
_PANELS = {"loss": "loss", "accuracy": "accuracy", "entropy": "latent entropy (nats)", "end": "share of </think>"}
_MAX_POINTS = 600
_MODEL_LEGEND = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "alignment": "left"}


def colours_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return the colour of each row's model: its own, or the next spare one."""
    names = dict.fromkeys(r["model"] for r in rows)
    spare = [name for name in names if name not in MODELS]
    return {n: MODELS[n].colour if n in MODELS else _SPARE[spare.index(n) % len(_SPARE)] for n in names}


@matplotlib.rc_context(fname=_STYLE)
def accuracy_against(rows: Sequence[Row], key: str = STEPS) -> Figure | None:
    """Plot accuracy against a cost, one panel per split, one labelled point with error bar per model.

    Args:
        rows: with `model, kind, split, accuracy, accuracy_se` and the key; error bars are one standard error.
        key: of AGAINST.
    """
    colours = colours_of(rows)
    rows = [r for r in rows if r.get(key) is not None]
    if key != STEPS:  # the passes of a gold path leave out those of its encoder, and what that has read
        rows = [r for r in rows if role_of(r["kind"]) != "oracle"] or rows
    if not rows:
        return None
    splits, costs = list(dict.fromkeys(r["split"] for r in rows)), [r[key] for r in rows]
    label, logarithmic = AGAINST[key]
    figure = Figure(figsize=(max(6.4, 4.8 * len(splits)), 3.8), layout="constrained")
    panels = dict(zip(splits, figure.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0], strict=True))
    for row in rows:
        look = {"color": colours[row["model"]], "markersize": 7, "markeredgecolor": "white", "elinewidth": 1.4}
        error = row.get("accuracy_se") or 0.0
        panels[row["split"]].errorbar(row[key], row["accuracy"], yerr=error, fmt="o", capsize=3, **look)
    for split, axes in panels.items():
        axes.set_title(split)
        axes.set_xlabel(label)
        _percent_axis(axes, [r["accuracy"] for r in rows])
    # room for the label of the rightmost point
    first, low, high = panels[splits[0]], min(costs), max(costs) or 1.0
    first.set_ylabel("accuracy")
    if logarithmic and low > 0:
        first.set_xscale("log")
        span = max(high / low, 4.0)
        first.set_xlim(low / span**0.06, high * span**0.45)
        first.xaxis.set_major_formatter(_plain)
        # of the marks between powers of ten, some
        first.xaxis.set_minor_formatter(lambda value, at: _plain(value, at) if f"{value:e}"[0] in "25" else "")
    else:
        first.set_xlim(-0.05 * high, 1.45 * high)
    figure.draw_without_rendering()  # the layout must be known before labels are spread
    for split, axes in panels.items():
        _label_points(axes, [r for r in rows if r["split"] == split], colours, key)
    return figure


@matplotlib.rc_context(fname=_STYLE)
def interventions(rows: Sequence[Row]) -> Figure | None:
    """Plot the accuracy after each intervention on the thoughts, a group of bars per model.

    Args:
        rows: of one split, with `model, interventions` (see `causal.intervene`); error bars are one standard error.
    """
    rows = [r for r in rows if r.get("interventions")]
    names = [name for name in _INTERVENTIONS if any(name in r["interventions"] for r in rows)]
    if not names:
        return None
    width = 0.82 / len(names)
    figure = Figure(figsize=(max(5.6, 1.6 + 1.25 * len(rows)), 3.4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        label, colour = _INTERVENTIONS[name]
        bars = {i: r["interventions"][name] for i, r in enumerate(rows) if name in r["interventions"]}
        at = [i + (number - (len(names) - 1) / 2) * width for i in bars]
        heights, errors = _accuracies(bars.values())
        look = {"color": colour, "error_kw": {"elinewidth": 0.9, "ecolor": _INK}}
        axes.bar(at, heights, 0.92 * width, yerr=errors, label=label, **look)
    axes.set_xticks(range(len(rows)), [r["model"].replace("/", "/\n") for r in rows], color=_INK)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("accuracy")
    _percent_axis(axes, [found["accuracy"] for r in rows for found in r["interventions"].values()])
    axes.legend(title="thoughts", **_MODEL_LEGEND)
    return figure


@matplotlib.rc_context(fname=_STYLE)
def accuracy_by_cot_steps(rows: Sequence[Row]) -> Figure | None:
    """Plot accuracy against the number of steps of the gold CoT, one line per model.

    Args:
        rows: of one split, with `model, accuracy_by_steps`.
    """
    lines = {r["model"]: r.get("accuracy_by_steps") or {} for r in rows}
    if len({steps for line in lines.values() for steps in line}) < 2:
        return None
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for model, line in lines.items():
        steps = sorted(line, key=int)
        heights, errors = _accuracies([line[n] for n in steps])
        look = {"color": colours_of(rows)[model], "marker": "o", "markersize": 4.5, "elinewidth": 1.0, "capsize": 2}
        axes.errorbar([int(n) for n in steps], heights, yerr=errors, label=model, **look)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("steps of the gold CoT")
    axes.set_ylabel("accuracy")
    _percent_axis(axes, [group["accuracy"] for line in lines.values() for group in line.values()])
    axes.legend(**_MODEL_LEGEND)
    return figure


@matplotlib.rc_context(fname=_STYLE)
def training_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure | None:
    """Plot one stage's training: panels for loss parts, accuracy, latent entropy and share of `</think>`.

    Args:
        curves: `(step, value)` pairs by tag, as `train/loss_kl`; tags of no panel are left out.
    """
    panels = {
        title: {tag: points for tag, points in sorted(curves.items()) if word in tag.split("/")[-1] and points}
        for word, title in _PANELS.items()
    }
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return None
    figure = Figure(figsize=(max(3.6, 3.2 * len(panels)), 2.5), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for tag, points in found.items():
            steps, values = zip(*points[:: max(1, len(points) // _MAX_POINTS)], strict=True)
            kind, _, name = tag.rpartition("/")
            label = f"{name} ({kind})" if kind else name
            axes.plot(steps, values, marker="o" if len(steps) < 25 else "", markersize=3, label=label)
        every = [value for points in found.values() for _, value in points]
        if title == "loss" and min(every) > 0:
            axes.set_yscale("log")
        if title == "accuracy":
            _percent_axis(axes, every)
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(found) > 1:
            axes.legend(fontsize=7)
    return figure


@matplotlib.rc_context(fname=_STYLE)
def to_bytes(figure: Figure, kind: str) -> bytes:
    """Render a figure as `svg` or `png`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _label_points(axes: Axes, rows: Sequence[Row], colours: Mapping[str, str], key: str) -> None:
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
        look = {"color": colours[row["model"]], "va": "center", "fontsize": 8.5}
        axes.annotate(label, (row[key], row["accuracy"]), (9, wanted - y), textcoords="offset points", **look)


def _accuracies(found: Collection[Row]) -> tuple[list[float], list[float]]:
    return [f["accuracy"] for f in found], [f.get("accuracy_se") or 0.0 for f in found]


def _plain(value: float, _: int | None) -> str:
    return f"{value:,.10g}"


def _percent_axis(axes: Axes, values: Sequence[float]) -> None:
    top = max(values, default=1.0)
    axes.set_ylim(-0.03 * max(top, 0.05), min(1.06, max(1.25 * top, 0.05)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.08 else 1))
