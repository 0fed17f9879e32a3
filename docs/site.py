"""Hooks of the site: pages from outside docs/, the API reference, and links as they are right on GitHub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import latent_sft

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# pages of the site that are files at the root of the repository
OUTSIDE = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and whatever else of the repository a page links to, as a plain file."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in OUTSIDE.items()}
    decisions = sorted((DOCS / "decisions").glob("0*.md"))
    titles = [(path.name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for path in decisions]
    pages["decisions/index.md"] = "# Decisions\n\n" + "".join(f"- [{title}]({name})\n" for name, title in titles)
    names = [latent_sft._HOME[name] for name in latent_sft.__all__]
    pages["api.md"] = "# Python\n\n" + "".join(f"::: latent_sft.{name}\n\n" for name in names)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for page in files.documentation_pages():
        place = _place(page.src_uri)
        for match in LINK.finditer(page.content_string):
            target = (place.parent / match[2]).resolve()
            inside = target.is_relative_to(ROOT) and not target.is_relative_to(DOCS)
            name = str(target.relative_to(ROOT)) if inside else ""
            if inside and target.is_file() and name not in OUTSIDE and not files.get_file_from_path(f"source/{name}"):
                files.append(File.generated(config, f"source/{name}", abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the relative links of a page; one to a folder of the repository becomes its text alone."""
    here = _place(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = (here.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        name = str(target.relative_to(ROOT))
        if target == DOCS / "decisions":
            place = "decisions/index.md"
        elif target.is_relative_to(DOCS):
            place = str(target.relative_to(DOCS))
        else:
            place = OUTSIDE.get(name, f"source/{name}")
        return f"{match[1]}{os.path.relpath(place, Path(page.file.src_uri).parent)}{match[3] or ''}{match[4]}"

    return LINK.sub(rewritten, markdown)


def _place(uri: str) -> Path:
    """Return where the Markdown of a page stands in the repository."""
    return next((ROOT / name for name, page in OUTSIDE.items() if page == uri), DOCS / uri)
