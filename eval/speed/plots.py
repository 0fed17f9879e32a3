"""The figures: time and memory of stage 1 against CoT length, and problems a second against batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter, NullLocator

from eval.speed.memory import GIB
from eval.speed.tables import Results, median, per_item

COLOURS = {"fast": "#b3365e", "plain": "#2f6fb0"}
LINES = {2: ":", 4: "--", 16: "-"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "latent_sft",  # the same data gives the same bytes
}


def save(results: Results, folder: Path, kinds: Sequence[str] = ("png", "svg")) -> list[str]:
    """Write the figures that the results have something for; return their names without ending."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in (("speed_stage1", _stage1(results)), ("speed_decoding", _decoding(results))):
            if figure is None:
                continue
            for kind in kinds:
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(folder / f"{name}.{kind}", dpi=160, metadata=metadata)
            written.append(name)
    return written


def _stage1(results: Results) -> Figure | None:
    single = [c for c in results["cases"] if c["part"] == "stage1" and len(c["cot"]) == 1]
    peaks = [m for m in results["memory"] if m["part"] == "stage1"]
    if not single:
        return None
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for path, colour in COLOURS.items():
        for rate, line in LINES.items():
            points = [(c["cot"][0], median(c, path)) for c in single if c["rate"] == rate and path in c["seconds"]]
            _line(left, points, color=colour, linestyle=line, label=f"{path}, r={rate}")
        found = [(m["cot"][0], m["paths"].get(path)) for m in peaks]
        _line(right, [(x, v["peak"] / GIB) for x, v in found if v and v["peak"]], color=colour, label=f"{path}, r=16")
    _finish(left, "time of forward and backward (s)", "CoT tokens")
    _finish(right, "peak memory beyond weights (GiB)", "CoT tokens")
    return figure


def _decoding(results: Results) -> Figure | None:
    case = next((c for c in results["cases"] if c["part"] == "decode"), None)
    if case is None:
        return None
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    fast = [(int(path.split()[-1]), 1 / per_item(case, path)) for path in case["paths"] if path != "plain"]
    _line(axes, fast, color=COLOURS["fast"], label="fast")
    alone = 1 / per_item(case, "plain")
    _line(axes, [(batch, alone) for batch, _ in fast], color=COLOURS["plain"], label="plain, one at a time")
    _finish(axes, "problems a second", "batch size")
    return figure


def _line(axes: Axes, points: list[tuple[int, float]], **style: Any) -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3.5, **style)


def _finish(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    measured = sorted({float(x) for line in axes.get_lines() for x in line.get_xdata()} - {0.0})
    axes.set_xticks(measured[-8:], [f"{x:g}" for x in measured[-8:]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
