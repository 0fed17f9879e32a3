"""The estimates of `latent-sft plan --gpus` against what live objects hold."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import latent_sft.train.loop as loop
from latent_sft.config.experiment import Config
from latent_sft.config.schema import LoraConfig
from latent_sft.experiment.workspace import Workspace
from latent_sft.forecast import load_of, measure, plan_setup, read_examples
from latent_sft.memory import GIB, LEVELS, Level, Numbers, Shape, Weights, activations, buffers, logits, model_states
from latent_sft.methods import STAGES
from latent_sft.models.load import add_lora
from latent_sft.train.run import train_stage

FULL = ()
LORA = ("model.lora.rank=8",)
SHARED = (*LORA, "stage1.share_backbone=true")
HALVES = ("model.dtype=bfloat16",)
ONE_PHASE = ("stage1.encoder.enabled=false", "stage1.decoder.enabled=false")
LARGER = (
    "data.synthetic.num_train=40",
    "model.tiny.hidden_size=64",
    "model.tiny.intermediate_size=192",
    "model.tiny.num_layers=4",
)


def size_of(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("cot", FULL),
        ("cot", LORA),
        ("stage1-encoder", ("model.tiny.tie_embeddings=false",)),
        ("stage1-union", (*ONE_PHASE, *LORA)),
    ],
)
def test_model_states_of_a_training_run(stage, settings, tiny_config, monkeypatch):
    """Parameters, gradients and optimizer states right before the second step."""
    config = tiny_config(*LARGER, *settings, f"{stage.replace('-', '.')}.max_steps=2")
    held = []

    original = torch.nn.utils.clip_grad_norm_

    def look(parameters, *args, **kwargs):
        parameters = list(parameters)
        states = [v for s in loops[0].optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        held.append(size_of([*parameters, *(p.grad for p in parameters if p.grad is not None), *states]))
        return original(parameters, *args, **kwargs)

    loops = []
    start = loop.TrainingLoop._start
    monkeypatch.setattr(loop.TrainingLoop, "_start", lambda self, *args: (loops.append(self), start(self, *args)))
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", look)
    train_stage(config, stage)
    examples = read_examples(config)
    weights = STAGES[stage].parameters(measure(config, examples.spec.vocab_size), plan_setup(config, stage, examples))
    assert len(held) == 2
    assert model_states(weights, Level(0), 1).gpu == pytest.approx(held[1], rel=0.01)
    assert model_states(weights, Level(0), 4).gpu == pytest.approx(held[1] + weights.trained_bytes, rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [FULL, LORA, SHARED, HALVES, (*HALVES, *LORA), ("model.tiny.tie_embeddings=false", "model.tiny.model_type=qwen2")],
)
def test_weights_are_those_the_stages_build(settings, tiny_config):
    config = tiny_config("data.synthetic.num_train=12", *settings)
    examples = read_examples(config)
    backbone = measure(config, examples.spec.vocab_size)
    for stage in ("no-cot", "stage1-encoder", "stage1-decoder", "stage1-union", "kava"):
        parameters = list(STAGES[stage].model(Workspace(only(config, stage)).setup(stage)).parameters())
        found = STAGES[stage].parameters(backbone, plan_setup(config, stage, examples))
        assert found.trained == sum(p.numel() for p in parameters if p.requires_grad), stage
        assert found.trained_bytes == sum(p.nbytes for p in parameters if p.requires_grad), stage
        assert found.frozen_bytes == sum(p.nbytes for p in parameters if not p.requires_grad), stage


def only(config: Config, stage: str) -> Config:
    """Return the experiment with one phase of stage 1, which then starts from the base model."""
    phases = {
        phase: dataclasses.replace(getattr(config.stage1, phase), enabled=stage == f"stage1-{phase}")
        for phase in ("encoder", "decoder", "union")
    }
    stage1, stage2 = dataclasses.replace(config.stage1, **phases), dataclasses.replace(config.stage2, enabled=False)
    return dataclasses.replace(config, stage1=stage1, stage2=stage2)


def test_work_of_a_stage_is_that_of_its_batches(tiny_config):
    """Tokens as `train/` counts them, and the batch of the longest rows."""
    config = tiny_config(*ONE_PHASE, "cot.micro_batch_size=120", "stage2.max_tokens=500")
    examples, work = read_examples(config), Workspace(config)
    rows = list(work.data["train"])
    load = load_of("cot", plan_setup(config, "cot", examples), examples)
    end = len(work.spec.end_think_ids)
    lengths = [len(r["prompt"]) + len(r["cot"]) + end + len(r["answer"]) for r in rows]
    assert examples.count == 120 and load.tokens == pytest.approx(sum(lengths) / 120)
    assert load.positions == max(lengths) * 120
    assert load.labels == sum(len(r["cot"]) + end + len(r["answer"]) for r in rows)
    union, decoder, stage2 = (
        load_of(stage, plan_setup(config, stage, examples), examples)
        for stage in ("stage1-union", "stage1-decoder", "stage2")
    )
    assert union.encoder_positions > 0 and decoder.encoder_positions == 0
    assert stage2.positions <= 500


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 100,
}
SHAPE = Shape(layers=3, hidden=64, query=64, key=32, inner=192, vocab=100)


@pytest.mark.parametrize(
    ("dtype", "autocast", "rank", "dropout"),
    [
        ("float32", False, 0, 0.0),
        ("bfloat16", False, 0, 0.0),
        ("float32", True, 0, 0.0),
        ("float32", False, 8, 0.0),
        ("bfloat16", False, 8, 0.0),
        ("bfloat16", False, 8, 0.1),
    ],
)
def test_activations_are_what_autograd_keeps(dtype, autocast, rank, dropout):
    estimate, kept = estimated_and_kept("llama", dtype, autocast, rank, dropout)
    assert estimate == pytest.approx(kept, rel=0.2)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_neox"])
def test_activations_of_other_families_are_near(family):
    estimate, kept = estimated_and_kept(family, "bfloat16", False, 0, 0.0)
    assert 0.5 < kept / estimate < 2


def estimated_and_kept(family: str, dtype: str, autocast: bool, rank: int, dropout: float) -> tuple[int, int]:
    sizes = SIZES if family == "gpt_neox" else SIZES | {"head_dim": 16}
    config = AutoConfig.for_model(family, **sizes, pad_token_id=0)
    lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa").train()
    model = add_lora(lm, LoraConfig(rank=rank, dropout=dropout)) if rank else lm
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    embeds = torch.randn(2, 96, 64, dtype=getattr(torch, dtype), requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        lm.get_decoder()(inputs_embeds=embeds, use_cache=False)
    item = getattr(torch, dtype).itemsize
    numbers = Numbers(item, 2 if autocast else item, 4 if rank else 0, dropout > 0)
    return activations(SHAPE, numbers, 2 * 96, checkpointing=False), size_of(kept.values())


def test_checkpointing_keeps_the_input_of_every_layer_and_one_whole_layer():
    numbers = Numbers(2, 2)
    whole, recomputed = (activations(SHAPE, numbers, 50, checkpointing=on) for on in (False, True))
    assert recomputed == whole / 3 + 3 * 50 * 64 * 2


def test_logits_by_hand():
    # 10 labels of 100 entries in float32; gradients of hidden states and of the head
    assert logits(SHAPE, Numbers(4, 4), 10, trained=True, chunk=10**9) == 4 * 1000 + 4 * 640 + 4 * 6400
    # a chunk of 400 bytes holds one row, in 16 bit a second one; the head is frozen
    assert logits(SHAPE, Numbers(2, 2), 10, trained=False, chunk=400) == 2 * 400 + 4 * 640


def test_model_states_by_hand():
    """One billion trained parameters in 16 bit on 4 GPUs, another billion frozen."""
    one = 10**9
    weights = Weights(one, 2 * one, 2 * one, 10**8, 2)
    found = {str(level): model_states(weights, level, 4).gpu / one for level in LEVELS}
    assert found == pytest.approx(
        {
            "ZeRO 0": 2 + 2 + 4 + 2 + 2,  # weights, gradients, Adam in 16 bit, buckets, frozen
            "ZeRO 1": 2 + 18 / 4 + 1.5 + 2,
            "ZeRO 2": 2 + 18 / 4 + 2,
            "ZeRO 3": 18 / 4 + 0.4 + 0.5,
            "ZeRO 1 +optimizer": 2 + 2 + 2,
            "ZeRO 2 +optimizer": 2 + 2,
            "ZeRO 3 +optimizer": 2 / 4 + 0.4 + 0.5,
            "ZeRO 3 +parameters": 0.4,
        }
    )
    # nothing on the host but where something is offloaded, and then everything once a node
    hosts = [model_states(weights, level, 16).host / GIB for level in LEVELS]
    assert hosts[:4] == [0] * 4 and min(hosts[4:]) > 0
    assert buffers(weights, Level(0), 10) == 0
    assert buffers(weights, Level(2), 10) == 60
    assert buffers(weights, Level(3), 10) == 60 + 2 * one  # as many weights as may be gathered at once


@pytest.mark.slow
def test_model_states_under_zero(tmp_path):
    """Two processes of a real ZeRO job hold what is estimated, within a quarter."""
    import two_process_states as script

    result = tmp_path / "held.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.__file__]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, str(result)], env=environment, check=True, timeout=300, capture_output=True)
    for (zero, dtype, frozen), held in zip(script.CASES, json.loads(result.read_text()), strict=True):
        with torch.device("meta"):
            model = script.build(dtype, frozen=frozen)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = Weights(
            sum(p.numel() for p in trained),
            sum(p.nbytes for p in trained),
            sum(p.nbytes for p in model.parameters() if not p.requires_grad),
            0,  # no module is gathered between forward and step
            trained[0].itemsize,
        )
        assert model_states(weights, Level(zero), 2).gpu == pytest.approx(held, rel=0.25), (zero, dtype, frozen)
