"""Token batches: within the budget, every example once, the same steps however they are shared out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from latent_sft.data.collate import stage1_batch, stage1_lengths, stage2_batch, stage2_lengths
from latent_sft.data.lengths import Lengths
from latent_sft.errors import ConfigError
from latent_sft.experiment.workspace import Workspace
from latent_sft.method.types import Superposition
from latent_sft.methods.cot import explicit_batch, explicit_lengths
from latent_sft.train.sampler import LengthBucketSampler, TokenBatchSampler, shared_out


def one_part(lengths: list[int]) -> Lengths:
    return Lengths(torch.tensor(lengths)[:, None], lambda parts: parts[..., 0])


def product(parts: list[tuple[int, int, int]]) -> Lengths:
    """As in stage 1: a main track, and chunks times the longest chunk."""
    return Lengths(torch.tensor(parts), lambda p: p[..., 0] + p[..., 1] * p[..., 2])


@given(
    parts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6), st.integers(0, 5)), min_size=4, max_size=80),
    slack=st.integers(0, 200),
    per_step=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_batch_keeps_the_budget_and_every_example_comes_once(parts, slack, per_step, seed):
    budget = max(main + chunks * width for main, chunks, width in parts) + slack
    sampler = TokenBatchSampler(product(parts), budget, per_step, seed, "cot")
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert len(batches) % per_step == 0 and len(batches) > 0
        for batch in batches:
            main, chunks, width = (max(parts[i][part] for i in batch) for part in range(3))
            assert len(batch) * (main + chunks * width) <= budget
        seen = sorted(i for batch in batches for i in batch)
        assert len(set(seen)) == len(seen)
        if len(seen) < len(parts):  # allowed only where there is nothing to divide
            assert all(len(batch) == 1 for batch in batches)
            assert len(parts) - len(seen) < per_step
        assert batches == list(TokenBatchSampler(product(parts), budget, per_step, seed, "cot")._batches(epoch))


def test_batches_by_hand():
    """Budget 12 over 4 x 3 tokens and 3 x 5: one batch of four, one of two, one of one (two slices would not pay)."""
    sampler = TokenBatchSampler(one_part([3, 5, 3, 5, 3, 5, 3]), 12, 1, 0, "cot")
    # one slice: every length counts as 5, so two examples a batch
    assert sampler.sizes == [2, 2, 2, 1]
    # 4 batches do for steps of 2, and 6 for steps of 3: the first two batches are halved
    assert TokenBatchSampler(one_part([3, 5, 3, 5, 3, 5, 3]), 12, 2, 0, "cot").sizes == [2, 2, 2, 1]
    assert TokenBatchSampler(one_part([3, 5, 3, 5, 3, 5, 3]), 12, 3, 0, "cot").sizes == [1, 1, 1, 1, 2, 1]


def test_padding_is_small_and_partners_change():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 300, (6000,), generator=generator).tolist()
    sampler = TokenBatchSampler(one_part(lengths), 2400, 4, 0, "cot")
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    slots = sum(len(b) * max(lengths[i] for i in b) for b in epochs[0])
    assert 1 - sum(lengths) / slots < 0.05
    assert slots / len(epochs[0]) > 0.9 * 2400  # and the budget is used
    again = {frozenset(b) for b in epochs[0]} & {frozenset(b) for b in epochs[1]}
    assert len(again) < 0.01 * len(epochs[0])


def test_steps_do_not_depend_on_how_processes_and_accumulation_share_them():
    """The union over processes of what accelerate deals out is the step, for 1 x 4, 2 x 2 and 4 x 1."""
    PartialState(cpu=True)
    lengths = one_part([n % 13 + 1 for n in range(120)])
    steps = {}
    for num_processes in (1, 2, 4):
        shares = []
        for rank in range(num_processes):
            sampler = TokenBatchSampler(lengths, 40, 4, 7, "cot")
            loader = prepare_data_loader(
                DataLoader(range(120), batch_sampler=sampler, collate_fn=list),
                num_processes=num_processes,
                process_index=rank,
                even_batches=False,
                put_on_device=False,
            )
            shares.append(list(loader))
            assert len(loader) == len(shares[-1]) == len(sampler) // num_processes
        each = 4 // num_processes
        steps[num_processes] = [
            sorted(i for share in shares for batch in share[at : at + each] for i in batch)
            for at in range(0, len(shares[0]), each)
        ]
    assert steps[1] == steps[2] == steps[4]


@pytest.mark.parametrize("kind", ["tokens", "rows"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_share_out_an_epoch(kind, num_processes):
    """All of them together have what one has, in its order, and each as many micro-batches."""
    lengths = [n % 13 + 1 for n in range(120)]
    size = 5
    sampler = (
        TokenBatchSampler(one_part(lengths), 40, 2, 7, "cot")
        if kind == "tokens"
        else LengthBucketSampler(lengths, size * num_processes, 7)
    )
    sampler.set_epoch(1)
    whole = shared_out(sampler, size, 1, 0)
    parts = [shared_out(sampler, size, num_processes, process) for process in range(num_processes)]
    assert [batch for step in zip(*parts, strict=True) for batch in step] == whole
    assert sorted(i for batch in whole for i in batch) == list(range(120))


def test_processes_take_rows_again_where_they_do_not_come_out_even():
    sampler = LengthBucketSampler([5] * 18, 8, 7)
    parts = [shared_out(sampler, 4, 2, process) for process in (0, 1)]
    assert [[len(batch) for batch in part] for part in parts] == [[4, 4, 4], [4, 4, 4]]
    assert {i for part in parts for batch in part for i in batch} == set(range(18))


def test_examples_are_counted():
    lengths = one_part([n % 13 + 1 for n in range(120)])
    sampler = TokenBatchSampler(lengths, 40, 2, 7, "cot")
    steps = len(sampler) // 2
    assert sampler.examples_until(0) == 0
    assert sampler.examples_until(steps) == 120
    sampler.set_epoch(2)
    by_hand = sum(len(batch) for batch in list(sampler)[:6])
    assert sampler.examples_until(2 * steps + 3) == 240 + by_hand
    rows = LengthBucketSampler(list(range(103)), 8, 0)
    assert [rows.examples_until(s) for s in (1, 12, 13, 14)] == [8, 96, 103, 111]


def test_mistakes_name_the_key():
    with pytest.raises(ConfigError, match=r"stage2\.max_tokens: got 10, expected at least 11: as long is .*example 1 "):
        TokenBatchSampler(one_part([3, 11, 4]), 10, 1, 0, "stage2")
    with pytest.raises(
        ConfigError, match=r"cot\.gradient_accumulation_steps: a step takes 4 micro-batches.*only 3 training examples"
    ):
        TokenBatchSampler(one_part([3, 11, 4]), 20, 4, 0, "cot")


@pytest.mark.parametrize("segmentation", ["fixed", "step"])
def test_lengths_are_those_of_the_batches(tiny_config, segmentation):
    """Whichever rows meet: the width of the largest parts is the longer side of what the collate makes of them."""
    work = Workspace(tiny_config(f"latent.segmentation={segmentation}", "latent.rate=3"))
    data, spec = work.data["train"], work.spec
    rows = data.select(range(40)).to_list()
    for row in rows:
        row["id"] = str(len(row["segment_lengths"]))

    def stored(id: str, hash: str) -> Superposition:
        return Superposition(torch.zeros(int(id), spec.top_k, dtype=torch.long), torch.ones(int(id), spec.top_k))

    options = {"spec": spec, "loss_reduction": "token"}
    makers = {
        explicit_lengths(data, spec, with_cot=True): partial(explicit_batch, with_cot=True, **options),
        explicit_lengths(data, spec, with_cot=False): partial(explicit_batch, with_cot=False, **options),
        stage1_lengths(data, spec): partial(stage1_batch, **options),
        stage2_lengths(data, spec): partial(stage2_batch, label_of=stored, **options),
    }
    for lengths, batch_of in makers.items():
        assert len(lengths.parts) == len(data)
        for picked in ([0], [3, 17, 29], list(range(40)), [5, 6]):
            batch = batch_of([rows[i] for i in picked])
            sides = [batch[k].shape[1] for k in ("kind", "encoder_kind") if k in batch]
            assert int(lengths.width(lengths.parts[picked].amax(0))) == max(sides)
