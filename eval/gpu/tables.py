"""A part's record as a table. Of a case that is not equal nothing is shown but that."""

from __future__ import annotations

from typing import Any

LEFT_OUT = ("finished", "same", "trace", "seconds", "error")


def to_markdown(record: dict[str, Any], meaning: str) -> str:
    """Return a title, where it was measured, and a line for each case."""
    key, cases = record["key"], record["cases"]
    shown = [r for r in cases.values() if is_equal(r)]
    columns = list(dict.fromkeys(name for result in shown for name in result if name not in LEFT_OUT))
    lines = [["case", *columns, "done"], ["---", *["--:"] * len(columns), "---"]]
    for name, result in cases.items():
        values = [_text(column, result.get(column)) if is_equal(result) else "" for column in columns]
        lines.append([name, *values, _verdict(result)])
    size = ", tiny sizes" if key["tiny"] else ""
    where = f"{key['device']}{size}; torch {key['torch']}, transformers {key['transformers']}, code {key['code']}."
    return "\n\n".join([f"**{meaning}**", where, "\n".join(f"| {' | '.join(line)} |" for line in lines)])


def is_equal(result: dict[str, Any]) -> bool:
    """Return whether the numbers of a case count."""
    return "error" not in result and result.get("same", True)


def _verdict(result: dict[str, Any]) -> str:
    if "error" in result:
        return "failed"
    if not result.get("same", True):
        return "not equal"
    return "yes" if result["finished"] else "to be continued"


def _text(column: str, value: Any) -> str:
    if value is None or isinstance(value, str | int):
        return "" if value is None else str(value)
    if column in ("MFU",) or "accuracy" in column:
        return f"{value:.1%}"
    if value and abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
