"""Layouts against the worked example of the method's description and against the loops of `reference.py`."""

from __future__ import annotations

import dataclasses
import math

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_sft.method import layout
from latent_sft.method.layout import (
    IGNORE,
    Kind,
    Row,
    decoder_row,
    encoder_row,
    explicit_row,
    fixed_segments,
    loss_count,
    split_cot,
    stage2_row,
)

NORMALISATIONS = ("token", "segment", "sample")
KINDS = {  # of the package, for every kind of the reference; the encoder and explicit rows call all text TEXT
    "prompt": Kind.TEXT,
    "latent": Kind.LATENT,
    "text": Kind.CHUNK,
    "end": Kind.TAIL,
    "answer": Kind.TAIL,
    "marker": Kind.MARKER,
}

# r = 2; P = 5 tokens ending in <think>; CoT a b c d e; </think> = 3 tokens; answer A EOS
P = [1, 2, 3, 4, 5]
a, b, c, d, e = 11, 12, 13, 14, 15
END = [21, 22, 23]
A, EOS = 31, 32
ORACLE = reference.Example(prompt=P, cot=[a, b, c, d, e], end_think=END, answer=[A, EOS])
SEGMENTS = [[a, b], [c, d], [e]]

_ = IGNORE
# fmt: off
ORACLE_IDS =      [1, 2, 3, 4, 5,  0, c, d, 0, e,  0, 21, 22, 23, A, EOS]
ORACLE_POSITION = [0, 1, 2, 3, 4,  5, 6, 7, 6, 7,  7,  8,  9, 10, 11, 12]
ORACLE_KIND =     [1, 1, 1, 1, 1,  2, 3, 3, 2, 3,  2,  4,  4,  4,  4,  4]
ORACLE_BRANCH =   [-1, -1, -1, -1, -1, 0, 0, 0, 1, 1, 2, -1, -1, -1, -1, -1]
ORACLE_TARGET =   [_, _, _, _, _,  c, d, _, e, _, 21, 22, 23,  A, EOS, _]
# fmt: on


@st.composite
def examples(draw: st.DrawFn) -> tuple[reference.Example, int]:
    """A ragged example and a rate: CoT shorter than the rate, of one token, dividing it or not."""
    tokens = st.integers(0, 40)
    rate = draw(st.integers(1, 5))
    example = reference.Example(
        prompt=draw(st.lists(tokens, min_size=1, max_size=5)),
        cot=draw(st.lists(tokens, min_size=1, max_size=13)),
        end_think=draw(st.lists(tokens, min_size=1, max_size=3)),
        answer=draw(st.lists(tokens, min_size=1, max_size=4)),
    )
    return example, rate


def decoder_row_of(example: reference.Example, rate: int, loss_reduction: str = "token") -> Row:
    pieces = split_cot(example.cot, fixed_segments(len(example.cot), rate))
    return decoder_row(example.prompt, pieces, example.end_think, example.answer, loss_reduction)


def assert_matches(row: Row, slots: list[reference.Slot], pairs: list[tuple[int, int]]) -> None:
    """Ids, positions and targets of a row equal those of reference slots."""
    assert row.ids == [slot.token or 0 for slot in slots]
    assert row.position == [slot.position for slot in slots]
    targets = dict(pairs)
    assert row.target == [slots[targets[t]].token if t in targets else IGNORE for t in range(len(slots))]


def test_worked_example_layout() -> None:
    row = decoder_row(P, SEGMENTS, END, [A, EOS], "token")
    assert row.ids == ORACLE_IDS
    assert row.position == ORACLE_POSITION
    assert row.kind == ORACLE_KIND
    assert row.branch == ORACLE_BRANCH
    assert row.target == ORACLE_TARGET


def test_worked_example_has_exactly_these_eight_ce_pairs() -> None:
    row = decoder_row(P, SEGMENTS, END, [A, EOS], "token")
    pairs = [(t, row.target[t]) for t in range(len(row.ids)) if row.target[t] != IGNORE]
    z1, at_c, z2, z3, end1, end2, end3, at_answer = 5, 6, 8, 10, 11, 12, 13, 14
    assert pairs == [
        (z1, c), (at_c, d), (z2, e), (z3, END[0]), (end1, END[1]), (end2, END[2]), (end3, A), (at_answer, EOS)
    ]  # fmt: skip


def test_reference_agrees_with_the_worked_example() -> None:
    slots = reference.decoder_slots(ORACLE, reference.chunks(ORACLE.cot, 2))
    assert [slot.position for slot in slots] == ORACLE_POSITION
    assert [slot.token or 0 for slot in slots] == ORACLE_IDS
    assert [(s, slots[t].token) for s, t in reference.ce_pairs(slots)] == [
        (t, target) for t, target in enumerate(ORACLE_TARGET) if target != IGNORE
    ]


