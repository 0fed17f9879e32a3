"""Render `docs/configuration.md` and a JSON schema from the source of the schema, so that none of them can differ.

Run as `python -m latent_sft.config.document docs/configuration.md` (`make docs-config`).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from latent_sft.config.experiment import Config
from latent_sft.config.schema import SourceConfig
from latent_sft.methods import METHODS

PACKAGE = Path(__file__).resolve().parent.parent

SCHEMA = (PACKAGE / "config/schema.py", PACKAGE / "config/training.py", *sorted((PACKAGE / "methods").glob("*.py")))

PREAMBLE = """# Configuration

Every key an experiment can set, with its default. This page is written by `make docs-config` from the docstrings in
`latent_sft/config/` and, for the sections of the methods, `latent_sft/methods/`; edit them there.

Values come from layers, the later ones stronger: these defaults, a YAML file, and `key=value` arguments:

```bash
latent-sft run quickstart seed=1 latent.rate=4 stage2.learning_rate=1e-3
latent-sft config quickstart seed=1    # prints the result
latent-sft config --schema > schema.json    # for editors: completion, meanings, mistakes
```

- **Files inherit.** `defaults: [base.yaml, other.yaml]` in a file puts these files below it, the later ones stronger. A
  name is a file beside the one that says it, a preset (`quickstart`), or a base of the presets (`bases/small.yaml`).
- **A method is off unless it is named.** A stage trains if its section stands in a file or in the arguments, be it
  empty: `cot: {}`. A method's section that names none of its stages, `METHOD: {init: cot}`, names all of them.
  `enabled` decides where it is given: `cot.enabled=false` leaves the stage out, and names nothing.
- **`train` is for every stage.** A file's `train: {micro_batch_size: 16}` goes to all stages, and a stage's own
  section in the same file says what differs there. A later layer is stronger as always: the argument
  `train.max_steps=10` shortens every stage.

An unknown key, a wrong type or a value out of range is one error that names the key. Sections of the same kind are
listed once.
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
    sections = _all_sections()
    sections["CommonConfig"].children += [
        (name, type(make()).__name__) for method in METHODS for name, make in method.sections.items()
    ]
    order: list[str] = []
    _place(sections, "CommonConfig", "", order)
    return "\n".join([PREAMBLE, *(_markdown(sections[name]) for name in order)])


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of an experiment's file; ranges are checked on loading only."""
    sections = _all_sections()
    meanings = {name: {row[0]: row[3] for row in section.rows} for name, section in sections.items()}
    kinds: dict[str, Any] = {}

    def of(kind: Any) -> dict[str, Any]:
        if dataclasses.is_dataclass(kind):
            name = kind.__name__
            if name not in kinds:
                kinds[name] = {}  # its place, in the order of the page
                kinds[name] |= {"type": "object", "additionalProperties": False, "properties": keys_of(kind)}
                if name in sections:
                    kinds[name]["description"] = sections[name].doc
            return {"$ref": f"#/$defs/{name}"}
        if kind is Any:  # a source of training rows, or several
            return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [of(str), of(SourceConfig)]}}]}
        inner, origin = get_args(kind), get_origin(kind)
        if origin is Literal:
            return {"enum": list(inner)}
        if origin is dict:
            return {"type": "object", "additionalProperties": of(inner[1])}
        if origin in (list, tuple):
            fixed = origin is tuple and inner[-1] is not Ellipsis
            return {"type": "array", "items": of(inner[0])} | (
                {"minItems": len(inner), "maxItems": len(inner)} if fixed else {}
            )
        return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]}

    def keys_of(kind: Any) -> dict[str, Any]:
        types, found = get_type_hints(kind), {}
        for f in dataclasses.fields(kind):
            found[f.name] = of(types[f.name])
            meaning = next((m for c in kind.__mro__ if (m := meanings.get(c.__name__, {}).get(f.name))), "")
            found[f.name] |= {"description": meaning} if meaning else {}
            found[f.name] |= {"default": f.default} if f.default is not dataclasses.MISSING else {}
        return found

    of(Config)
    root = kinds.pop("Config")
    inherit = {"type": "array", "items": {"type": "string"}, "description": "Files below this one, or presets."}
    root["properties"] = {"defaults": inherit} | root["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "latent-sft", **root, "$defs": kinds}


def _all_sections() -> dict[str, Section]:
    sections = _read_sections("\n".join(path.read_text(encoding="utf-8") for path in SCHEMA))
    spec = _attribute_meanings((PACKAGE / "method/types.py").read_text(encoding="utf-8"), "LatentSpec")
    rows = sections["LatentConfig"].rows
    rows[:] = [(name, kind, default, meaning or spec.get(name, "")) for name, kind, default, meaning in rows]
    return sections


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


def _markdown(section: Section) -> str:
    places = [prefix.rstrip(".") for prefix in section.prefixes]
    title = ", ".join(f"`{place}`" for place in places) if any(places) else "Top level"
    # keys of a section that occurs once are written in full, ready to copy
    prefix = section.prefixes[0] if len(places) == 1 else ""
    lines = [f"## {title}", "", section.doc, ""]
    if section.rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, kind, default, meaning in section.rows:
            cells = (f"`{prefix}{name}`", f"`{kind}`", f"`{default}`", meaning)
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
