"""Pieces of attention against one softmax over the dense mask: outputs and gradients, for drawn layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_sft.data.collate import stage1_batch
from latent_sft.method import attention
from latent_sft.method.attention import induction_tracks, softcapped, supervision_tracks, tracked_attention
from latent_sft.method.masks import induction_mask, supervision_mask
from latent_sft.method.types import LatentSpec

SPEC = LatentSpec(think_ids=(2,), end_think_ids=(3, 4), eos_id=1, pad_id=0, vocab_size=40, top_k=4)


def row(number: int, prompt: int, lengths: list[int], answer: int) -> dict:
    return {
        "id": str(number),
        "hash": "",
        "prompt": [5] * prompt,
        "cot": [6] * sum(lengths),
        "segment_lengths": lengths,
        "answer": [7] * answer,
    }


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Ragged prompts, segments and answers; one latent, or none of the chunks, happen."""
    lengths = st.lists(st.integers(1, 5), min_size=1, max_size=6)
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), lengths, st.integers(0, 3)), min_size=1, max_size=3))
    return stage1_batch([row(i, *size) for i, size in enumerate(sizes)], SPEC, loss_reduction="token")


def states(batch: int, length: int, heads: int, groups: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, 8), (batch, heads // groups, length, 8), (batch, heads // groups, length, 4)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def by_softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, softcap: float | None) -> Tensor:
    """All pairs, then a softmax over those that may see each other."""
    groups = q.shape[1] // k.shape[1]
    of_head = torch.arange(q.shape[1]) // groups
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k[:, of_head]) / q.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * keep
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), v[:, of_head])


def assert_equal(inputs: list[Tensor], tracks: attention.Tracks, keep: Tensor, softcap: float | None) -> None:
    upstream = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1], dtype=torch.float64)
    found = tracked_attention(*inputs, tracks, softcap=softcap)
    expected = by_softmax(*inputs, keep, softcap)
    assert torch.allclose(found, expected, atol=1e-6 if softcap else 1e-12)  # soft-capping runs its softmax in float32
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 if softcap else 1e-11)


@settings(deadline=None, max_examples=25)
@given(batches(), st.sampled_from([(4, 1), (4, 2), (4, 4)]), st.sampled_from([None, 2.0]), st.integers(0, 99))
def test_supervision_pieces_equal_the_mask(
    batch: dict, heads: tuple[int, int], softcap: float | None, seed: int
) -> None:
    inputs = states(*batch["ids"].shape, *heads, seed)
    keep = supervision_mask(batch["kind"], batch["branch"], batch["time"])
    found = tracked_attention(*inputs, supervision_tracks(batch["anchor"]), softcap=softcap)
    expected = by_softmax(*inputs, keep, softcap)
    real = batch["kind"] > 0  # padding is never read; its own rows differ
    upstream = torch.randn_like(found) * real[:, None, :, None]
    assert torch.allclose(*[x.transpose(1, 2)[real] for x in (found, expected)], atol=1e-6 if softcap else 1e-12)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 if softcap else 1e-11)


@settings(deadline=None, max_examples=25)
@given(batches(), st.sampled_from([(4, 1), (4, 2), (4, 4)]), st.sampled_from([None, 2.0]), st.integers(0, 99))
def test_induction_pieces_equal_the_mask(batch: dict, heads: tuple[int, int], softcap: float | None, seed: int) -> None:
    kind, anchor = batch["encoder_kind"], batch["encoder_anchor"]
    inputs = states(*kind.shape, *heads, seed)
    tracks = induction_tracks(anchor, kind.shape[1] - anchor.shape[1], torch.float64)
    keep = induction_mask(kind, batch["encoder_time"])
    real = kind > 0
    found = tracked_attention(*inputs, tracks, softcap=softcap)
    expected = by_softmax(*inputs, keep, softcap)
    upstream = torch.randn_like(found) * real[:, None, :, None]
    assert torch.allclose(*[x.transpose(1, 2)[real] for x in (found, expected)], atol=1e-6 if softcap else 1e-12)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 if softcap else 1e-11)


