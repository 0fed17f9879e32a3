"""A checkpoint as stage 2 leaves it: a small random model that stops thinking and answering at different times."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from latent_sft.config.schema import LatentConfig, PromptConfig, TinyModelConfig
from latent_sft.data.prompts import build_spec
from latent_sft.method.types import SPEC_FILE, LatentSpec, ThoughtSpec
from latent_sft.models.load import build_tiny, save_lm
from latent_sft.models.thoughts import Thoughts, save_thoughts
from latent_sft.models.tiny_tokenizer import build_tokenizer

PROBLEMS = ("1", "2 + 3", "9", "1 + 2 + 3 + 4 + 5", "7 + 7", "8 + 1 + 0", "5 + 5", "0", "4 + 4 + 4", "6 + 1")


@pytest.fixture(scope="session")
def problems() -> list[str]:
    return list(PROBLEMS)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["0 1 2 3 4 5 6 7 8 9 +"], TinyModelConfig(), PromptConfig())


@pytest.fixture(scope="session")
def spec(tokenizer: PreTrainedTokenizerBase) -> LatentSpec:
    latent = LatentConfig(top_k=4, max_latents=6, max_answer_tokens=7, noise_scale=1.0)
    return build_spec(tokenizer, PromptConfig(system="1 +"), latent, len(tokenizer))


@pytest.fixture(scope="session")
def checkpoint(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like `<run>/stage2/final`; tests must not change it."""
    tiny = TinyModelConfig(
        hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, tie_embeddings=False
    )
    model = build_tiny(tiny, tokenizer, seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # far from the small initial values, so that the next token depends on the input
                parameter.normal_(0, 0.7, generator=generator)
    folder = tmp_path_factory.mktemp("stage2") / "final"
    save_lm(model, folder, tokenizer)
    (folder / SPEC_FILE).write_text(json.dumps(spec.to_dict()))
    (folder / "thinker.json").write_text('{"thinker": "latent"}')
    (folder / "training_args.bin").write_bytes(b"left behind")
    return folder


THOUGHTS = {
    "codi": ThoughtSpec(num_latents=3, iterations=3, projection=True),
    "kava": ThoughtSpec(num_latents=5, iterations=2, projection=True),
    "coconut": ThoughtSpec(num_latents=4, iterations=4),
    "pauses": ThoughtSpec(num_latents=3, iterations=0),
}


@pytest.fixture(scope="session")
def thinking(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders like `<run>/kava/final`, of the same model as `checkpoint`; tests must not change them."""
    folders = {}
    for name, spec in THOUGHTS.items():
        folder = folders[name] = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp(name) / "final"))
        torch.manual_seed(4)
        thoughts = Thoughts(spec, torch.randn(16), inner=24)
        with torch.no_grad():
            for parameter in thoughts.projection.parameters():
                parameter.normal_(0, 0.7)
        save_thoughts(thoughts, folder)
        how = {"thinker": "continuous", "thoughts": dataclasses.asdict(spec)}
        (folder / "thinker.json").write_text(json.dumps(how))
    return folders
