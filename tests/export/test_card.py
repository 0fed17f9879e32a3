"""The model card: valid front matter, the prompt of training, and only numbers that were measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from latent_sft.config.experiment import Config
from latent_sft.config.schema import DataConfig, EvalConfig, ExportConfig, ModelConfig
from latent_sft.data.prompts import render_prompt
from latent_sft.errors import ArtefactError
from latent_sft.export.card import CardFacts, facts_of_run, model_card, prompt_code
from latent_sft.method.types import LatentSpec

CHAT = (
    "{% for m in messages %}{{ '+' if m['role'] == 'system' else '7' }} {{ m['content'] }} 9 {% endfor %}"
    "{% if add_generation_prompt %}8 8 {% endif %}"
)


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def evaluated(folder: Path, split: str, *, accuracy: float, **settings: Any) -> None:
    """Write what an evaluation of the model with fingerprint `f` leaves."""
    summary = {
        "accuracy": accuracy,
        "accuracy_se": None,
        "num_examples": 2,
        "reasoning_steps_mean": 3.0,
        "grader": "auto",
    }
    (folder / f"{split}.json").write_text(json.dumps({"summary": summary}))
    inputs = {"model": "f", "eval": dataclasses.asdict(EvalConfig(**settings))}
    (folder / split).mkdir()
    (folder / split / "manifest.json").write_text(json.dumps({"inputs": inputs}))


def with_chat(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    copy.chat_template = template
    return copy


@pytest.mark.parametrize("system", ["", "2 +\n'2'"])
@pytest.mark.parametrize("placement", ["system", "user"])
@pytest.mark.parametrize(
    ("template", "chat"),
    [("{problem}\n", None), ("1 {problem} 2", None), ("chat", CHAT), ("chat", CHAT.replace("8 8 ", "8 8 <think>\n"))],
)
def test_the_prompt_of_the_card_is_the_prompt_of_training(
    tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, template: str, chat: str | None, placement: str, system: str
) -> None:
    if chat is not None:
        tokenizer = with_chat(tokenizer, chat)
    spec = dataclasses.replace(spec, prompt_template=template, system_prompt=system, system_placement=placement)
    card = model_card(spec, tokenizer, CardFacts(name="demo"))
    code = prompt_code(spec, "<think>" if chat and "<think>" in chat else "")
    assert code in card
    scope: dict[str, Any] = {"tokenizer": tokenizer, "problem": "3 + 4"}
    exec(code, scope)
    assert scope["inputs"]["input_ids"].tolist()[0] + list(spec.think_ids) == render_prompt(tokenizer, spec, "3 + 4")


def test_a_card_without_facts_claims_nothing(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec) -> None:
    card = model_card(spec, tokenizer, CardFacts(name="demo"))
    meta = front_matter(card)
    assert meta == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "tags": ["latent-reasoning", "custom_generate"],
    }
    assert "No evaluation was recorded" in card
    assert "Not recorded with this checkpoint" in card
    assert "%" not in card
    assert "The method is not recorded with this checkpoint." in card


def test_facts_come_from_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, spec: LatentSpec) -> None:
    config = Config(
        name="demo",
        model=ModelConfig(name_or_path="org/base-1b"),
        data=DataConfig(train="/secret/place/train.jsonl", test=""),
        export=ExportConfig(license="apache-2.0"),
    )
    evaluated(tmp_path, "test", accuracy=0.5, sample=True)
    evaluated(tmp_path, "validation", accuracy=1.0)
    facts = facts_of_run(config, {"fingerprint": "f", "train_rows": 10}, tmp_path, "latent-sft")
    card = model_card(spec, tokenizer, facts)
    assert front_matter(card)["base_model"] == "org/base-1b"
    assert front_matter(card)["license"] == "apache-2.0"
    first = card.index("| validation | 100.0 % | 2 | 3.0 | auto | greedy |")
    second = card.index("| test | 50.0 % | 2 | 3.0 | auto | sampled, temperature 0.6, top-p 0.95 |")
    assert first < second
    assert "File `train.jsonl`, read as `records`; 10 training problems" in card
    assert "secret" not in card


def test_noisy_latents_are_named(tmp_path: Path) -> None:
    evaluated(tmp_path, "test", accuracy=0.5, sample=True, latent_noise=True)
    found = facts_of_run(Config(), {"fingerprint": "f"}, tmp_path, "latent-sft").results
    assert found["test"]["decoding"] == "sampled, temperature 0.6, top-p 0.95, noisy latents"


def test_measurements_of_an_earlier_training_are_left_out(tmp_path: Path) -> None:
    evaluated(tmp_path, "test", accuracy=0.5)
    assert facts_of_run(Config(), {"fingerprint": "another"}, tmp_path, "latent-sft").results == {}


def test_a_local_base_model_is_not_named_as_a_hub_model(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(name_or_path=str(tmp_path)))
    assert facts_of_run(config, {"fingerprint": "f"}, tmp_path / "none", "latent-sft").base_model is None


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    evaluated(tmp_path, "test", accuracy=0.5)
    (tmp_path / "test.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"test\.json: damaged JSON"):
        facts_of_run(Config(), {"fingerprint": "f"}, tmp_path, "latent-sft")
