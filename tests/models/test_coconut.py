"""Coconut on a tiny Llama equals the slow definition of `reference_distill.py`, and CoT fine-tuning at stage 0."""

from __future__ import annotations

import copy

import pytest
import torch
from models.thinking import EXAMPLES, HIDDEN, SPEC, assert_same, gradients, llama, rows_of
from reference_distill import coconut

from latent_sft.method.types import ThoughtSpec
from latent_sft.methods.coconut import CoconutConfig, CoconutModel, coconut_batch
from latent_sft.methods.cot import ExplicitModel, explicit_batch
from latent_sft.models.thoughts import Thoughts


def build(config: CoconutConfig) -> CoconutModel:
    spec = ThoughtSpec(num_latents=config.num_latents, iterations=config.num_latents)
    return CoconutModel(llama(), Thoughts(spec, torch.zeros(HIDDEN, dtype=torch.float64)), SPEC)


def staged(stages: list[int]) -> list[dict]:
    return [{**row, "phase": stage} for row, stage in zip(rows_of(EXAMPLES), stages, strict=True)]


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        ([1, 1, 1, 1], {"max_stage": 2}),
        ([3, 3, 3, 3], {"max_stage": 2}),  # nothing is written any more
        ([2, 2, 2, 2], {"max_stage": 3, "pad_latents": False, "latents_per_step": 1}),
        ([4, 4, 4, 4], {"max_stage": 3, "pad_latents": False}),
        ([0, 2, 1, 3], {"max_stage": 2, "uniform_prob": 0.5}),
    ],
)
def test_loss_and_gradients_equal_the_slow_definition(stages, options):
    config = CoconutConfig(**options)
    model = build(config)
    batch = coconut_batch(staged(stages), SPEC, config, loss_reduction="token")
    loss = model(**batch).loss_sums["ce"]
    reference = build(config)
    reference.lm.set_attn_implementation("eager")
    expected = 0.0
    for example, stage in zip(EXAMPLES, stages, strict=True):
        replaced = min(stage, config.max_stage)
        if not config.pad_latents:
            replaced = min(replaced, len(example.steps))
        skipped = len(example.steps) if stage > config.max_stage else stage
        expected = expected + coconut(reference.lm, example, skipped, replaced * config.latents_per_step)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, loss), gradients(reference, expected))


@pytest.mark.parametrize("loss_reduction", ["token", "segment", "sample"])
@pytest.mark.parametrize("max_stage", [0, 2])
def test_without_latents_it_is_fine_tuning_on_the_cot(max_stage, loss_reduction):
    config = CoconutConfig(max_stage=max_stage)
    rows = staged([0] * len(EXAMPLES))
    model = build(config)
    batch = coconut_batch(rows, SPEC, config, loss_reduction=loss_reduction)
    assert batch["thought_mask"].shape == (len(rows), 0)
    plain = ExplicitModel(copy.deepcopy(model.lm))
    other = explicit_batch(rows, SPEC, with_cot=True, loss_reduction=loss_reduction)
    assert batch["count_ce"] == other["count_ce"]
    loss, expected = model(**batch).loss_sums["ce"], plain(**other).loss_sums["ce"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = {k: v for k, v in gradients(model, loss).items() if k.startswith("lm.")}
    assert_same(found, gradients(plain, expected))


def test_a_batch_is_its_rows_one_by_one():
    config = CoconutConfig(max_stage=2, uniform_prob=0.3, pad_latents=False)
    model, rows = build(config), staged([3, 0, 1, 2])
    whole = model(**coconut_batch(rows, SPEC, config, loss_reduction="sample")).loss_sums["ce"]
    single = sum(model(**coconut_batch([r], SPEC, config, loss_reduction="sample")).loss_sums["ce"] for r in rows)
    assert whole.item() == pytest.approx(single.item(), rel=1e-9)
    assert_same(gradients(model, whole), gradients(model, single), 1e-8)
