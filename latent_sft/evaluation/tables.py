"""The tables of a report as text cells, computed once: the HTML, the Markdown and the terminal show the same ones.

A column or a row that holds nothing is left out, so the same tables serve one run and a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from latent_sft.evaluation.results import Row

if TYPE_CHECKING:
    import rich.table

Column = tuple[str, Callable[[Row], str]]
NONE = "–"
SHOWN = ("model", "split", "accuracy %", "n", "skipped", "reasoning steps", "forward passes", "s / problem")


class Table(NamedTuple):
    """Header and rows of text cells; the first two columns are aligned left."""

    header: list[str]
    rows: list[list[str]]

    def terminal(self, title: str, columns: Sequence[str] = SHOWN) -> rich.table.Table:
        """Return those of the columns that it has, for a terminal."""
        from rich.table import Table as RichTable

        shown = RichTable(title=title)
        kept = [i for i, name in enumerate(self.header) if name in columns]
        for i in kept:
            shown.add_column(
                "\n".join(self.header[i].rsplit(" ", 1)), justify="left" if i < 2 else "right", no_wrap=True
            )
        for row in self.rows:
            shown.add_row(*(row[i] for i in kept))
        return shown


def result_table(rows: Sequence[Row], lines: Mapping[str, float] = {}) -> Table:
    """Return the main table: accuracy, and every cost apart.

    Args:
        rows: as in `report.json` or `comparison.json`.
        lines: accuracies for reference, by name; rows of their own at the end.
    """
    rows = [*rows, *({"model": name, "split": NONE, "accuracy": value} for name, value in lines.items())]
    ks = sorted({int(k) for r in rows for k in r.get("pass_at") or {} if int(k) > 1})
    return _table(
        rows,
        ("seeds", _value("seeds", lambda seeds: " ".join(map(str, seeds)))),
        ("accuracy %", accuracy),
        ("by seed", _value("accuracy_by_seed", lambda found: " ".join(map(percent, found.values())))),
        ("n", _value("num_examples", "{:,}".format)),
        ("skipped", _value("skipped", skipped)),
        ("reasoning steps", _value("reasoning_steps_mean", "{:,.1f}".format)),
        ("answer tokens", _value("answer_tokens_mean", "{:,.1f}".format)),
        ("forward passes", _value("forward_passes_mean", "{:,.1f}".format)),
        ("cache positions", _value("cache_positions_mean", "{:,.1f}".format)),
        ("finished %", _value("finished_share", percent)),
        ("s / problem", _value("seconds_per_problem", "{:,.4f}".format)),
        ("s, one at a time", _value("seconds_alone", "{:,.4f}".format)),
        ("train time", _value("train_seconds", duration)),
        ("examples seen", _value("examples_seen", "{:,.0f}".format)),
        *((f"pass@{k} %", _value(f"pass_at.{k}", percent)) for k in ks),
    )


def difference_table(rows: Sequence[Row]) -> Table:
    """Return the paired differences of a comparison, in points with their intervals."""
    best = next((r["model"] for r in rows if r.get("best")), "")
    return _table(
        rows,
        ("against CoT", _value("against_cot", interval)),
        (f"against {best}, the best latent method", _value("against_best", interval)),
    )


def intervention_table(rows: Sequence[Row]) -> Table:
    """Return what changes with changed thoughts, and how well they agree with the gold CoT."""
    names = dict.fromkeys(name for r in rows for name in r.get("interventions") or {} if name != "given")
    return _table(
        rows,
        ("as decoded %", _value("interventions.given.accuracy", percent)),
        *(
            (f"{n} %", _value(f"interventions.{n}", lambda found: f"{percent(found['accuracy'])} ({interval(found)})"))
            for n in names
        ),
        ("gold recall %", _value("gold_recall", percent)),
        ("by chance %", _value("gold_recall_chance", percent)),
        ("top-1 recall %", _value("gold_recall_top1", percent)),
        ("by chance %", _value("gold_recall_top1_chance", percent)),
    )


def latent_table(rows: Sequence[Row]) -> Table:
    """Return what the latents hold, for the models that think in latents."""
    rows = [r for r in rows if r.get("latent_entropy_mean") is not None]
    return _table(
        rows,
        ("latents, mean", _value("latent_steps_mean", "{:,.1f}".format)),
        ("max", _value("latent_steps_max", "{:,.0f}".format)),
        ("entropy (nats)", _value("latent_entropy_mean", "{:,.2f}".format)),
        ("top-1 is </think> %", _value("end_top1_share", percent)),
        ("spans read right %", _value("spans_exact", percent)),
        ("but for order %", _value("spans_multiset", percent)),
        ("thoughts right %", _value("thought_exact", percent)),
        ("first wrong latent", _value("first_wrong_latent_mean", "{:,.1f}".format)),
        *(
            (f"ECR@{k}", _value(f"ecr.{k}", "{:,.2f}".format))
            for k in sorted({int(k) for r in rows for k in r.get("ecr") or {}})
        ),
    )


def accuracy(row: Row) -> str:
    """Return `97.2 ± 0.5`, in percent with one standard error."""
    error = row.get("accuracy_se")
    return percent(row["accuracy"]) + (f" ± {100 * error:.1f}" if error is not None else "")


def interval(found: Row) -> str:
    """Return `+1.2 [-0.3, +2.7]`: a `difference`, with its `difference_ci` where it has one, in points of percent."""
    ends = ", ".join(f"{100 * end:+.1f}" for end in found.get("difference_ci") or ())
    return f"{100 * found['difference']:+.1f}" + (f" [{ends}]" if ends else "")


def skipped(found: Row) -> str:
    """Return `3 (2 too long, 1 bad row)`, the rows of the split that are not in the accuracy, or a dash."""
    if not found:
        return NONE
    return f"{sum(found.values()):,} ({', '.join(f'{count:,} {reason}' for reason, count in found.items())})"


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f}"


def duration(seconds: float) -> str:
    """Return `45 s`, `3 min 20 s` or `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _value(path: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    """Return the cell of a column: what stands at a dotted path of a row, or a dash."""

    def cell(row: Row) -> str:
        value: Any = row
        for key in path.split("."):
            value = (value or {}).get(key)
        return NONE if value is None else show(value)

    return cell


def _table(rows: Sequence[Row], *columns: Column) -> Table:
    cells = [[show(row) for _, show in columns] for row in rows]
    shown = [i for i in range(len(columns)) if any(line[i] != NONE for line in cells)]
    return Table(
        ["model", "split", *(columns[i][0] for i in shown)],
        [
            [row["model"], row["split"], *(line[i] for i in shown)]
            for row, line in zip(rows, cells, strict=True)
            if any(cell != NONE for cell in line)
        ],
    )
