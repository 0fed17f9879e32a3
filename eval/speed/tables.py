"""Results -> tables of text, for the terminal and for the documentation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table as RichTable

from eval.speed.memory import GIB

Results = dict[str, Any]


class Table(NamedTuple):
    """A title, column heads, and rows of text; the first column is left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def all_tables(results: Results) -> list[Table]:
    """Return the tables that the results have something for."""
    tables = [equality(results), stage1(results), memory(results), decoder(results), others(results)]
    tables += [decoding(results), steps(results)]
    return [table for table in tables if table.rows]


def median(case: dict[str, Any], path: str) -> float:
    """Return the median seconds of one call of a path."""
    return statistics.median(case["seconds"][path])


def per_item(case: dict[str, Any], path: str) -> float:
    """Return the median seconds a problem or example."""
    return median(case, path) / case["items"][case["paths"].index(path)]


def ratio(case: dict[str, Any], slow: str, fast: str) -> float:
    """Return how many times faster `fast` is, a problem or example."""
    return per_item(case, slow) / per_item(case, fast)


def exponent(results: Results) -> float | None:
    """Return b of the fit `time = a * length^b` (least squares of logarithms) over the decoder-only cases."""
    points = [(math.log(c["cot"][0]), math.log(median(c, "fast"))) for c in results["cases"] if c["part"] == "decoder"]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def equality(results: Results) -> Table:
    """Return the differences between the paths."""
    rows = [
        (
            d["case"],
            ", ".join(f"{key} {value:.1e}" if value else f"{key} 0" for key, value in d.items() if key != "case"),
        )
        for d in results["differences"]
    ]
    return Table("The two paths agree: largest relative differences", ("case", "differences"), rows)


def stage1(results: Results) -> Table:
    """Return forward and backward of encoder and decoder against CoT length."""
    columns = (
        "",
        "plain (s)",
        "fast (s)",
        "plain/fast",
        "fast, batch (ms)",
        "plain, batch (ms)",
        "floor (GFLOP)",
        "of matmul",
    )
    rows = []
    for case in _cases(results, "stage1"):
        has_plain = "plain" in case["paths"]
        rows.append(
            (
                case["name"],
                _seconds(median(case, "plain")) if has_plain else "not run",
                _seconds(median(case, "fast")),
                f"{ratio(case, 'plain', 'fast'):.2f}×" if has_plain else "",
                f"{1e3 * case['prepare_seconds']['fast'][0]:.0f}",
                f"{1e3 * case['prepare_seconds']['plain'][0]:.0f}" if has_plain else "",
                f"{case['flops']['fast'] / 1e9:.1f}",
                _reached(case, "fast", results),
            )
        )
    return Table("Stage 1, forward and backward of encoder and decoder", columns, rows)


def memory(results: Results) -> Table:
    """Return peak memory beyond weights."""
    rows = []
    for entry in results["memory"]:
        found = dict(entry["paths"])
        slow, name = found.pop("plain", None), f"{entry['part']}: {entry['name']}"
        for path, values in found.items():
            both = slow is not None and slow["peak"] and values["peak"]
            share = f"{values['peak'] / slow['peak']:.2f}" if both else ""
            rows.append(
                (name, path, _gib(slow, entry), _gib(values, entry), share, _gib(values, entry, "process_peak"))
            )
    columns = ("", "path", "plain (GiB)", "fast (GiB)", "fast/plain", "fast, whole process (GiB)")
    return Table("Peak memory beyond weights, a fresh process each", columns, rows)


def decoder(results: Results) -> Table:
    """Return the decoder alone against CoT length."""
    rows = [
        (
            c["name"],
            _seconds(median(c, "fast")),
            f"{1e3 * median(c, 'fast') / c['cot'][0]:.2f}",
            _reached(c, "fast", results),
        )
        for c in _cases(results, "decoder")
    ]
    slope = exponent(results)
    title = "Stage 1, the decoder alone" + (f": time grows as CoT length to the {slope:.2f}" if slope else "")
    return Table(title, ("", "fast (s)", "ms a CoT token", "of matmul"), rows)


def others(results: Results) -> Table:
    """Return stage 2 and labels."""
    rows = []
    for case in [*_cases(results, "stage2"), *_cases(results, "labels")]:
        for path in case["paths"]:
            if path == "fast":
                continue
            unit = 1e3 * per_item(case, path), 1e3 * per_item(case, "fast")
            share = _reached(case, "fast", results)
            rows.append((case["name"], path, *(f"{u:.1f}" for u in unit), f"{ratio(case, path, 'fast'):.2f}×", share))
    return Table(
        "Stage 2 (ms a step) and labels (ms an example)",
        ("", "against", "plain", "fast", "plain/fast", "of matmul"),
        rows,
    )


def decoding(results: Results) -> Table:
    """Return problems a second at several batch sizes."""
    rows = []
    for case in _cases(results, "decode"):
        for path in case["paths"]:
            steps = statistics.mean(case["steps"][path])
            speed = f"{ratio(case, 'plain', path):.1f}×"
            share = "" if path == "plain" else _reached(case, path, results)
            rows.append((path, f"{1 / per_item(case, path):.2f}", speed, f"{steps:.1f}", share))
    columns = ("", "problems/s", "against one at a time", "latents a problem", "of matmul")
    return Table("Decoding", columns, rows)


def steps(results: Results) -> Table:
    """Return the cost of a latent step, and of the quickstart's two ways of thinking."""
    rows = []
    for case in [*_cases(results, "step"), *_cases(results, "quickstart")]:
        explicit, latent = (1e3 * per_item(case, path) for path in ("explicit", "latent"))
        name = f"{'hidden 64' if case['part'] == 'quickstart' else 'hidden 256'}, {case['name']}"
        rows.append((name, f"{explicit:.2f}", f"{latent:.2f}", f"{latent / explicit:.2f}"))
    return Table(
        "Latent against explicit thinking, the same engine",
        ("", "explicit (ms a problem)", "latent (ms a problem)", "latent/explicit"),
        rows,
    )


def to_rich(table: Table) -> RichTable:
    """Return a table for the terminal."""
    rich = RichTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        rich.add_column(column, justify="right" if number else "left")
    for row in table.rows:
        rich.add_row(*row)
    return rich


def to_markdown(table: Table) -> str:
    """Return a table for the documentation."""
    lines = [f"**{table.title}**", "", _line(table.columns), _line(("---", *["--:"] * (len(table.columns) - 1)))]
    return "\n".join([*lines, *(_line(row) for row in table.rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cases(results: Results, part: str) -> list[dict[str, Any]]:
    return [case for case in results["cases"] if case["part"] == part]


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _reached(case: dict[str, Any], path: str, results: Results) -> str:
    return f"{100 * case['flops'][path] / median(case, path) / results['matmul_rate']:.0f} %"


def _gib(values: dict[str, Any] | None, entry: dict[str, Any], key: str = "peak") -> str:
    if values is None:
        return "not run"
    return f"stopped at {entry['limit_gib']:g}" if values["exceeded"] else f"{values[key] / GIB:.2f}"
