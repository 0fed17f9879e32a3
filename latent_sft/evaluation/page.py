"""The HTML of the report: one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from latent_sft.evaluation.plots import colour_of
from latent_sft.evaluation.tables import Table, accuracy, duration, latent_table, number, result_table

COST_NOTE = (
    "Accuracy with one standard error over problems. Reasoning steps are latents, or the tokens of an explicit CoT; "
    "forward passes are model calls per problem, the prompt included. Train time and examples seen add up every stage "
    "that led to the model. `stage1` is the gold path: the encoder has read the reference CoT, and the decoder answers "
    "from its latents.\n"
)
LATENT_NOTE = (
    "Entropy of a latent's kept weights; 0 is an ordinary token. ECR@K: tokens of its own span of the gold CoT that a "
    "latent has among its K largest entries; the paper's formula is not known, this one is reconstructed, and so is "
    "the Top-2 score. N_eff is largest where all solution paths fit equally badly, so read its ratio to random "
    "matchings.\n"
)

_CSS = """
:root { --ink:#1f2328; --muted:#656d76; --line:#d8dee4; --soft:#f6f8fa; --accent:179,54,94 }
* { box-sizing:border-box }
body { margin:0; color:var(--ink); background:#fff; font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1080px; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { font-size:1.75rem; line-height:1.25; margin:0 0 .25rem }
h2 { font-size:1.2rem; margin:2.75rem 0 .75rem; padding-top:.75rem; border-top:1px solid var(--line) }
h3 { font-size:1rem; margin:1.5rem 0 .5rem }
.muted, figcaption, .note { color:var(--muted) } .note { font-size:.87rem; max-width:80ch }
code, .token { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; font-size:.86em }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:.75rem; margin:1.5rem 0 }
.card { border:1px solid var(--line); border-top:3px solid var(--colour); border-radius:8px; padding:.75rem 1rem }
.card b { display:block; font-size:1.7rem; line-height:1.2; font-weight:600; white-space:nowrap }
.card small { font-size:.55em; font-weight:400; color:var(--muted) }
.scroll { overflow:auto; border:1px solid var(--line); border-radius:8px } .tall { max-height:34rem }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:.87rem }
th, td { padding:.42rem .7rem; text-align:right; white-space:nowrap; border-bottom:1px solid var(--line) }
th { background:var(--soft); font-weight:600; white-space:normal; vertical-align:bottom }
th { position:sticky; top:0; z-index:1 }
tr:last-child td { border-bottom:0 }
.left, .results th:nth-child(-n+2), .results td:nth-child(-n+2) { text-align:left }
figure { margin:1rem 0 } figure img { max-width:100%; height:auto; display:block }
.problem { border:1px solid var(--line); border-radius:8px; padding:1rem 1.1rem; margin:1rem 0 }
.problem p { margin:.2rem 0 .6rem; white-space:pre-wrap; overflow-wrap:anywhere }
.right { color:#1a7f37; font-weight:600 } .wrong { color:#cf222e; font-weight:600 }
.latents { width:auto } .latents th { text-align:center } .latents th.left { text-align:left }
.latents td { padding:.3rem .4rem; border-bottom:1px solid #fff; text-align:center; min-width:4.1rem }
.latents td.left { white-space:pre; text-align:left }
.latents small { display:block; font-size:.72em; opacity:.75 }
details { margin:.75rem 0 } summary { cursor:pointer; color:var(--muted) }
pre { background:var(--soft); border-radius:8px; padding:1rem; overflow:auto; font-size:.8rem }
"""


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
        pictures: SVG bytes: `accuracy`, `by_steps` (may be empty), and training curves by stage.
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
        _table(result_table(results)),
        _note(COST_NOTE),
        "<h2>Accuracy against reasoning length</h2>",
        _picture(pictures["accuracy"], "Error bars are one standard error."),
    ]
    if pictures.get("by_steps"):
        body += [
            "<h2>Accuracy by difficulty</h2>",
            _picture(pictures["by_steps"], f"Problems of the {split} split, grouped by the steps of their gold CoT."),
        ]
    trained = [stage for stage in stages if stage in pictures]
    if trained:
        body.append("<h2>Training</h2>")
    for stage in trained:
        body += [f"<h3>{escape(stage)}</h3>", _picture(pictures[stage], _stage_caption(stages[stage]))]
    latents = latent_table(results)
    if latents[1]:
        body += ["<h2>What the latents hold</h2>", _table(latents), _note(LATENT_NOTE)]
        body += [_heatmaps(m, problems.get((m, split), ()), open_=m == models[-1]) for m in models]
    if config:
        body += [
            "<h2>Configuration</h2>",
            f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>",
        ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


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


def _table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _note(text: str) -> str:
    # the only markup of the notes is `code`
    pieces = escape(text.strip()).split("`")
    marked = "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(pieces))
    return f'<p class="note">{marked}</p>'


def _picture(svg: bytes, caption: str) -> str:
    # as an image, not inline: the ids inside several SVGs would clash
    data = base64.b64encode(svg).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f'<figcaption class="note">{escape(caption)}</figcaption></figure>'
    )


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
