"""Training in hidden states: how a global batch is cut changes nothing; terms and what describes them are logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_sft.train.run import train_stage

SETTINGS = ("enabled=true", "max_steps=4", "eval_every=2", "eval_examples=8", "learning_rate=3e-3", "log_every=1")


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kava", ["kava.num_latents=4", "kava.iterations=2"]),
        ("coconut", ["coconut.init=base", "coconut.uniform_prob=0.5", "coconut.max_stage=2"]),
    ],
)
def test_accumulation_gives_the_losses_of_one_large_batch(tiny_config, tmp_path, name, options):
    """Cut into four micro-batches and with activations computed again."""
    terms = {"kava": ("ce", "teacher_ce", "hidden", "kv"), "coconut": ("ce",)}
    found = {}
    for way, batch, accumulation, checkpointing in (("whole", 8, 1, "false"), ("cut", 2, 4, "true")):
        config = tiny_config(
            f"run_dir={tmp_path / way}",
            *(f"{name}.train.{setting}" for setting in SETTINGS),
            f"{name}.train.micro_batch_size={batch}",
            f"{name}.train.gradient_accumulation_steps={accumulation}",
            f"{name}.train.gradient_checkpointing={checkpointing}",
            *options,
        )
        found[way] = train_stage(config, name).directory
    tags = ["train/loss", "train/grad_norm", *(f"train/loss_{term}" for term in terms[name])]
    tags += ["train/kv_short", "train/kv_kept", "train/kv_cosine"] if name == "kava" else []
    for tag in tags:
        whole, cut = logged(found["whole"], tag), logged(found["cut"], tag)
        assert len(whole) == 4, tag
        assert cut == pytest.approx(whole, rel=2e-4, abs=1e-6), tag
    assert bool(logged(found["whole"], "train/loss_kv")) == (name == "kava")


def test_thoughts_are_trained_in_float32_beside_a_model_in_16_bit(tiny_config, tmp_path):
    """At the published learning rate, whose steps are below what bfloat16 tells apart from a scale of 1."""
    config = tiny_config("model.dtype=bfloat16", "model.lora.rank=2", "codi.train.learning_rate=8e-4")
    train_stage(config, "codi")
    thoughts = load_file(tmp_path / "run" / "codi" / "final" / "thoughts.safetensors")
    assert {value.dtype for value in thoughts.values()} == {torch.float32}
    assert (thoughts["projection.4.weight"] != 1).all()
