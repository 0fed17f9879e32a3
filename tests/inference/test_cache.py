"""The cache of slots: what is written where, what a layer is given back, moves, and the masks beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from latent_sft.errors import ConfigError
from latent_sft.inference.cache import Reading, SlotCache, Windows, prompt_mask, repacked

CPU = torch.device("cpu")


def states(slots: int, width: int, start: float) -> Tensor:
    """[slots, 1, width, 2]: start, start + 1, ... along the columns; slot n adds 100 n."""
    columns = start + torch.arange(width) + 100.0 * torch.arange(slots)[:, None]
    return columns[:, None, :, None].expand(slots, 1, width, 2).clone()


def prompts_and_steps(static: bool) -> tuple[SlotCache, list[tuple[Tensor, Tensor]]]:
    """Prompts of 3 columns in slots 2 and 0 of 3, then two steps of all slots."""
    cache = SlotCache(3, 8, static, CPU)
    cache.move_to(4)
    cache.reading = Reading(torch.tensor([2, 0]), 1, 1)
    given = [cache.update(states(2, 3, 1.0), -states(2, 3, 1.0), 0)]
    cache.reading = None
    for step in range(2):
        given.append(cache.update(states(3, 1, 10.0 + step), -states(3, 1, 10.0 + step), 0))
        cache.move_to(cache.column + 1)
    return cache, given


@pytest.mark.parametrize("static", [False, True])
def test_prompts_go_left_of_the_column_and_steps_to_it(static: bool) -> None:
    cache, given = prompts_and_steps(static)
    assert torch.equal(given[0][0], states(2, 3, 1.0))  # a prompt sees itself only
    assert [keys.shape[2] for keys, _ in given[1:]] == ([8, 8] if static else [5, 6])
    expected = [
        [0, 101, 102, 103, 10, 11, 0, 0],  # the second of the two prompts
        [0, 0, 0, 0, 110, 111, 0, 0],
        [0, 1, 2, 3, 210, 211, 0, 0],
    ]
    assert cache.keys[0][:, 0, :, 1].tolist() == expected
    assert torch.equal(cache.values[0], -cache.keys[0])
    assert cache.get_seq_length() == 6 and cache.column_index.tolist() == [6]


@pytest.mark.parametrize("static", [False, True])
def test_latents_are_read_over_those_of_the_pass_before(static: bool) -> None:
    """A prompt in columns 1 and 2 of slots 2 and 0, two latents in 3 and 4, twice; the second pass sees the first's
    columns no more."""
    cache = SlotCache(3, 8, static, CPU)
    slots = torch.tensor([2, 0])
    cache.reading = Reading(slots, 1, 1)
    cache.update(states(2, 4, 1.0), -states(2, 4, 1.0), 0)
    for first in (20.0, 30.0):
        cache.reading = Reading(slots, 1, 3)
        keys, values = cache.update(states(2, 2, first), -states(2, 2, first), 0)
        assert keys[:, 0, :, 0].tolist() == [[1, 2, first, first + 1], [101, 102, first + 100, first + 101]]
        assert torch.equal(values, -keys)
    expected = [[0, 101, 102, 130, 131, 0, 0, 0], [0] * 8, [0, 1, 2, 30, 31, 0, 0, 0]]
    assert cache.keys[0][:, 0, :, 1].tolist() == expected


@pytest.mark.parametrize("capacity", [8, 12])
def test_repacking_moves_left_in_place_or_into_a_larger_buffer(capacity: int) -> None:
    cache, _ = prompts_and_steps(static=False)
    before, memory = cache.keys[0].clone(), cache.keys[0].data_ptr()
    cache.repack(None, 1, capacity)
    assert (cache.column, cache.capacity, cache.keys[0].shape[2]) == (5, capacity, capacity)
    assert torch.equal(cache.keys[0][:, :, :5], before[:, :, 1:6])
    assert (cache.keys[0].data_ptr() == memory) == (capacity == 8)


def test_repacking_drops_slots() -> None:
    cache, _ = prompts_and_steps(static=False)
    bytes_before = cache.num_bytes()
    cache.repack(torch.tensor([2]), 4, 8)
    assert cache.keys[0][:, 0, :3, 0].tolist() == [[210, 211, 0]]
    assert cache.slots == 1 and cache.num_bytes() * 3 == bytes_before


def test_repacked_along_any_dimension() -> None:
    buffer = torch.arange(10).view(2, 5)
    assert repacked(buffer, 1, torch.tensor([1]), 1, 4, 6).tolist() == [[6, 7, 8, 0, 0, 0]]
    assert repacked(buffer, 1, None, 1, 4, 5)[:, :3].tolist() == [[1, 2, 3], [6, 7, 8]]


def test_prompt_mask_is_causal_over_what_is_real() -> None:
    """A prompt of two tokens in three columns: the padding sees itself only, and nobody sees it."""
    mask = prompt_mask(torch.tensor([[False, True, True]]), torch.float32)
    assert (mask[0, 0] == 0).tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    assert mask.shape == (1, 1, 3, 3) and mask.min() == torch.finfo(torch.float32).min


def model(**config: object) -> SimpleNamespace:
    settings = SimpleNamespace(**config)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: settings))


def test_windows_hide_what_is_as_far_as_their_size() -> None:
    mask, distance = torch.zeros(1, 1, 1, 4), torch.tensor([[3, 2, 1, 0]])
    sliding = Windows(model(sliding_window=2), 10).masks(mask, distance)
    assert (sliding[0, 0, 0] == 0).tolist() == [False, False, True, True]
    both = Windows(model(sliding_window=2, layer_types=["sliding_attention", "full_attention"]), 10)
    found = both.masks(mask, distance)
    assert torch.equal(found["full_attention"], mask) and torch.equal(found["sliding_attention"], sliding)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 10},
        {"sliding_window": 4, "layer_types": ["full_attention"]},
    ],
)
def test_windows_that_nothing_exceeds_need_no_mask(config: dict) -> None:
    mask = torch.zeros(1, 1, 1, 4)
    assert Windows(model(**config), 10).masks(mask, torch.tensor([[9, 2, 1, 0]])) is mask


def test_chunked_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="has chunked attention layers, which decoding does not know; expected"):
        Windows(model(attention_chunk_size=8), 10)
