"""Shared by all tests: one thread, no network, a fixed hypothesis profile, and a tiny experiment."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hub_stand_in import TOKEN, Hub, serving
from huggingface_hub import constants
from hypothesis import settings

from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config
from latent_sft.methods import SECTIONS

torch.set_num_threads(1)
settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("project")

# the sections of an experiment with both baselines and the whole method
NAMED = ["no_cot={}", "cot={}", "stage1={}", "stage2={}"]

# a model of 16 dimensions on 120 problems: seconds per stage, enough to run every line
TINY = [
    "data.synthetic.num_train=120",
    "data.synthetic.num_validation=16",
    "data.synthetic.num_test=12",
    "model.tiny.hidden_size=16",
    "model.tiny.intermediate_size=32",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=2",
    "latent.top_k=5",
    "latent.max_latents=16",
    "latent.max_answer_tokens=4",
    "labels.shard_size=50",
    "eval.max_cot_tokens=40",
    "coconut.init=base",
    "coconut.max_stage=2",
    "coconut.stage_share=0.25",
    "lotus.init=base",
    "lotus.num_blocks=2",
    "lotus.latents_per_block=3",
    "lotus.iterations=2",
    "lotus.stage_share=0.25",
    *(f"{method}.{setting}" for method in ("pccot", "kava") for setting in ("num_latents=6", "iterations=2")),
    *("codi.num_latents=3", "codi.iterations=3"),
    # the others train where a test asks for them
    *(
        f"{stage}.enabled={stage.startswith('stage') or stage in ('no_cot', 'cot')}".lower()
        for stage in SECTIONS.values()
    ),
    *(
        f"{stage}.{setting}"
        for stage in SECTIONS.values()
        for setting in (
            "max_steps=4",
            "eval_every=2",
            "eval_examples=8",
            "micro_batch_size=8",
            "learning_rate=3e-3",
            "log_every=1",
        )
    ),
]


@pytest.fixture
def tiny_config(tmp_path):
    """Return a function: overrides -> Config of the tiny experiment in a fresh run directory."""

    def make(*overrides: str) -> Config:
        return load_config(None, [*TINY, f"run_dir={tmp_path / 'run'}", *overrides])

    return make


@pytest.fixture
def hub():
    """A local stand-in for the Hub."""
    with serving() as state:
        yield state


@pytest.fixture
def client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process at the stand-in; huggingface_hub read its environment when it was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet is a protocol and a server of its own
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
