"""The page of all configuration keys is complete and is what the code says."""

from __future__ import annotations

from pathlib import Path

from latent_sft.config import document
from latent_sft.config.load import dotted_keys
from latent_sft.methods import SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def test_page_is_up_to_date() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == document.render(), "the schema changed; run `make docs-config`"


def test_every_key_is_on_the_page() -> None:
    page = document.render()
    distilled = ("codi.", "pccot.", "kava.")
    stages = tuple(f"{section}." for section in SECTIONS.values())
    shared = [*(f"{name}kv." for name in distilled), *distilled]
    for key in dotted_keys():
        # sections of the same dataclass are listed once, by the bare names of their keys
        prefix = next((p for p in (*stages, *shared) if key.startswith(p)), "")
        name = key.removeprefix(prefix)
        of_every_stage = prefix in stages and name not in ("enabled", "start_from")
        assert f"| `{'train.' * of_every_stage}{name}` |" in page, key


def test_meanings_come_from_the_string_below_a_field() -> None:
    source = '''
class Leaf:
    """A leaf."""

    kind: Literal["a", "b"] = "a"
    """First line
    and second, with a | and `<x>` but <y>."""
    bare: int = 3


class Config:
    """Top."""

    left: Leaf = field(default_factory=Leaf)
    right: Leaf = field(default_factory=Leaf)
'''
    sections = document._read_sections(source)
    order: list[str] = []
    document._place(sections, "Config", "", order)
    assert order == ["Config", "Leaf"]
    assert sections["Leaf"].rows == [
        ("kind", "a | b", "'a'", "First line and second, with a | and `<x>` but <y>."),
        ("bare", "int", "3", ""),
    ]
    lines = document._markdown(sections["Leaf"]).splitlines()
    assert lines[0] == "## `left`, `right`"
    assert lines[-2:] == [
        r"| `kind` | `a \| b` | `'a'` | First line and second, with a \| and `<x>` but &lt;y>. |",
        "| `bare` | `int` | `3` |  |",
    ]


def test_latent_keys_take_their_meaning_from_the_spec() -> None:
    source = '''
class LatentSpec:
    """Title.

    Attributes:
        rate: CoT tokens
            per latent.
        top_k: kept entries.

    Note:
        nothing.
    """
'''
    assert document._attribute_meanings(source, "LatentSpec") == {
        "rate": "CoT tokens per latent.",
        "top_k": "kept entries.",
    }
