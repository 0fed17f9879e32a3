"""Render `docs/configuration.md` from the source of the schema, so that documentation and code cannot differ.

Run as `python -m latent_sft.config.document docs/configuration.md` (`make docs-config`).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from latent_sft.methods import METHODS

PACKAGE = Path(__file__).resolve().parent.parent

SCHEMA = (PACKAGE / "config/schema.py", PACKAGE / "config/training.py", *sorted((PACKAGE / "methods").glob("*.py")))

PREAMBLE = """# Configuration

Every key an experiment can set, with its default. This page is written by `make docs-config` from the docstrings in
`latent_sft/config/` and, for the sections of the methods, `latent_sft/methods/`; edit them there.

Values come from three layers, the later ones stronger: these defaults, one YAML file, and `key=value` arguments:

```bash
latent-sft run quickstart seed=1 latent.rate=4 stage2.learning_rate=1e-3
latent-sft config quickstart seed=1    # prints the result
```

An unknown key, a wrong type or a value out of range is one error that names the key. A stage's section is listed once
where several stages share it.
"""


@dataclass(kw_only=True)
class Section:
    """One dataclass of the schema.

    Attributes:
        doc: its docstring.
        rows: `(name, type, default, meaning)` of the keys it holds itself.
        children: `(name, class name)` of the sections below it.
        prefixes: dotted places where it occurs, with the trailing dot (the root is the empty string).
    """

    doc: str
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    children: list[tuple[str, str]] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)


def render() -> str:
    """Return the Markdown of all keys, section by section, in the order of `Config`."""
    sections = _read_sections("\n".join(path.read_text(encoding="utf-8") for path in SCHEMA))
    sections["CommonConfig"].children += [
        (name, type(make()).__name__) for method in METHODS for name, make in method.sections.items()
    ]
    spec_meanings = _attribute_meanings((PACKAGE / "method/types.py").read_text(encoding="utf-8"), "LatentSpec")
    order: list[str] = []
    _place(sections, "CommonConfig", "", order)
    return "\n".join([PREAMBLE, *(_markdown(sections[name], spec_meanings) for name in order)])


def _read_sections(source: str) -> dict[str, Section]:
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    sections = {name: Section(doc=_one_line(ast.get_docstring(node))) for name, node in classes.items()}
    for name, node in classes.items():
        for here, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(here, ast.AnnAssign) or not isinstance(here.target, ast.Name):
                continue
            kind = ast.unparse(here.annotation)
            if kind in classes:
                sections[name].children.append((here.target.id, kind))
                continue
            default = ast.unparse(here.value) if here.value is not None else ""
            sections[name].rows.append((here.target.id, _plain_type(kind), default, _string(after)))
    return sections


def _place(sections: dict[str, Section], name: str, prefix: str, order: list[str]) -> None:
    # depth first, so that a section stands right after the one it belongs to
    if name not in order:
        order.append(name)
    sections[name].prefixes.append(prefix)
    for child, kind in sections[name].children:
        _place(sections, kind, f"{prefix}{child}.", order)


def _markdown(section: Section, spec_meanings: dict[str, str]) -> str:
    places = [prefix.rstrip(".") for prefix in section.prefixes]
    title = ", ".join(f"`{place}`" for place in places) if any(places) else "Top level"
    meanings = spec_meanings if places == ["latent"] else {}
    # keys of a section that occurs once are written in full, ready to copy
    prefix = section.prefixes[0] if len(places) == 1 else ""
    lines = [f"## {title}", "", section.doc, ""]
    if section.rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, kind, default, meaning in section.rows:
            cells = (f"`{prefix}{name}`", f"`{kind}`", f"`{default}`", meaning or meanings.get(name, ""))
            lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    # a bar ends a cell even inside backticks; outside them, <name> would be taken for HTML
    pieces = text.split("`")
    pieces[::2] = [piece.replace("<", "&lt;") for piece in pieces[::2]]
    return "`".join(pieces).replace("|", r"\|")


def _attribute_meanings(source: str, class_name: str) -> dict[str, str]:
    # the Google-style `Attributes:` of one class
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name)
    listed = inspect.cleandoc(ast.get_docstring(node) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, flags=re.M)
    return {name: _one_line(text) for name, text in found}


def _plain_type(kind: str) -> str:
    choice = re.fullmatch(r"Literal\[(.*)\]", kind)
    return choice.group(1).replace("'", "").replace(", ", " | ") if choice else kind


def _string(node: ast.stmt | None) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return _one_line(node.value.value) if is_text else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
