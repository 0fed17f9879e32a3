"""Batches of the methods that think in hidden states: laid out by hand, and what cannot be laid out."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from latent_sft.errors import DataError
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.methods.coconut import CoconutConfig, coconut_batch, coconut_lengths, num_latents
from latent_sft.methods.self_distill import KvDistillConfig, distill_batch, distill_lengths

SPEC = LatentSpec(think_ids=(4,), end_think_ids=(5, 6), eos_id=1, pad_id=0, vocab_size=40, top_k=4)
THINKS = ThoughtSpec(num_latents=3, iterations=2)
ROWS = [
    {"id": "a", "hash": "1", "prompt": [9, 8, 4], "cot": [11, 12, 13], "step_lengths": [2, 1], "answer": [20, 1]},
    {"id": "b", "hash": "2", "prompt": [9, 4], "cot": [14], "step_lengths": [1], "answer": [21, 22, 1]},
]


def counts_of(batch: dict[str, Tensor]) -> list[float]:
    return [batch[f"count_{name}"].item() for name in ("ce", "teacher_ce", "hidden", "kv")]


OPTIONS = {"loss_reduction": "token", "drop_last_step": True}


def test_distill_batch_by_hand():
    """Row a: P = 9 8 4, C' = 11 12. Row b: its only step is dropped. Targets of the student are the answers."""
    batch = distill_batch(ROWS, SPEC, THINKS, **OPTIONS)
    assert batch["prompt_ids"].tolist() == [[9, 8, 4], [9, 4, 0]]
    assert batch["tail_ids"].tolist() == [[5, 6, 20, 1, 0], [5, 6, 21, 22, 1]]
    assert batch["teacher_ids"].tolist() == [[11, 12, 5, 6, 20, 1], [5, 6, 21, 22, 1, 0]]
    assert [batch[f"{n}_length"].tolist() for n in ("prompt", "tail", "teacher", "trace", "answer")] == [
        [3, 2],
        [4, 5],
        [6, 5],
        [2, 0],
        [2, 3],
    ]
    # 6 columns a row: the state before the tail, then its 5 tokens; 6 stands in column 2
    assert batch["target_index"].tolist() == [2, 3, 8, 9, 10]
    assert batch["targets"].tolist() == [20, 1, 21, 22, 1]
    assert batch["teacher_target_index"].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert batch["teacher_targets"].tolist() == [11, 12, 5, 6, 20, 1, 5, 6, 21, 22, 1]
    assert counts_of(batch) == [5, 11, 2, 1]
    assert (batch["kind"] > 0).sum(1).tolist() == [3 + 3 + 4 + 6, 2 + 3 + 5 + 5]
    assert batch["kind"].shape == (2, 3 + 3 + 5 + 6)


def test_what_counts_for_keys_and_values():
    def count(**changes) -> Tensor:
        return distill_batch(ROWS, SPEC, THINKS, **OPTIONS, kv=KvDistillConfig(**changes))["count_kv"]

    assert count(span="delimiter") == 2
    assert count(short="zero") == 2
    assert distill_batch(ROWS, SPEC, THINKS, loss_reduction="token", drop_last_step=False)["count_kv"] == 2


def test_weights_of_a_sample_sum_to_one():
    batch = distill_batch(ROWS, SPEC, THINKS, loss_reduction="sample", drop_last_step=True)
    assert batch["target_weights"].tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)
    assert batch["teacher_target_weights"].tolist() == pytest.approx([1 / 6] * 6 + [1 / 5] * 5)
    assert counts_of(batch) == [2, 2, 2, 1]


def test_seeds_are_those_of_the_rows():
    seeds = distill_batch(ROWS, SPEC, THINKS, **OPTIONS)["row_seed"]
    assert seeds[0] != seeds[1]
    assert distill_batch(ROWS[1:], SPEC, THINKS, **OPTIONS)["row_seed"].tolist() == seeds[1:].tolist()


def test_coconut_batch_by_hand():
    """c = 2. Stage 1: row a keeps its second step, row b has none left; both have two latents."""
    config = CoconutConfig(latents_per_step=2, max_stage=2)
    batch = coconut_batch([{**r, "phase": 1} for r in ROWS], SPEC, config, loss_reduction="token")
    assert batch["tail_ids"].tolist() == [[13, 5, 6, 20, 1], [5, 6, 21, 22, 1]]
    assert batch["thought_mask"].tolist() == [[True, True]] * 2
    assert batch["target_index"].tolist() == [*range(5), *range(6, 11)]
    assert batch["targets"].tolist() == [13, 5, 6, 20, 1, 5, 6, 21, 22, 1]
    assert batch["count_ce"].item() == 10
    last = coconut_batch([{**r, "phase": 3} for r in ROWS], SPEC, config, loss_reduction="token")
    assert last["tail_ids"].tolist() == [[5, 6, 20, 1, 0], [5, 6, 21, 22, 1]]
    assert last["thought_mask"].all() and last["thought_mask"].shape == (2, 4)


def test_passes_are_those_of_the_stage_or_of_all_where_stages_mix():
    mixed = [{**ROWS[0], "phase": 0}, {**ROWS[1], "phase": 1}]
    for chance, passes in ((0.0, 2), (0.5, 6)):
        config = CoconutConfig(latents_per_step=2, max_stage=3, uniform_prob=chance)
        mask = coconut_batch(mixed, SPEC, config, loss_reduction="token")["thought_mask"]
        assert mask.shape == (2, passes) and mask.sum(1).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("steps", "stage", "pads", "expected"), [(3, 2, True, 4), (1, 2, True, 4), (1, 2, False, 2), (5, 9, False, 6)]
)
def test_number_of_latents(steps, stage, pads, expected):
    assert num_latents(steps, stage, CoconutConfig(latents_per_step=2, max_stage=3, pad_latents=pads)) == expected


def test_a_row_that_does_not_say_where_steps_end_is_named():
    rows = [{**ROWS[0], "step_lengths": [], "phase": 1}]
    with pytest.raises(DataError, match="row a: its steps are not parts of its CoT"):
        distill_batch(rows, SPEC, THINKS, **OPTIONS)
    with pytest.raises(DataError, match="row a"):
        coconut_batch(rows, SPEC, CoconutConfig(), loss_reduction="token")
    # not needed where all of the CoT is kept
    assert distill_batch(rows, SPEC, THINKS, loss_reduction="token", drop_last_step=False)["trace_length"].tolist() == [
        3
    ]
    rows[0]["phase"] = 0
    assert coconut_batch(rows, SPEC, CoconutConfig(), loss_reduction="token")["tail_ids"].shape == (1, 7)


def test_lengths_bound_the_columns_of_every_batch():
    data = Dataset.from_list(ROWS)
    for spec, passes in (
        (THINKS, 3),
        (ThoughtSpec(num_latents=3, iterations=3), 1),
        (ThoughtSpec(num_latents=3, iterations=0), 1),
    ):
        lengths = distill_lengths(data, SPEC, spec)
        width = int(lengths.width(lengths.parts.amax(0)))
        batch = distill_batch(ROWS, SPEC, spec, loss_reduction="token", drop_last_step=False)
        assert width == batch["kind"].shape[1] + 3 * (passes - 1)
    config = CoconutConfig(max_stage=2)
    lengths = coconut_lengths(data, SPEC, config)
    full = coconut_batch([{**r, "phase": 0} for r in ROWS], SPEC, config, loss_reduction="token")["kind"].shape[1]
    assert int(lengths.width(lengths.parts.amax(0))) == full + config.num_latents
    assert torch.equal(lengths.parts[0], torch.tensor([3, 3 + 2 + 2]))
