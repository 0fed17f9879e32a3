"""The HTML of the report: one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from latent_sft.evaluation.markup import document, note, picture, table
from latent_sft.evaluation.plots import colour_of
from latent_sft.evaluation.tables import accuracy, duration, intervention_table, latent_table, number, result_table

COST_NOTE = (
    "Accuracy with one standard error over problems. Reasoning steps are latents, or the tokens of an explicit CoT; "
    "forward passes are model calls per problem, the prompt included. Train time and examples seen add up every stage "
    "that led to the model. `stage1` is the gold path: the encoder has read the reference CoT, and the decoder answers "
    "from its latents.\n"
)
CAUSAL_NOTE = (
    "The answer was decoded again behind thoughts (latents, or the tokens of an explicit CoT) that were changed: input "
    "embeddings set to `zero`, to their `mean` over all problems, to those of another problem (`shuffle`), or cut to "
    "their first half (`truncate`); in brackets the difference in points, for a single run with its paired bootstrap "
    "interval of 95 %. A model that does not read its thoughts loses nothing, but one that always had as many can lose "
    "by `truncate` because their number is new to it. Gold recall, a measure of ours: of the gold CoT's tokens, but "
    "not those of the prompt, the share that the thoughts name in their top-k, or in the top-1 of each; by chance: the "
    "same with the CoT of another problem.\n"
)
LATENT_NOTE = (
    "Entropy of a latent's kept weights; 0 is an ordinary token. ECR@K: tokens of its own span of the gold CoT that a "
    "latent has among its K largest entries; the paper's formula is not known, this one is reconstructed.\n"
)


def render(
    *,
    title: str,
    results: Sequence[Mapping[str, Any]],
    problems: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    pictures: Mapping[str, bytes],
    stages: Mapping[str, Mapping[str, Any]],
    config: str,
) -> str:
    """Return the page.

    Args:
        title: heading.
        results: rows as in `report.json`, the most important split first.
        problems: records by (model, split).
        pictures: SVG bytes: `accuracy`, where there are any `passes`, `by_steps`, `interventions`, and training curves
            by stage.
        stages: manifests of the trained stages.
        config: text of the configuration, may be empty.
    """
    split = results[0]["split"]
    models = list(dict.fromkeys(r["model"] for r in results))
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{escape(split)} split, {results[0]["num_examples"]:,} problems</p>',
        _cards([r for r in results if r["split"] == split], models),
        "<h2>Results</h2>",
        table(result_table(results)),
        note(COST_NOTE),
        "<h2>Accuracy against reasoning length</h2>",
        picture(pictures["accuracy"], "Error bars are one standard error."),
    ]
    if pictures.get("passes"):
        body.append(picture(pictures["passes"], "The same against model calls, which take about the same time each."))
    if pictures.get("by_steps"):
        body += [
            "<h2>Accuracy by difficulty</h2>",
            picture(pictures["by_steps"], f"Problems of the {split} split, grouped by the steps of their gold CoT."),
        ]
    changed = intervention_table(results)
    if changed[1]:
        body += ["<h2>Is the reasoning used?</h2>", table(changed), note(CAUSAL_NOTE)]
    if pictures.get("interventions"):
        body.append(
            picture(pictures["interventions"], f"Accuracy on the {split} split. Error bars: one standard error.")
        )
    trained = [stage for stage in stages if stage in pictures]
    if trained:
        body.append("<h2>Training</h2>")
    for stage in trained:
        body += [f"<h3>{escape(stage)}</h3>", picture(pictures[stage], _stage_caption(stages[stage]))]
    latents = latent_table(results)
    if latents[1]:
        body += ["<h2>What the latents hold</h2>", table(latents), note(LATENT_NOTE)]
        body += [_heatmaps(m, problems.get((m, split), ()), open_=m == models[-1]) for m in models]
    if config:
        body += [
            "<h2>Configuration</h2>",
            f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>",
        ]
    return document(title, body)


def _cards(results: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    cards = []
    for row in results:
        share, plus_minus, error = accuracy(row).partition(" ±")
        cards.append(
            f'<div class="card" style="--colour:{colour_of(row["model"], models)}">{escape(row["model"])}'
            f"<b>{share}<small>{plus_minus}{error} %</small></b>"
            f'<span class="muted">{number(row.get("reasoning_steps_mean"), 1)} reasoning steps</span></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _stage_caption(manifest: Mapping[str, Any]) -> str:
    return (
        f"{duration(manifest.get('train_seconds'))}, {number(manifest.get('examples_seen'), 0)} training examples seen."
    )


def _heatmaps(model: str, problems: Sequence[Mapping[str, Any]], *, open_: bool) -> str:
    shown = [p for p in problems if p.get("latents")]
    if not shown:
        return ""
    inside = "".join(_heatmap(p) for p in shown)
    return (
        f"<details{' open' if open_ else ''}><summary>Latents of {escape(model)}, {len(shown)} problems: largest "
        f"entries with their weights, and the chunk of the gold CoT at the same place</summary>{inside}</details>"
    )


def _heatmap(problem: Mapping[str, Any]) -> str:
    latents, chunks = problem["latents"], problem.get("cot_chunks") or []
    verdict = "right" if problem["correct"] else "wrong"
    width = max(len(latent) for latent in latents)
    header = "".join(f"<th>{i}.</th>" for i in range(1, width + 1))
    rows = []
    for i in range(max(len(latents), len(chunks))):
        cells = "".join(_cell(token, weight) for token, weight in latents[i]) if i < len(latents) else ""
        missing = width - (len(latents[i]) if i < len(latents) else 0)
        chunk = escape(_visible(chunks[i])) if i < len(chunks) else ""
        rows.append(
            f'<tr><td class="muted">{i + 1}</td>{cells}{"<td></td>" * missing}<td class="left token">{chunk}</td></tr>'
        )
    return (
        f'<div class="problem"><div class="muted">{escape(str(problem["id"]))}</div><p>{escape(problem["problem"])}</p>'
        f'<div>answer <code>{escape(problem["prediction"])}</code> <span class="{verdict}">{verdict}</span>'
        f' <span class="muted">reference</span> <code>{escape(problem["reference"])}</code></div>'
        '<div class="scroll tall" style="margin-top:.75rem"><table class="latents"><thead><tr><th>latent</th>'
        f'{header}<th class="left">gold CoT</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></div>'
    )


def _cell(token: str, weight: float) -> str:
    ink = "#fff" if weight > 0.55 else "inherit"
    return (
        f'<td style="background:rgba(var(--accent),{0.04 + 0.86 * weight:.2f});color:{ink}"><span class="token">'
        f"{escape(_visible(token))}</span><small>{weight:.2f}</small></td>"
    )


def _visible(text: str) -> str:
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() else "␣" * max(1, len(shown))
