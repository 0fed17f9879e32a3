"""Results -> tables and figures, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter, NullLocator

import latent_sft
from eval.speed.cases import LIMIT_GIB, LONGEST
from eval.speed.measure import GIB, TOLERANCE, is_same

STYLE = Path(latent_sft.__file__).parent / "evaluation/templates/report.mplstyle"
COLOURS = {"plain": "#2f6fb0", "fast": "#b3365e"}
STAGE1_SHORT, STAGE1_LONG = "CoT 512, r=4", "CoT 4096, r=16"
# title, parts, columns
TABLES = (
    ("Stage 1, forward and backward", ("stage1",), ("s", "times", "batch (ms)", "floor (GFLOP)", "of matmul")),
    ("Stage 1, the decoder alone", ("decoder",), ("s", "ms per CoT token", "of matmul")),
    ("Stage 2 (per step) and labels (per example)", ("stage2", "labels"), ("ms", "times", "of matmul")),
    ("Decoding", ("decode",), ("problems/s", "times", "latents", "of matmul")),
    ("Latent against explicit thinking, per problem", ("step", "quickstart"), ("ms", "share")),
    ("A training step of KaVa", ("kava",), ("s", "share")),
)
FORMATS = {"times": "{:.2f}×", "share": "{:.2f}", "batch (ms)": "{:.0f}", "of matmul": "{:.0%}", "s": "{:.3f}"}
COLUMNS = "part case path cot rows rate s ms problems/s times share latents".split()
COLUMNS += ["ms per CoT token", "batch (ms)", "floor (GFLOP)", "of matmul"]
Results = dict[str, Any]


def timed(results: Results) -> pd.DataFrame:
    """Return a row for each path of each case: medians, and against the case's first path `times` faster, `share`."""
    rows = []
    for case in results["cases"]:
        cot = max(case["cot"], default=0)
        items = dict(zip(case["paths"], case["items"], strict=True))
        seconds = {path: float(np.median(values)) for path, values in case["seconds"].items()}
        first = seconds[case["paths"][0]] / items[case["paths"][0]]
        for path, s in seconds.items():
            per_item, flops = s / items[path], case["flops"].get(path, np.nan)
            row = {"part": case["part"], "case": case["name"], "path": path, "cot": cot, "rows": len(case["cot"])}
            row |= {"rate": case["rate"], "s": s, "ms": 1e3 * per_item, "problems/s": 1 / per_item}
            row |= {"times": first / per_item, "share": per_item / first, "ms per CoT token": 1e3 * s / max(cot, 1)}
            row |= {"batch (ms)": 1e3 * case["prepare_seconds"][path][0], "floor (GFLOP)": flops / 1e9}
            row["latents"] = float(np.mean(case.get("steps", {}).get(path, [np.nan])))
            rows.append({**row, "of matmul": flops / s / results["matmul_rate"]})
    return pd.DataFrame(rows, columns=COLUMNS)


def exponent(results: Results) -> float | None:
    """Return b of the fit `time = a * length^b` (least squares of logarithms) over the decoder-only cases."""
    found = timed(results).query("part == 'decoder'")
    return float(np.polyfit(np.log(found.cot), np.log(found.s), 1)[0]) if len(found) > 1 else None


def to_markdown(results: Results) -> list[str]:
    """Return the tables that the results have something for, those of the aims first."""
    frame, tables = timed(results), {}
    tables["Aims"] = aims(results)
    different = pd.DataFrame(results["differences"]).map(lambda x: _text(x, "{:.1e}"))
    tables["The paths agree: largest relative differences"] = different
    tables["Peak memory beyond weights, a fresh process each"] = _memory(results)
    for title, parts, columns in TABLES:
        slope = exponent(results) if parts == ("decoder",) else None
        found = frame[frame.part.isin(parts)]
        shown = {c: [_text(x, FORMATS.get(c, "{:.2f}")) for x in found[c]] for c in ("case", "path", *columns)}
        tables[title + (f": time grows as CoT length to the {slope:.2f}" if slope else "")] = pd.DataFrame(shown)
    return [f"**{title}**\n\n{_markdown(table)}" for title, table in tables.items() if len(table)]