@pytest.mark.parametrize("lengths", [[1], [5], [2] * 40, [3, 1, 4, 1, 5, 9, 2, 6] * 3])
def test_many_blocks_of_branches_and_markers(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks much smaller than the batch, so that every seam is crossed."""
    monkeypatch.setattr(attention, "BRANCH_BLOCK", 12)
    monkeypatch.setattr(attention, "MARKER_BLOCK", 7)
    batch = stage1_batch([row(0, 3, lengths, 2)], SPEC, loss_reduction="token")
    keep = supervision_mask(batch["kind"], batch["branch"], batch["time"])
    real = batch["kind"][0] > 0
    inputs = states(*batch["ids"].shape, 2, 1, 0)
    found = tracked_attention(*inputs, supervision_tracks(batch["anchor"]))[:, :, real]
    assert torch.allclose(found, by_softmax(*inputs, keep, None)[:, :, real], atol=1e-12)
    kind, anchor = batch["encoder_kind"], batch["encoder_anchor"]
    tracks = induction_tracks(anchor, kind.shape[1] - anchor.shape[1], torch.float64)
    assert_equal(states(*kind.shape, 2, 1, 0), tracks, induction_mask(kind, batch["encoder_time"]), None)


def test_masks_are_as_small_as_the_layout_allows() -> None:
    """160 markers of 2 tokens each: two blocks, the first reads only the text that its markers see."""
    batch = stage1_batch([row(0, 10, [2] * 160, 1)], SPEC, loss_reduction="token")
    text = batch["encoder_ids"].shape[1] - 160
    assert text == 10 + 320
    first, second = induction_tracks(batch["encoder_anchor"], text, torch.float32).markers
    assert first.mask.shape == (1, 1, 128, 10 + 256 + 128) and second.mask.shape == (1, 1, 32, 10 + 320 + 32)


def test_dropout_drops_and_keeps_the_mean() -> None:
    batch = stage1_batch([row(0, 4, [2] * 8, 2)], SPEC, loss_reduction="token")
    inputs = states(*batch["ids"].shape, 2, 1, 0)
    torch.manual_seed(0)
    for softcap in (None, 3.0):
        plain = tracked_attention(*inputs, supervision_tracks(batch["anchor"]), softcap=softcap)
        draws = [
            tracked_attention(*inputs, supervision_tracks(batch["anchor"]), dropout=0.3, softcap=softcap)
            for _ in range(200)
        ]
        assert not torch.allclose(draws[0], plain)
        assert (torch.stack(draws).mean(0) - plain).abs().max() < 0.5


@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_softcapping_takes_both_kinds_of_mask(form: str) -> None:
    q, k, v = states(2, 5, 4, 2, 0)
    keep = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    mask = keep if form == "boolean" else torch.zeros(2, 1, 5, 5, dtype=q.dtype).masked_fill(~keep, -1e30)
    assert torch.allclose(softcapped(q, k, v, mask, None, 0.0, 2.0), by_softmax(q, k, v, keep, 2.0), atol=1e-6)
    assert torch.allclose(softcapped(q, k, v, None, None, 0.0, 2.0), by_softmax(q, k, v, keep, 2.0), atol=1e-6)


@pytest.mark.parametrize(("device", "heads"), [("cpu", 2), ("meta", 4)])
def test_heads_are_shared_where_a_fused_kernel_can(monkeypatch: pytest.MonkeyPatch, device: str, heads: int) -> None:
    """Beside a mask that is on a CPU only: elsewhere every query head gets a key head of its own."""
    given: list[tuple[Tensor, bool]] = []
    right = attention.scaled_dot_product_attention

    def seen(query: Tensor, key: Tensor, *others: Tensor, **options: object) -> Tensor:
        given.append((key, options.get("enable_gqa", False)))
        return right(query, key, *others, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", seen)
    query, key = torch.randn(1, 4, 3, 8, device=device), torch.randn(1, 2, 3, 8, device=device)
    for mask in (None, torch.zeros(3, 3, device=device)):
        out = attention._attend(query, key, key, mask, None, 0.0, None)
        assert out.shape == query.shape
    assert [(k.shape[1], shares) for k, shares in given] == [(2, True), (heads, heads == 2)]
