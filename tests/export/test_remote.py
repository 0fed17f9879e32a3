"""Exports of every family ask for trust, and with it load, are wrapped and are saved like any other model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import FAMILIES, build
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from latent_sft.config.schema import ModelConfig
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.export.remote import MODEL_TYPE, REMOTE_FILE, remote_code
from latent_sft.models.load import load_config, load_lm, vocabulary_size

IDS = torch.tensor([[7, 5, 8]])


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("remote") / "export")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).generate(IDS).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_it_was_once_it_is_trusted(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    values, code = remote_code(json.loads(path.read_text()), ["note.txt"])
    path.write_text(json.dumps(values))
    (tmp_path / "a" / REMOTE_FILE).write_text(code)
    (tmp_path / "a" / "note.txt").write_text("kept")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", trust_remote_code=True, attn_implementation=model.config._attn_implementation
    )
    assert isinstance(loaded, type(model)) and loaded.config.model_type == family
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (saved["model_type"], saved["base_model_type"]) == (MODEL_TYPE, family)
    assert (tmp_path / "b" / REMOTE_FILE).read_text() == code and (tmp_path / "b" / "note.txt").read_text() == "kept"
    assert remote_code(saved, ["note.txt"])[1] == code
    plain = load_lm(tmp_path / "b", ModelConfig(attention=model.config._attn_implementation))
    assert type(plain) is type(model) and not hasattr(plain.config, "auto_map")
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_a_model_with_code_of_its_own_is_left_as_it_is() -> None:
    own = {"model_type": "somebodys", "auto_map": {"AutoConfig": "code.Config"}}
    assert remote_code(own, ["note.txt"]) == (own, "")


def test_this_package_reads_an_export_without_its_code(folder: Path) -> None:
    assert load_config(folder).model_type == "llama"
    assert vocabulary_size(folder, ModelConfig()) == 16


def test_adapters_fit_and_can_be_merged_and_saved(folder: Path, expected: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))  # PEFT knows where by the model type
    assert wrapped.generate(input_ids=IDS).tolist() == expected
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert merged.generate(IDS).tolist() == expected


def test_a_pipeline_answers(folder: Path) -> None:
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    (row,) = pipe("1 + 2", do_sample=False, max_new_tokens=5, return_tensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = pipe.model.generate(**tokenizer("1 + 2", return_tensors="pt"), max_new_tokens=5)
    assert row["generated_token_ids"] == found[0].tolist()


def test_saving_without_the_source_is_an_error(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.config.name_or_path = str(tmp_path / "gone")
    with pytest.raises(OSError, match="gone"):
        model.save_pretrained(tmp_path / "copy")
