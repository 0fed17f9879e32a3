"""The report of reading: from every source how many rows came, how many are used, and why others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_ROW = re.compile(r"^(row '.*?': |message \d+: )")
_VALUE = re.compile(r"""(?<=got ).*|'[^']*'(?= has)|\d[\d,.]*""")
REASONS = 4  # kinds of bad rows that a table names


def what_was_read(sources: Sequence[Mapping[str, Any]], skipped: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for every source `source, format, weight, rows, used, held_out, skipped` {reason: count}.

    Args:
        sources: `Splits.read` of a split.
        skipped: rows left out, each with `source`, its number, and `reason`.
    """
    found = []
    for number, source in enumerate(sources):
        reasons = Counter(kind_of(row["reason"]) for row in skipped if row["source"] == number)
        held_out = source.get("held_out", 0)
        counted = {"used": source["rows"] - held_out - reasons.total(), "held_out": held_out}
        kept = {key: source[key] for key in ("source", "format", "weight", "rows")}
        found.append({**kept, **counted, "skipped": dict(reasons.most_common())})
    return found


def kind_of(reason: str) -> str:
    """Return what many bad rows have in common: the reason without the row, its values and the advice.

    >>> kind_of("row 'train-5': cot: 512 tokens; expected at most data.max_cot_tokens=400. Raise it.")
    'cot: N tokens'
    """
    what = _ROW.sub("", reason).partition("; expected")[0].partition(" (")[0]
    return _VALUE.sub("N", what).rstrip(".")


def as_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as lines of text, a source each."""
    header = ("source", "format", "rows", "used", "held out", "weight", "skipped")
    lines = [header]
    for row in found:
        reasons = [f"{count:,} {reason}" for reason, count in row["skipped"].items()]
        others = [f"{len(reasons) - REASONS} more kinds"] if len(reasons) > REASONS else []
        counts = (f"{row[key]:,}" for key in ("rows", "used", "held_out"))
        lines.append(
            (row["source"], row["format"], *counts, f"{row['weight']:g}", "; ".join(reasons[:REASONS] + others))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
