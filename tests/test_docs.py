"""The pages lead where they say: every relative link and path in them exists, and the index names every page."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
PAGES = sorted(ROOT / name for name in _TRACKED.split()) or sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# the history may speak of what is gone
HISTORY = ("CHANGELOG.md", "log.md", "names.md")
CURRENT = [page for page in PAGES if page.name not in HISTORY and page.parent.name != "decisions"]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_a_page_names_is_there(page: Path) -> None:
    names = re.findall(r"`((?:[\w-]+/)+[a-z_0-9-]+\.(?:py|md|yaml))[:`]", page.read_text(encoding="utf-8"))
    wrong = []
    for name in names:
        # a page may name files of other repositories: only folders that are here are looked into
        roots = [ROOT / part for part in ("", "latent_sft", "docs") if (ROOT / part / name.split("/")[0]).is_dir()]
        if roots and not any((root / name).exists() for root in roots):
            wrong.append(name)
    assert not wrong


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = [p for p in (ROOT / "docs").rglob("*.md") if p.name != "README.md" and p.parent.name != "decisions"]
    assert not [str(p) for p in pages if f"({p.relative_to(ROOT / 'docs')})" not in index]