def aims(results: Results) -> pd.DataFrame:
    """Return what the fast path is to reach, what it reached, and whether that is enough."""
    frame, rows = timed(results), []

    def aim(text: str, value: Any, form: str = "{:.2f}×", *, least: float = -np.inf, most: float = np.inf) -> None:
        shown = "not measured" if value is None else form.format(value)
        rows.append((text, shown, "" if value is None else "yes" if least <= value <= most else "no"))

    def of(column: str, part: str, start: str = "", path: str = "fast") -> float | None:
        found = frame[(frame.part == part) & frame.case.str.startswith(start) & (frame.path == path)]
        return float(found[column].iloc[0]) if len(found) else None

    def memory(name: str, path: str, key: str) -> float | None:
        entries = [m["paths"] for m in results["memory"] if (m["part"], m["name"]) == ("stage1", name)]
        found = entries[0].get(path) if entries else None
        # a process that was stopped had just grown beyond the limit
        return None if found is None else LIMIT_GIB + 1e-9 if found["exceeded"] else found[key] / GIB

    others = [d["case"] for d in results["differences"] if not is_same(d)]
    agree = "all but " + "; ".join(others) if others else "all" if results["differences"] else "not measured"
    verdict = "" if agree == "not measured" else "no" if others else "yes"
    rows.append((f"the paths agree, to {TOLERANCE:g}", agree, verdict))
    aim(f"stage 1, {STAGE1_SHORT}: at least 2×", of("times", "stage1", STAGE1_SHORT), least=2)
    aim(f"stage 1, {STAGE1_LONG}: at least 4×", of("times", "stage1", STAGE1_LONG), least=4)
    fast, slow = (memory(STAGE1_LONG, path, "peak") for path in ("fast", "plain"))
    aim(f"memory, {STAGE1_LONG}: at most 1/3 of plain", fast and slow and fast / slow, "{:.2f}", most=1 / 3)
    longest, gib = f"CoT {LONGEST}, r=16", f"{LIMIT_GIB:g} GiB"
    whole, cannot = (memory(longest, path, "process_peak") for path in ("fast", "plain"))
    aim(f"CoT of {LONGEST} tokens: whole process at most {gib}", whole, "{:.2f} GiB", most=LIMIT_GIB)
    aim(f"CoT of {LONGEST} tokens: plain cannot in {gib}", cannot, "over {:.2f} GiB", least=LIMIT_GIB + 1e-10)
    aim("decoder alone, exponent of time in CoT length: below 1.3", exponent(results), "{:.2f}", most=1.3)
    aim("stage 2: at least 2×", of("times", "stage2"), least=2)
    aim("labels: at least 5×", of("times", "labels", "256"), least=5)
    aim("labels at the quickstart's size: at least 5×", of("times", "labels", "hidden 64"), least=5)
    aim("decoding at batch 64: at least 15×", of("times", "decode", path="batch 64"), least=15)
    same = next((1 - d["problems"] for d in results["differences"] if "problems" in d), None)
    aim("decoding: problems with the same latents and answer", same, "{:.0%}", least=1)
    for batch in (1, 64):
        cost = of("share", "step", f"batch {batch},", "latent")
        aim(f"a latent step, batch {batch}: at most 1.15 explicit steps", cost, "{:.2f}", most=1.15)
    cost = of("share", "quickstart", "batch 250,", "latent")
    aim("quickstart, per problem: at most 0.65 of explicit", cost, "{:.2f}", most=0.65)
    measured = any(value != "not measured" for _, value, _ in rows)
    return pd.DataFrame(rows if measured else [], columns=["aim", "value", "reached"])


def _memory(results: Results) -> pd.DataFrame:
    rows = []
    for entry in results["memory"]:
        first = next(iter(entry["paths"].values()))["peak"]
        for path, found in entry["paths"].items():
            row = {"case": f"{entry['part']}: {entry['name']}", "path": path}
            row["GiB"] = f"stopped at {entry['limit_gib']:g}" if found["exceeded"] else f"{found['peak'] / GIB:.3f}"
            row["share"] = f"{found['peak'] / first:.2f}" if found["peak"] and first else ""
            rows.append({**row, "whole process (GiB)": _text(found["process_peak"] and found["process_peak"] / GIB)})
    return pd.DataFrame(rows)


def _text(value: Any, form: str = "{:.2f}") -> str:
    if isinstance(value, str):
        return value
    return "" if value is None or np.isnan(value) else form.format(value)


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---", *["--:"] * (len(table.columns) - 1)], *table.fillna("").to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def save_plots(results: Results, folder: Path) -> list[str]:
    """Write the figures that the results have something for; return their names without ending.

    They are time and memory of stage 1 against CoT length, and problems per second against batch size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frame, figures = timed(results), {}
    with style.context(STYLE):
        single = frame[(frame.part == "stage1") & (frame.rows == 1)]
        if len(single):
            figures["speed_stage1"] = Figure(figsize=(8.4, 3.4), layout="constrained")
            left, right = figures["speed_stage1"].subplots(1, 2)
            for (path, rate), found in single.groupby(["path", "rate"]):
                line = {2: ":", 4: "--"}.get(rate, "-")
                _line(left, found.cot, found.s, color=COLOURS[path], linestyle=line, label=f"{path}, r={rate}")
            entries = [m for m in results["memory"] if m["part"] == "stage1"]
            for path, colour in COLOURS.items():
                points = [(m["cot"], m["paths"][path]["peak"]) for m in entries if path in m["paths"]]
                points = [(max(cot), peak / GIB) for cot, peak in points if peak]
                _line(right, *zip(*points, strict=True) if points else ((), ()), color=colour, label=f"{path}, r=16")
            _finish(left, "time of forward and backward (s)", "CoT tokens")
            _finish(right, "peak memory beyond weights (GiB)", "CoT tokens")
        decoding = frame[frame.part == "decode"]
        if len(decoding):
            figures["speed_decoding"] = Figure(figsize=(4.4, 3.2), layout="constrained")
            axes = figures["speed_decoding"].subplots()
            fast, alone = decoding[decoding.path != "plain"], decoding[decoding.path == "plain"]["problems/s"].item()
            batch = fast.path.str.split().str[-1].astype(int)
            _line(axes, batch, fast["problems/s"], color=COLOURS["fast"], label="fast")
            _line(axes, batch, [alone] * len(batch), color=COLOURS["plain"], label="plain, one at a time")
            _finish(axes, "problems per second", "batch size")
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=160)
    return list(figures)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], **look: Any) -> None:
    if len(x):
        axes.plot(x, y, marker="o", markersize=3.5, **look)


def _finish(axes: Axes, title: str, xlabel: str) -> None:
    axes.set(title=title, xlabel=xlabel)
    if not axes.get_lines():
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    measured = sorted({float(x) for line in axes.get_lines() for x in line.get_xdata()})
    axes.set_xticks(measured[-8:], [f"{x:g}" for x in measured[-8:]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)
