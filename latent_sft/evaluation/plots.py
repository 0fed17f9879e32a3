"""The figures of a report, as plain matplotlib figures without global state; None where there is nothing to see."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from latent_sft.evaluation.results import Row, role_of
from latent_sft.inference.show import Solution
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
POSITIONS, ALONE = "cache_positions_mean", "seconds_alone"
# what accuracy is plotted against: key of a row -> label, and whether the axis is logarithmic
AGAINST = {
    STEPS: ("reasoning steps per problem (latents or CoT tokens)", False),
    PASSES: ("forward passes per problem, prompt included", True),
    POSITIONS: ("positions in the cache per problem", True),
    SECONDS: ("seconds per problem, in full batches", True),
    ALONE: ("seconds per problem, one at a time", True),
}
_INK, _LATENT = "#24292f", "#2f6fb0"
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
def accuracy_against(rows: Sequence[Row], key: str = STEPS, lines: Mapping[str, float] = {}) -> Figure | None:
    """Plot accuracy against a cost, one panel per split, one labelled point with error bar per model.

    A grey line is what the models without latents reach at most for a cost: a method wins above it.

    Args:
        rows: with `model, kind, split, accuracy, accuracy_se` and the key; error bars are one standard error.
        key: of AGAINST.
        lines: accuracies for reference, by name, drawn across the panels.
    """
    colours = colours_of(rows)
    rows = [r for r in rows if r.get(key) is not None]
    if key != STEPS:  # the passes on oracle latents leave out those of its encoder, and what that has read
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
        written = sorted((r[key], r["accuracy"]) for r in rows if r["split"] == split and not r.get("latent_steps_max"))
        if len(written) > 1:
            best = list(accumulate((height for _, height in written), max))
            axes.step([cost for cost, _ in written], best, where="post", color="#9aa3ad", lw=1.2, ls="--", zorder=1)
        axes.set_title(split)
        axes.set_xlabel(label)
        _percent_axis(axes, [*(r["accuracy"] for r in rows), *lines.values()])
        for name, value in lines.items():
            axes.axhline(value, color=_INK, linewidth=0.8, linestyle=":")
            place = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "xytext": (-3, 2), "ha": "right"}
            axes.annotate(f"{name}  {100 * value:.1f} %", textcoords="offset points", fontsize=7.5, **place)
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
        rows: of one split, with `model, interventions` (see `interventions.intervene`); bars are one standard error.
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
def accuracy_by_latents(rows: Sequence[Row]) -> Figure | None:
    """Plot accuracy against the number of latents it is made to think in, one line per model.

    Args:
        rows: of one split, with `model, latent_sweep`; a ring is the model's own number of latents and accuracy.
    """
    rows = [r for r in rows if r.get("latent_sweep")]
    if not rows:
        return None
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes, colours = figure.subplots(), colours_of(rows)
    for row in rows:
        counts, colour = sorted(row["latent_sweep"], key=int), colours[row["model"]]
        heights, errors = _accuracies([row["latent_sweep"][n] for n in counts])
        look = {"color": colour, "marker": "o", "markersize": 4.5, "elinewidth": 1.0, "capsize": 2}
        axes.errorbar([int(n) for n in counts], heights, yerr=errors, label=row["model"], **look)
        axes.plot(row["latent_steps_mean"], row["accuracy"], marker="o", ms=10, mfc="none", color=colour)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("latents, as many for every problem (ring: the model's own choice)")
    axes.set_ylabel("accuracy")
    _percent_axis(axes, [found["accuracy"] for r in rows for found in r["latent_sweep"].values()])
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
def thought_row(solution: Solution, top: int = 3, most: int = 16) -> Figure | None:
    """Draw a solved problem as the row its model reads: prompt, latents with their heaviest tokens, answer.

    Args:
        solution: one that was thought in latents.
        top: tokens per latent; the heavier, the darker.
        most: latents drawn, from the first. Above one that stands for a span of the CoT is its text.
    """
    if not solution.latents:
        return None
    shown = solution.latents[:most]
    hidden = len(solution.latents) - len(shown)
    left, wide, right = 3.0, 1.0 + 0.8 * any(latent.span for latent in shown), 1.8
    width = left + wide * len(shown) + right
    figure = Figure(figsize=(0.72 * width, 0.32 * (top + 1)))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(top, -1))
    axes.set_axis_off()

    def cell(x: float, y: float, wide: float, high: float, text: str, strength: float, **look: Any) -> None:
        axes.add_patch(Rectangle((x + 0.04, y + 0.04), wide - 0.08, high - 0.08, color=_LATENT, alpha=strength, lw=0))
        look = {"ha": "center", "va": "center", "parse_math": False, **look}
        axes.text(x + wide / 2, y + high / 2, text, **look)

    cell(0, -1, left, 1, "prompt", 0.0, weight="bold")
    cell(0, 0, left, top, textwrap.fill(solution.problem, 26, max_lines=top + 1, placeholder=" …"), 0.08, fontsize=8)
    for x, latent in enumerate(shown, 1):
        at, name = left + wide * (x - 1), latent.span or f"z{x}"
        cell(at, -1, wide, 1, name + (f" +{hidden}" if hidden and x == most else ""), 0.0, weight="bold")
        for y, (text, weight) in enumerate(latent.tokens[:top]):
            colour = "white" if weight > 0.6 else _INK
            cell(at, y, wide, 1, textwrap.shorten(text, 9) or repr(text), 0.06 + 0.9 * weight, color=colour)
    cell(width - right, -1, right, 1, "answer", 0.0, weight="bold")
    answer = textwrap.fill(solution.answer, 16, max_lines=top + 1, placeholder=" …")
    cell(width - right, 0, right, top, answer, 0.08, fontsize=11 if len(answer) < 8 else 8)
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
