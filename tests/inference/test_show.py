"""One problem on the command line: the same decoding as everywhere, readable and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from latent_sft.config.schema import LatentConfig, PromptConfig, TinyModelConfig
from latent_sft.data.prompts import build_spec, render_prompt
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.inference.generate import Decoded, generate
from latent_sft.inference.show import ShownLatent, Solution, as_table, load, read_spec
from latent_sft.method.types import SPEC_FILE, LatentSpec
from latent_sft.models.load import build_tiny, save_lm
from latent_sft.models.tiny_tokenizer import build_tokenizer

PROBLEM = "2 + 3"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["0 1 2 3 4 5 6 7 8 9 +"], TinyModelConfig(), PromptConfig())


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return `<run>/stage2/final` of a random model."""
    tiny = TinyModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32)
    folder = tmp_path_factory.mktemp("run") / "stage2" / "final"
    folder.parent.mkdir()
    save_lm(build_tiny(tiny, tokenizer, seed=0), folder, tokenizer)
    latent = LatentConfig(top_k=4, min_latents=3, max_latents=3, max_answer_tokens=5)
    (folder / SPEC_FILE).write_text(json.dumps(build_spec(tokenizer, PromptConfig(), latent, len(tokenizer)).to_dict()))
    return folder


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> LatentSpec:
    return read_spec(checkpoint)


def decode(checkpoint: Path, spec: LatentSpec, tokenizer: PreTrainedTokenizerBase, **options: object) -> Decoded:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return generate(model, spec, [render_prompt(tokenizer, spec, PROBLEM)], **options)[0]


def test_json_holds_what_the_engine_decoded(
    checkpoint: Path, spec: LatentSpec, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = decode(checkpoint, spec, tokenizer, thinker="latent")
    found = json.loads(load(checkpoint).generate(PROBLEM, top=2).to_json())
    assert found["problem"] == PROBLEM
    assert found["num_steps"] == 3
    assert found["answer"] == tokenizer.decode(expected.answer_ids)
    assert found["forward_passes"] == expected.forward_passes
    for latent, ids, weights in zip(
        found["latents"], expected.latent_ids.tolist(), expected.latent_weights.tolist(), strict=True
    ):
        assert [text for text, _ in latent["tokens"]] == [tokenizer.decode([token]) for token in ids[:2]]
        assert [weight for _, weight in latent["tokens"]] == pytest.approx(weights[:2], abs=1e-4)
        assert latent["entropy"] == pytest.approx(-sum(w * math.log(w) for w in weights), abs=1e-4)


def test_the_table_is_for_reading() -> None:
    latents = [ShownLatent(entropy=0.69, tokens=[("7", 0.5), (" [b]", 0.5)])]
    shown = Solution(
        problem="p",
        thinker="latent",
        latents=latents,
        thought="",
        answer="7",
        num_steps=1,
        forward_passes=4,
        finished=False,
    )
    text = as_table(shown)
    assert "latent tokens: 1" in text
    assert "│ 1 │    0.69 │ '7' 0.50  ' [b]' 0.50" in text  # markup in a token is text
    assert text.splitlines()[-1] == "answer: 7 … (cut)"


def test_settings_of_the_call_replace_the_spec(checkpoint: Path) -> None:
    assert load(checkpoint).generate(PROBLEM, min_latents=1, max_latents=1).num_steps == 1
    with pytest.raises(ConfigError, match=r"latent\.min_latents: got 3, expected 0 to max_latents=2"):
        load(checkpoint).generate(PROBLEM, max_latents=2)


def test_noise_changes_weights_by_seed_and_lists_the_heaviest_first(checkpoint: Path) -> None:
    clean, first, again, other = (
        load(checkpoint).generate(PROBLEM, **options)
        for options in ({}, {"noise_scale": 2.0}, {"noise_scale": 2.0}, {"noise_scale": 2.0, "seed": 1})
    )
    assert first == again
    assert len({str(shown.latents[0]) for shown in (clean, first, other)}) == 3
    for latent in first.latents:
        weights = [weight for _, weight in latent.tokens]
        assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("thinker", ["explicit", "none"])
def test_models_without_latents_are_shown_too(
    thinker: str, checkpoint: Path, spec: LatentSpec, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "thinker.json").write_text(json.dumps({"thinker": thinker}))
    expected = decode(checkpoint, spec, tokenizer, thinker="explicit", max_cot_tokens=0 if thinker == "none" else 512)
    shown = load(tmp_path).generate(PROBLEM)
    assert (shown.thinker, shown.num_steps, shown.latents) == (thinker, expected.num_steps, [])
    text = as_table(shown)
    assert text.startswith("answer:" if thinker == "none" else f"reasoning ({expected.num_steps} tokens): ")


def test_a_model_that_needs_the_reference_cot_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "thinker.json").write_text(json.dumps({"thinker": "oracle"}))
    with pytest.raises(ArtefactError, match=r"its thoughts are made from the reference CoT \('oracle'\); expected"):
        load(tmp_path)


def test_weights_are_used_in_the_dtype_they_were_saved_in(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_lm(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16), tmp_path / "final", tokenizer)
    (tmp_path / "final" / SPEC_FILE).write_bytes((checkpoint / SPEC_FILE).read_bytes())
    assert load(tmp_path / "final").generate(PROBLEM).num_steps == 3


def test_what_is_no_checkpoint_says_what_is(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtefactError, match=r"there is no latent_spec\.json\. Expected an exported folder"):
        load(tmp_path)
    with pytest.raises(ArtefactError, match=r"stage2: not a checkpoint .* Did you mean .*/stage2/final\?"):
        load(checkpoint.parent)
    with pytest.raises(ArtefactError, match=r"someone/nothing: no such folder, and no checkpoint"):
        load("someone/nothing")
    (tmp_path / SPEC_FILE).write_bytes((checkpoint / SPEC_FILE).read_bytes())
    with pytest.raises(ArtefactError, match=r"config\.json cannot be read"):
        load(tmp_path)
