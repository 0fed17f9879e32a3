"""The page of all configuration keys is complete and is what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_sft import cli
from latent_sft.config import document
from latent_sft.config.load import dotted_keys
from latent_sft.config.presets import preset_paths
from latent_sft.methods import SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def test_page_is_up_to_date() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == document.render(), "the schema changed; run `make docs-config`"


def test_every_key_is_on_the_page() -> None:
    page = document.render()
    distilled = ("codi.", "pccot.", "kava.", "sim_cot.codi.", "coconut.", "sim_cot.coconut.")
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


def names_in(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in node["properties"].items():
        target = schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else {}
        found += names_in(schema, target, f"{prefix}{name}.") if target else [prefix + name]
    return found


def mistakes(schema: dict[str, Any], node: dict[str, Any], value: Any, at: str = "") -> list[str]:
    """Return where a value does not fit: as much of JSON Schema as this one uses."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" in node:
        found = [mistakes(schema, way, value, at) for way in node["anyOf"]]
        return [] if [] in found else found[0]
    if "enum" in node:
        return [] if value in node["enum"] else [at]
    types = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}
    if not isinstance(value, types[node["type"]]) or (isinstance(value, bool) and node["type"] != "boolean"):
        return [at]
    if isinstance(value, list):
        fits = node.get("minItems", 0) <= len(value) <= node.get("maxItems", 10**9)
        return [m for item in value for m in mistakes(schema, node["items"], item, at)] if fits else [at]
    found = []
    for name, inner in value.items() if isinstance(value, dict) else ():
        rule = node.get("properties", {}).get(name, node["additionalProperties"])
        found += mistakes(schema, rule, inner, f"{at}{name}.") if rule else [f"{at}{name}."]
    return found


def test_the_schema_for_editors_knows_every_key_and_no_other(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["config", "--schema"])
    assert end.value.code == 0
    schema = json.loads(capsys.readouterr().out)
    assert sorted(names_in(schema, schema)) == sorted(["defaults", *dotted_keys()])
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))
    train = schema["$defs"]["TrainConfig"]["properties"]
    assert train["schedule"]["enum"] == ["cosine", "linear", "constant"]
    assert (train["learning_rate"]["type"], train["learning_rate"]["default"]) == ("number", 1e-4)
    assert train["max_steps"]["description"] == "Optimizer steps; 0 trains `epochs`."
    assert schema["$defs"]["LatentConfig"]["properties"]["rate"]["description"].startswith("CoT tokens per latent")


def test_the_schema_takes_every_preset_and_sees_mistakes() -> None:
    schema = document.json_schema()
    paths = [*preset_paths().values(), *(ROOT / "configs/bases").glob("*.yaml")]
    assert len(paths) > 12
    loader = type("Yaml12", (yaml.SafeLoader,), {})  # editors read 1e-3 as a number
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^\d+(\.\d*)?e-\d+$"), list("0123456789"))
    for path in paths:
        assert mistakes(schema, schema, yaml.load(path.read_text(encoding="utf-8"), loader)) == [], path
    wrong = {"latent": {"rat": 3, "rate": "two", "noise_clip": [1]}, "cot": {"schedule": "step"}, "eval": 3}
    places = ["latent.rat.", "latent.rate.", "latent.noise_clip.", "cot.schedule.", "eval."]
    assert mistakes(schema, schema, wrong) == places
