"""Coconut's curriculum: the stage of an example depends on its optimizer step alone."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from latent_sft.data.lengths import Lengths
from latent_sft.errors import ConfigError
from latent_sft.methods.coconut import CoconutConfig, ForgetMoments, numbered, stage_at
from latent_sft.train.sampler import LengthBucketSampler, Phased, TokenBatchSampler

ROWS = [{"id": str(i)} for i in range(20)]


def stages(config: CoconutConfig, total: int) -> list[int]:
    return [stage_at(step, total, config) for step in range(total)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_stage": 2, "stage_share": 0.2}, [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]),
        ({"max_stage": 2, "stage_share": 0.2, "first_stage": 0}, [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]),
        ({"max_stage": 1, "stage_share": 0.01}, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2]),  # a stage lasts a step at least
        ({"max_stage": 0}, [0] * 10),
    ],
)
def test_stages_by_hand(settings: dict, expected: list[int]) -> None:
    assert stages(CoconutConfig(**settings), 10) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("first_stage", 5), ("stage_share", 0.4), ("stage_share", 0.0), ("latents_per_step", 0), ("uniform_prob", 1.5)],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"coconut\.{key}"):
        CoconutConfig(**{key: value}).check("coconut")


@pytest.mark.parametrize("by_tokens", [False, True])
def test_examples_of_a_step_share_its_stage_in_every_epoch(by_tokens: bool) -> None:
    """Four examples (or four micro-batches of one) a step, five steps an epoch, so ten steps in two epochs."""
    config = CoconutConfig(max_stage=2, stage_share=0.2)
    if by_tokens:
        lengths = Lengths(torch.full((20, 1), 5), lambda parts: parts[..., 0])
        sampler = TokenBatchSampler(lengths, 5, 4, 0, "coconut.train")
    else:
        sampler = LengthBucketSampler([5] * 20, 4, 0)
    plain = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        plain.append([i for item in sampler for i in (item if by_tokens else [item])])
    sampler.number = numbered(20, 10, 0, config)
    rows, seen = Phased(ROWS), []
    assert len(rows) == 20
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        shown = [rows[i] for item in sampler for i in (item if by_tokens else [item])]
        assert [int(row["id"]) for row in shown] == plain[epoch]
        seen += [row["phase"] for row in shown]
    assert seen == [stage for stage in stages(config, 10) for _ in range(4)]


def test_mixing_draws_other_stages_by_seed_step_and_row() -> None:
    config = CoconutConfig(max_stage=3, uniform_prob=0.5, first_stage=4)
    number = numbered(1000, 10, 0, config)
    drawn = Counter(number(7, row) // 1000 for row in range(1000))
    assert [number(7, row) for row in range(9)] == [numbered(1000, 10, 0, config)(7, row) for row in range(9)]
    assert [number(7, row) for row in range(9)] != [number(8, row) for row in range(9)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert 440 < drawn[4] < 560  # 0.5, within four standard deviations
    assert all(80 < drawn[stage] < 175 for stage in range(4))  # 0.125 each


def test_moments_are_forgotten_where_a_stage_begins() -> None:
    config, forgotten = CoconutConfig(max_stage=2, stage_share=0.2), []
    callback = ForgetMoments(config)
    for step in range(10):
        optimizer = SimpleNamespace(state={"moments": 1})
        callback.on_step(SimpleNamespace(global_step=step, max_steps=10), optimizer)
        if not optimizer.state:
            forgotten.append(step)
    assert forgotten == [2, 4]
