"""LatentSpec: what it refuses, what its fingerprint sees, and that it survives the trip to a file."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from latent_sft.errors import ConfigError
from latent_sft.method.types import SPEC_FORMAT, LatentSpec

BASE: dict[str, Any] = {"think_ids": (1,), "end_think_ids": (2, 3), "eos_id": 0, "pad_id": 0, "vocab_size": 50}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"think_ids": ()}, "latent.think_ids: got (), expected at least one token"),
        ({"end_think_ids": ()}, "latent.end_think_ids: got (), expected at least one token"),
        ({"end_think_ids": (50,)}, "latent.end_think_ids: got (50,), expected ids below 50"),
        ({"think_ids": (-1,)}, "latent.think_ids: got (-1,), expected ids below 50"),
        ({"rate": 0}, "latent.rate: got 0, expected an integer >= 1"),
        ({"segmentation": "sentence"}, "latent.segmentation: got 'sentence', expected 'fixed' or 'step'"),
        ({"top_k": 51}, "latent.top_k: got 51, expected 1 to 50, the vocabulary of this model"),
        ({"top_k": 0}, "latent.top_k: got 0, expected 1 to 50"),
        ({"projection": "output"}, "latent.projection: got 'output', expected 'input' or 'head'"),
        ({"temperature": 0.0}, "latent.temperature: got 0.0, expected a number > 0"),
        ({"decode_temperature": -1.0}, "latent.decode_temperature: got -1.0, expected a number > 0"),
        ({"noise_temperature": 0.0}, "latent.noise_temperature: got 0.0, expected a number > 0"),
        ({"noise_scale": -0.1}, "latent.noise_scale: got -0.1, expected a number >= 0"),
        ({"noise_clip": (3.0, -1.5)}, "latent.noise_clip: got (3.0, -1.5), expected [low, high] with low < high"),
        ({"marker_positions": "flat"}, "latent.marker_positions: got 'flat', expected 'stretched' or 'transparent'"),
        ({"min_latents": 9, "max_latents": 8}, "latent.min_latents: got 9, expected 0 to max_latents=8"),
        ({"max_answer_tokens": 0}, "latent.max_answer_tokens: got 0, expected an integer >= 1"),
        ({"system_placement": "top"}, "latent.system_placement: got 'top', expected 'system' or 'user'"),
        ({"prompt_template": "no slot"}, "latent.prompt_template: got 'no slot', expected 'chat' or a text with one"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LatentSpec(**{**BASE, **change})


def test_full_vocabulary_and_one_entry_are_allowed() -> None:
    assert LatentSpec(**{**BASE, "top_k": 50}).top_k == 50
    assert LatentSpec(**{**BASE, "top_k": 1}).top_k == 1


def test_spec_survives_json() -> None:
    spec = LatentSpec(**{**BASE, "noise_clip": (-2.0, 1.0), "prompt_template": "Q: {problem}\n"})
    assert LatentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_another_format_is_refused() -> None:
    values = LatentSpec(**BASE).to_dict()
    with pytest.raises(ConfigError, match=f"format 99, expected {SPEC_FORMAT}"):
        LatentSpec.from_dict({**values, "format": 99})
    with pytest.raises(ConfigError, match="format None"):
        LatentSpec.from_dict({k: v for k, v in values.items() if k != "format"})


def test_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown fields \['halting'\]"):
        LatentSpec.from_dict({**LatentSpec(**BASE).to_dict(), "halting": True})


def test_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LatentSpec(**BASE).rate = 4  # type: ignore[misc]


# another legal value for every field; a new field without an entry here fails the test below
CHANGED: dict[str, Any] = {
    "think_ids": (4,),
    "end_think_ids": (2,),
    "eos_id": 5,
    "pad_id": 6,
    "vocab_size": 51,
    "rate": 4,
    "segmentation": "step",
    "top_k": 11,
    "projection": "head",
    "temperature": 4.0,
    "marker_positions": "stretched",
    "noise_scale": 1.0,
    "noise_temperature": 0.5,
    "noise_clip": (-1.0, 3.0),
    "decode_temperature": 0.5,
    "exclude_end": False,
    "marker_input": "previous",
    "min_latents": 1,
    "max_latents": 127,
    "max_answer_tokens": 63,
    "prompt_template": "chat",
    "system_prompt": "Think.",
    "system_placement": "system",
}


def test_every_field_has_a_changed_value_here() -> None:
    assert CHANGED.keys() == {field.name for field in dataclasses.fields(LatentSpec)}


@pytest.mark.parametrize("name", CHANGED)
def test_fingerprint_sees_every_field(name: str) -> None:
    spec = LatentSpec(**BASE)
    assert dataclasses.replace(spec, **{name: CHANGED[name]}).fingerprint() != spec.fingerprint()


def test_fingerprint_is_stable() -> None:
    spec = LatentSpec(**BASE)
    assert re.fullmatch("[0-9a-f]{16}", spec.fingerprint())
    assert spec.fingerprint() == LatentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).fingerprint()
