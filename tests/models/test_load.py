"""Models built from sizes: every size is what the model has, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from latent_sft.config.schema import PromptConfig, TinyModelConfig
from latent_sft.errors import ConfigError
from latent_sft.experiment.workspace import Workspace
from latent_sft.models.load import build_tiny, weights_fingerprint
from latent_sft.models.tiny_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["one two three"], TinyModelConfig(), PromptConfig())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "opt"])
def test_a_model_from_scratch_has_its_sizes_and_no_dropout(model_type, tokenizer):
    sizes = TinyModelConfig(
        model_type=model_type, hidden_size=16, intermediate_size=40, num_layers=1, num_heads=2, num_kv_heads=2
    )
    model = build_tiny(sizes, tokenizer, seed=0)
    shapes = {size for name, p in model.named_parameters() if "layers" in name or ".h." in name for size in p.shape}
    assert 40 in shapes, f"no matrix of width 40 among {sorted(shapes)}"
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} <= {0.0}
    assert {v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float)} <= {0.0}


@pytest.mark.parametrize(
    ("model_type", "num_kv_heads", "key"),
    [("gpt2", 2, "num_kv_heads"), ("gpt_neox", 2, "num_kv_heads"), ("bloom", 4, "intermediate_size")],
)
def test_a_size_that_the_model_type_does_not_have_is_refused_by_name(model_type, num_kv_heads, key, tokenizer):
    sizes = TinyModelConfig(model_type=model_type, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=num_kv_heads)
    with pytest.raises(ConfigError, match=rf"model.tiny.{key}: .*{model_type}"):
        build_tiny(sizes, tokenizer, seed=0)


def test_a_base_folder_is_known_by_its_weights_and_not_by_its_place(tiny_config, tmp_path):
    base = Path(Workspace(tiny_config()).base)

    def fingerprint_of(folder: Path) -> str:
        return (
            Workspace(tiny_config(f"run_dir={tmp_path / 'run'}", f"model.name_or_path={folder}"))
            .step("cot")
            .fingerprint
        )

    here, there = (shutil.copytree(base, tmp_path / name) for name in ("here", "there"))
    before = fingerprint_of(here)
    assert fingerprint_of(there) == before
    (there / "README.md").write_text("weights of a friend")
    assert fingerprint_of(there) == before
    weights = load_file(there / "model.safetensors")
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(there) != before
    assert fingerprint_of(here) == before


def test_a_large_folder_is_read_once(tiny_config, tmp_path, monkeypatch):
    base, remember = Path(Workspace(tiny_config()).base), tmp_path / "weights.json"
    first = weights_fingerprint(base, remember)
    monkeypatch.setattr("latent_sft.models.load.file_sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert weights_fingerprint(base, remember) == first
