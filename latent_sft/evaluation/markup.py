"""Pieces of the HTML pages: one file each, with its style and pictures inside, loading nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from latent_sft.evaluation.tables import Table

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


def document(title: str, body: Sequence[str]) -> str:
    """Return a whole page; empty parts of the body are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(cells: Table) -> str:
    """Return a table of text cells; the first two columns are aligned left."""
    header, rows = cells
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def note(text: str) -> str:
    """Return a paragraph in small print; `code` is marked."""
    # the only markup of the notes is `code`
    pieces = escape(text.strip()).split("`")
    marked = "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(pieces))
    return f'<p class="note">{marked}</p>'


def picture(svg: bytes, caption: str) -> str:
    """Return an SVG with its caption."""
    # as an image, not inline: the ids inside several SVGs would clash
    data = base64.b64encode(svg).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f'<figcaption class="note">{escape(caption)}</figcaption></figure>'
    )