@pytest.mark.parametrize(
    ("stretched", "position"),
    [
        (True, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]),
        # a marker shares the position of b, d, e; the text counts on as if it were not there
        (False, [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 8, 9, 9, 10, 11, 12]),
    ],
)
def test_worked_example_encoder(stretched: bool, position: list[int]) -> None:
    row = encoder_row(P, SEGMENTS, END, stretched)
    m = Kind.MARKER
    assert row.ids == [1, 2, 3, 4, 5, a, b, 0, c, d, 0, e, 0, 21, 22, 23]
    assert row.kind == [1, 1, 1, 1, 1, 1, 1, m, 1, 1, m, 1, m, 1, 1, 1]
    assert [branch for branch in row.branch if branch >= 0] == [0, 1, 2]
    assert row.position == position
    assert set(row.target) == {IGNORE}


@settings(deadline=None, max_examples=60)
@given(examples())
def test_decoder_row_equals_the_reference(drawn: tuple[reference.Example, int]) -> None:
    example, rate = drawn
    row = decoder_row_of(example, rate)
    slots = reference.decoder_slots(example, reference.chunks(example.cot, rate))
    assert_matches(row, slots, reference.ce_pairs(slots))
    assert row.kind == [KINDS[slot.kind] for slot in slots]
    # branch i (from 0) is latent i and the chunk after it
    expected = {"latent": lambda s: s.chunk - 1, "text": lambda s: s.chunk - 2}
    assert row.branch == [expected.get(slot.kind, lambda s: -1)(slot) for slot in slots]


@settings(deadline=None, max_examples=60)
@given(examples(), st.booleans())
def test_encoder_row_equals_the_reference(drawn: tuple[reference.Example, int], stretched: bool) -> None:
    example, rate = drawn
    pieces = reference.chunks(example.cot, rate)
    slots = reference.encoder_slots(example, pieces, "stretched" if stretched else "transparent")
    row = encoder_row(example.prompt, pieces, example.end_think, stretched)
    assert_matches(row, slots, [])
    assert row.kind == [Kind.MARKER if slot.kind == "marker" else Kind.TEXT for slot in slots]


@settings(deadline=None, max_examples=60)
@given(examples())
def test_stage2_row_equals_the_reference(drawn: tuple[reference.Example, int]) -> None:
    example, rate = drawn
    num_latents = len(reference.chunks(example.cot, rate))
    row = stage2_row(example.prompt, num_latents, example.end_think, example.answer, "token")
    slots = reference.latent_slots(example, num_latents)
    assert_matches(row, slots, reference.ce_pairs(slots))


@settings(deadline=None, max_examples=60)
@given(examples())
def test_stage1_and_stage2_put_latents_and_answer_at_the_same_positions(drawn: tuple[reference.Example, int]) -> None:
    example, rate = drawn
    stage1 = decoder_row_of(example, rate)
    main_track = [t for t, kind in enumerate(stage1.kind) if kind != Kind.CHUNK]
    num_latents = stage1.kind.count(Kind.LATENT)
    stage2 = stage2_row(example.prompt, num_latents, example.end_think, example.answer, "token")
    assert [stage1.position[t] for t in main_track] == stage2.position == list(range(len(stage2.ids)))
    assert [stage1.ids[t] for t in main_track] == stage2.ids


@settings(deadline=None, max_examples=60)
@given(examples())
def test_segments_partition_the_cot_and_give_one_latent_each(drawn: tuple[reference.Example, int]) -> None:
    example, rate = drawn
    lengths = fixed_segments(len(example.cot), rate)
    pieces = split_cot(example.cot, lengths)
    assert [token for piece in pieces for token in piece] == example.cot
    assert pieces == reference.chunks(example.cot, rate)
    row = decoder_row_of(example, rate)
    assert row.kind.count(Kind.LATENT) == len(lengths) == math.ceil(len(example.cot) / rate)
    assert row.kind.count(Kind.CHUNK) == max(0, len(example.cot) - rate)  # S_1 is dropped


@pytest.mark.parametrize("lengths", [[2, 2], [2, 2, 2], [5, 0], [6, -1], []])
def test_lengths_that_do_not_partition_the_cot_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not partition a CoT of 5 tokens"):
        split_cot([a, b, c, d, e], lengths)


