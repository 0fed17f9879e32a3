"""The tables of the report as text cells; the HTML, the Markdown and the terminal show the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]
NONE = "–"


def result_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return header and rows of the main table: models x splits, accuracy and every cost apart.

    Args:
        results: as in `report.json`; what a row lacks is shown as a dash.
    """
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("model", lambda r: r["model"]),
        ("split", lambda r: r["split"]),
        ("accuracy %", accuracy),
        ("n", lambda r: f"{r['num_examples']:,}"),
        ("reasoning steps", lambda r: number(r.get("reasoning_steps_mean"), 1)),
        ("answer tokens", lambda r: number(r.get("answer_tokens_mean"), 1)),
        ("forward passes", lambda r: number(r.get("forward_passes_mean"), 1)),
        ("finished %", lambda r: percent(r.get("finished_share"))),
        ("s / problem", lambda r: number(r.get("seconds_per_problem"), 4)),
        ("train time", lambda r: duration(r.get("train_seconds"))),
        ("examples seen", lambda r: number(r.get("examples_seen"), 0)),
    ]
    if any(r.get("skipped") for r in results):
        columns.insert(4, ("skipped", skipped))
    for k in sorted({int(k) for r in results for k in r.get("pass_at") or {} if int(k) > 1}):
        columns.append((f"pass@{k} %", lambda r, k=k: percent((r.get("pass_at") or {}).get(str(k)))))
    return [name for name, _ in columns], [[cell(r) for _, cell in columns] for r in results]


def latent_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return header and rows of what the latents hold, for the models that think in latents."""
    rows = [r for r in results if r.get("latent_entropy_mean") is not None]
    ks = sorted({int(k) for r in rows for k in r.get("ecr") or {}})
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("model", lambda r: r["model"]),
        ("split", lambda r: r["split"]),
        ("latents, mean", lambda r: number(r.get("latent_steps_mean"), 1)),
        ("max", lambda r: number(r.get("latent_steps_max"), 0)),
        ("entropy (nats)", lambda r: number(r.get("latent_entropy_mean"), 2)),
        ("top-1 is </think> %", lambda r: percent(r.get("end_top1_share"))),
        *((f"ECR@{k}", lambda r, k=k: number((r.get("ecr") or {}).get(str(k)), 2)) for k in ks),
    ]
    if any("n_eff" in r for r in rows):
        columns += [
            ("N_eff", lambda r: number(r.get("n_eff"), 2)),
            ("N_eff / random", lambda r: number(r.get("n_eff_score"), 2)),
            ("Top-2", lambda r: number(r.get("top2_score"), 2)),
        ]
    return [name for name, _ in columns], [[cell(r) for _, cell in columns] for r in rows]


def intervention_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return header and rows of what changes with changed thoughts, and of how well they agree with the gold CoT."""
    rows = [r for r in results if r.get("interventions") or r.get("gold_recall") is not None]
    names = [
        n for n in ("zero", "mean", "shuffle", "truncate") if any(n in (r.get("interventions") or {}) for r in rows)
    ]

    def cell(row: Mapping[str, Any], name: str) -> str:
        found = (row.get("interventions") or {}).get(name)
        return NONE if found is None else f"{percent(found['accuracy'])} ({interval(found)})"

    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("model", lambda r: r["model"]),
        ("split", lambda r: r["split"]),
        ("as decoded %", lambda r: percent((r.get("interventions") or {}).get("given", {}).get("accuracy"))),
        *((f"{name} %", lambda r, name=name: cell(r, name)) for name in names),
        ("gold recall %", lambda r: percent(r.get("gold_recall"))),
        ("by chance %", lambda r: percent(r.get("gold_recall_chance"))),
        ("top-1 recall %", lambda r: percent(r.get("gold_recall_top1"))),
        ("by chance %", lambda r: percent(r.get("gold_recall_top1_chance"))),
    ]
    return [name for name, _ in columns], [[cell(r) for _, cell in columns] for r in rows]


def interval(found: Mapping[str, Any] | None) -> str:
    """Return `+1.2 [-0.3, +2.7]`, a `difference` with its `difference_ci`, in points of percent, or a dash."""
    if not found:
        return NONE
    value = f"{100 * found['difference']:+.1f}"
    if not found.get("difference_ci"):
        return value
    low, high = found["difference_ci"]
    return f"{value} [{100 * low:+.1f}, {100 * high:+.1f}]"


def accuracy(row: Mapping[str, Any]) -> str:
    """Return `97.2 ± 0.5`, in percent with one standard error."""
    error = row.get("accuracy_se")
    return percent(row["accuracy"]) + (f" ± {100 * error:.1f}" if error is not None else "")


def skipped(row: Mapping[str, Any]) -> str:
    """Return `3 (2 too long, 1 bad row)`, the rows of the split that are not in the accuracy, or a dash."""
    found = row.get("skipped")
    if not found:
        return NONE
    return f"{sum(found.values()):,} ({', '.join(f'{count:,} {reason}' for reason, count in found.items())})"


def percent(value: float | None) -> str:
    """Return a share in percent, or a dash."""
    return NONE if value is None else f"{100 * value:.1f}"


def number(value: float | None, digits: int) -> str:
    """Return a number with thousands separators, or a dash."""
    return NONE if value is None else f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """Return `45 s`, `3 min 20 s` or `2 h 05 min`, or a dash."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def markdown(table: Table) -> str:
    """Return a table in Markdown; the first two columns are aligned left."""
    header, rows = table
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
