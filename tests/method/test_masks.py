"""Masks against literal matrices and against the loops of `reference.py`."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_sft.method.layout import Kind, decoder_row, encoder_row
from latent_sft.method.masks import induction_mask, supervision_mask, to_additive

# r = 2; P = 5 tokens; CoT a b c d e; </think> = 3 tokens; answer A EOS: the worked example of the description
ORACLE = reference.Example(prompt=[1, 2, 3, 4, 5], cot=[11, 12, 13, 14, 15], end_think=[21, 22, 23], answer=[31, 32])

# fmt: off
SUPERVISION = [
    # P  P  P  P  P  Z1 c  d  Z2 e  Z3 </ th >  A  EOS
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # Z1
    [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # c
    [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],  # d
    [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],  # Z2
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0],  # e
    [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0],  # Z3
    [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0],  # </
    [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0],  # think
    [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0],  # >
    [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0],  # A
    [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1],  # EOS
]
INDUCTION = [
    # P  P  P  P  P  a  b  m1 c  d  m2 e  m3 </ th >
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # P
    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # a
    [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # b
    [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],  # m1
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0],  # c
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0],  # d
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0],  # m2
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0],  # e
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0],  # m3
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 0, 0],  # </
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0],  # think
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1],  # >
]
# fmt: on


def stack(rows: list[list[int]], fill: int, extra: int = 0) -> Tensor:
    """Right-pad lists to one tensor, `extra` columns longer than the longest."""
    length = max(len(row) for row in rows) + extra
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[reference.Example], int, int]:
    """Ragged examples, a rate and some padding beyond the longest."""
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
    found = [
        reference.Example(prompt=[1] * p, cot=[2] * n, end_think=[3] * end, answer=[4] * answer)
        for p, n, end, answer in draw(st.lists(sizes, min_size=1, max_size=3))
    ]
    return found, draw(st.integers(1, 4)), draw(st.integers(0, 3))


def decoder_inputs(batch: list[reference.Example], rate: int, extra: int) -> tuple[Tensor, Tensor]:
    rows = [decoder_row(x.prompt, reference.chunks(x.cot, rate), x.end_think, x.answer, "token") for x in batch]
    return stack([row.kind for row in rows], Kind.PAD, extra), stack([row.branch for row in rows], -1, extra)


def test_worked_example_supervision_mask() -> None:
    kind, branch = decoder_inputs([ORACLE], 2, 0)
    assert supervision_mask(kind, branch)[0, 0].int().tolist() == SUPERVISION


def test_worked_example_induction_mask() -> None:
    row = encoder_row(ORACLE.prompt, reference.chunks(ORACLE.cot, 2), ORACLE.end_think, True)
    assert induction_mask(torch.tensor([row.kind]))[0, 0].int().tolist() == INDUCTION


def test_reference_agrees_with_the_worked_example() -> None:
    pieces = reference.chunks(ORACLE.cot, 2)
    decoder = reference.decoder_slots(ORACLE, pieces)
    encoder = reference.encoder_slots(ORACLE, pieces, "stretched")
    assert reference.dense_mask(decoder, reference.supervision_visible) == SUPERVISION
    assert reference.dense_mask(encoder, reference.induction_visible) == INDUCTION


@settings(deadline=None, max_examples=40)
@given(batches())
def test_supervision_mask_equals_the_reference(drawn: tuple) -> None:
    batch, rate, extra = drawn
    kind, branch = decoder_inputs(batch, rate, extra)
    slots = [reference.decoder_slots(x, reference.chunks(x.cot, rate)) for x in batch]
    expected = reference.padded_masks(slots, kind.shape[1], reference.supervision_visible)
    assert supervision_mask(kind, branch)[:, 0].tolist() == expected


@settings(deadline=None, max_examples=40)
@given(batches())
def test_induction_mask_equals_the_reference(drawn: tuple) -> None:
    batch, rate, extra = drawn
    pieces = [reference.chunks(x.cot, rate) for x in batch]
    rows = [encoder_row(x.prompt, p, x.end_think, False) for x, p in zip(batch, pieces, strict=True)]
    kind = stack([row.kind for row in rows], Kind.PAD, extra)
    slots = [reference.encoder_slots(x, p, "transparent") for x, p in zip(batch, pieces, strict=True)]
    expected = reference.padded_masks(slots, kind.shape[1], reference.induction_visible)
    assert induction_mask(kind)[:, 0].tolist() == expected


@settings(deadline=None, max_examples=40)
@given(batches())
def test_chunks_see_only_their_latent_and_nobody_sees_chunks(drawn: tuple) -> None:
    """The claim of the supervision mask: a chunk is decoded from its latent alone, the answer from no written CoT."""
    batch, rate, extra = drawn
    kind, branch = decoder_inputs(batch, rate, extra)
    keep = supervision_mask(kind, branch)[:, 0]
    for row in range(len(batch)):
        chunk = kind[row] == Kind.CHUNK
        other = branch[row][:, None] != branch[row][None, :]
        assert not (keep[row] & chunk[:, None] & other).any()
        assert not (keep[row] & ~chunk[:, None] & chunk[None, :]).any()


@settings(deadline=None, max_examples=40)
@given(batches())
def test_padding_is_never_seen_and_no_row_is_empty(drawn: tuple) -> None:
    batch, rate, extra = drawn
    kind, branch = decoder_inputs(batch, rate, extra + 1)
    text_kind = torch.where(kind == Kind.PAD, kind, torch.full_like(kind, Kind.TEXT))
    diagonal = torch.eye(kind.shape[1], dtype=torch.bool)
    for keep in (supervision_mask(kind, branch), induction_mask(text_kind)):
        assert keep.shape == (len(batch), 1, kind.shape[1], kind.shape[1]) and keep.dtype == torch.bool
        assert keep.any(-1).all()
        padded = (kind == Kind.PAD)[:, None, None, :]
        assert not (keep & padded & ~diagonal).any()


@settings(deadline=None, max_examples=20)
@given(batches())
def test_more_padding_changes_nothing_for_real_positions(drawn: tuple) -> None:
    batch, rate, extra = drawn
    short = supervision_mask(*decoder_inputs(batch, rate, 0))
    long = supervision_mask(*decoder_inputs(batch, rate, extra + 1))
    assert torch.equal(long[..., : short.shape[-2], : short.shape[-1]], short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_form_is_zero_where_visible_and_finite_elsewhere(dtype: torch.dtype) -> None:
    keep = torch.tensor([[True, False], [True, True]])
    additive = to_additive(keep, dtype)
    assert additive.dtype == dtype
    assert additive.tolist() == [[0.0, torch.finfo(dtype).min], [0.0, 0.0]]
    assert torch.isfinite(additive).all()
