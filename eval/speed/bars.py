"""What the fast path must reach, what it reached, and whether that is enough. Written once, here."""

from __future__ import annotations

from typing import Any

from eval.speed.measure import TOLERANCE, is_same
from eval.speed.memory import GIB
from eval.speed.stage1 import LIMIT_GIB, LONGEST
from eval.speed.tables import Results, Table, exponent, ratio

STAGE1_SHORT, STAGE1_LONG = "CoT 512, r=4", "CoT 4096, r=16"


def table(results: Results) -> Table:
    """Return every bar with its value; `not measured` where the run left it out."""
    rows = [
        _row(f"fast and plain path agree, to {TOLERANCE:g}", _agreement(results), lambda v: v == "all", "{}"),
        _row(f"stage 1, {STAGE1_SHORT}: at least 2×", _times(results, "stage1", STAGE1_SHORT), lambda v: v >= 2),
        _row(f"stage 1, {STAGE1_LONG}: at least 4×", _times(results, "stage1", STAGE1_LONG), lambda v: v >= 4),
        _row(f"memory, {STAGE1_LONG}: at most 1/3 of plain", _memory_share(results), lambda v: v <= 1 / 3, "{:.2f}"),
        _row(
            f"CoT of {LONGEST} tokens: whole process at most {LIMIT_GIB:g} GiB",
            _long(results, "fast"),
            lambda v: v <= LIMIT_GIB,
            "{:.2f} GiB",
        ),
        _row(
            f"CoT of {LONGEST} tokens: plain cannot in {LIMIT_GIB:g} GiB",
            _long(results, "plain"),
            lambda v: v > LIMIT_GIB,
            "over {:.2f} GiB",
        ),
        _row(
            "decoder alone, exponent of time in CoT length: below 1.3", exponent(results), lambda v: v < 1.3, "{:.2f}"
        ),
        _row("stage 2: at least 2×", _times(results, "stage2"), lambda v: v >= 2),
        _row("labels: at least 5×", _times(results, "labels", "256"), lambda v: v >= 5),
        _row("labels at the quickstart's size: at least 5×", _times(results, "labels", "hidden 64"), lambda v: v >= 5),
        _row("decoding at batch 64: at least 15×", _times(results, "decode", fast="batch 64"), lambda v: v >= 15),
        _row(
            "decoding: problems with the same latents and answer", _same_problems(results), lambda v: v == 1, "{:.0%}"
        ),
        _row(
            "a latent step, batch 1: at most 1.15 explicit steps",
            _steps(results, "step", "batch 1,"),
            lambda v: v <= 1.15,
            "{:.2f}",
        ),
        _row(
            "a latent step, batch 64: at most 1.15 explicit steps",
            _steps(results, "step", "batch 64,"),
            lambda v: v <= 1.15,
            "{:.2f}",
        ),
        _row(
            "quickstart, a problem: at most 0.65 of explicit",
            _steps(results, "quickstart", "batch 250,"),
            lambda v: v <= 0.65,
            "{:.2f}",
        ),
    ]
    return Table("Bars", ("bar", "value", "reached"), rows)


def _row(name: str, value: Any, reached: Any, text: str = "{:.2f}×") -> tuple[str, str, str]:
    if value is None:
        return (name, "not measured", "")
    return (name, text.format(value), "yes" if reached(value) else "no")


def _case(results: Results, part: str, start: str = "") -> dict[str, Any] | None:
    return next((c for c in results["cases"] if c["part"] == part and c["name"].startswith(start)), None)


def _times(results: Results, part: str, start: str = "", fast: str = "fast") -> float | None:
    case = _case(results, part, start)
    return ratio(case, "plain", fast) if case is not None and {"plain", fast} <= case["seconds"].keys() else None


def _steps(results: Results, part: str, start: str) -> float | None:
    case = _case(results, part, start)
    return None if case is None else 1 / ratio(case, "explicit", "latent")


def _agreement(results: Results) -> str | None:
    if not results["differences"]:
        return None
    others = [d["case"] for d in results["differences"] if not is_same(d)]
    return f"all but {'; '.join(others)}" if others else "all"


def _same_problems(results: Results) -> float | None:
    return next((1 - d["problems"] for d in results["differences"] if "problems" in d), None)


def _memory_of(results: Results, name: str) -> dict[str, Any]:
    return next((m["paths"] for m in results["memory"] if m["part"] == "stage1" and m["name"] == name), {})


def _memory_share(results: Results) -> float | None:
    found = _memory_of(results, STAGE1_LONG)
    return found["fast"]["peak"] / found["plain"]["peak"] if {"fast", "plain"} <= found.keys() else None


def _long(results: Results, path: str) -> float | None:
    found = _memory_of(results, f"CoT {LONGEST}, r=16").get(path)
    if found is None:
        return None
    # a process that was stopped had just grown beyond the limit
    return LIMIT_GIB + 1e-9 if found["exceeded"] else found["process_peak"] / GIB