def test_steps_of_any_length_are_segments_too() -> None:
    pieces = split_cot([a, b, c, d, e], [1, 3, 1])
    row = decoder_row(P, pieces, END, [A, EOS], "token")
    assert row.ids[5:11] == [0, b, c, d, 0, e]
    assert row.position[5:12] == [5, 6, 7, 8, 6, 7, 7]
    assert pieces == reference.pieces_of(dataclasses.replace(ORACLE, segment_lengths=[1, 3, 1]), 2)


def test_explicit_row_trains_cot_delimiter_and_answer() -> None:
    row = explicit_row([1, 2], [11, 12], [21], [31, 32], "token")
    assert row.ids == [1, 2, 11, 12, 21, 31, 32]
    assert row.position == [0, 1, 2, 3, 4, 5, 6]
    assert row.target == [_, 11, 12, 21, 31, 32, _]
    assert row.kind == [Kind.TEXT] * 7


def test_no_cot_row_is_an_explicit_row_without_cot() -> None:
    assert explicit_row([1, 2], [], [21], [31, 32], "token").target == [_, 21, 31, 32, _]


def test_worked_example_weights() -> None:
    """J_1 = {c, d}, J_2 = {e}, J_3 = {</, think, >, A, EOS}; N = 3; 8 targets."""
    at = [5, 6, 8, 10, 11, 12, 13, 14]
    expected = {
        "token": [1.0] * 8,
        "sample": [1 / 8] * 8,
        "segment": [1 / 6, 1 / 6, 1 / 3] + [1 / 15] * 5,
    }
    for loss_reduction, weights in expected.items():
        row = decoder_row(P, SEGMENTS, END, [A, EOS], loss_reduction)
        assert [row.weight[t] for t in at] == pytest.approx(weights)
        assert [w for t, w in enumerate(row.weight) if t not in at] == [0.0] * 8
        assert loss_count(row, loss_reduction) == (8 if loss_reduction == "token" else 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(examples(), min_size=1, max_size=4), st.randoms(use_true_random=False))
@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
def test_weights_and_counts_give_the_reference_normalisation(loss_reduction: str, batch: list, random) -> None:
    rows, grouped = [], []
    total = count = 0.0
    for example, rate in batch:
        row = decoder_row_of(example, rate, loss_reduction)
        slots = reference.decoder_slots(example, reference.chunks(example.cot, rate))
        losses = {source: random.uniform(0, 5) for source, _target in reference.ce_pairs(slots)}
        segments: dict[int, list[float]] = {}
        for source, target in reference.ce_pairs(slots):
            segments.setdefault(slots[target].chunk if slots[target].kind == "text" else 99, []).append(losses[source])
        grouped.append(list(segments.values()))
        total += sum(row.weight[t] * loss for t, loss in losses.items())
        count += loss_count(row, loss_reduction)
        rows.append(row)
    assert total / count == pytest.approx(reference.normalise(grouped, loss_reduction))


@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
def test_weight_is_zero_exactly_where_there_is_no_target(loss_reduction: str) -> None:
    for row in (
        decoder_row(P, SEGMENTS, END, [A, EOS], loss_reduction),
        stage2_row(P, 3, END, [A, EOS], loss_reduction),
        explicit_row(P, [a, b], END, [A, EOS], loss_reduction),
    ):
        assert [weight > 0 for weight in row.weight] == [target != IGNORE for target in row.target]
        assert len({len(column) for column in row}) == 1


def test_inputs_are_not_changed() -> None:
    prompt, segments, end, answer = [1, 2], [[3, 4], [5]], [6], [7, 8]
    decoder_row(prompt, segments, end, answer, "token")
    encoder_row(prompt, segments, end, True)
    stage2_row(prompt, 2, end, answer, "token")
    explicit_row(prompt, [3], end, answer, "token")
    assert (prompt, segments, end, answer) == ([1, 2], [[3, 4], [5]], [6], [7, 8])


def test_explicit_targets_with_and_without_the_prompt() -> None:
    """P = 1 2, C = 3, E = 4, A = 5 6: without the prompt the targets are 3 4 5 6, with it 2 3 4 5 6."""
    plain = layout.explicit_row([1, 2], [3], [4], [5, 6], "sample")
    whole = layout.explicit_row([1, 2], [3], [4], [5, 6], "sample", prompt_targets=True)
    assert plain.target == [-100, 3, 4, 5, 6, -100]
    assert whole.target == [2, 3, 4, 5, 6, -100]
    assert plain.weight == [0, 0.25, 0.25, 0.25, 0.25, 0]
    assert whole.weight == [0.2, 0.2, 0.2, 0.2, 0.2, 0]
