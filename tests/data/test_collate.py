"""Batches in two-track order against the worked example, written out by hand."""

from __future__ import annotations

import dataclasses

import torch

from latent_sft.data.collate import encoder_batch, stage1_batch, stage2_batch
from latent_sft.method.layout import IGNORE, decoder_row, split_cot, two_track
from latent_sft.method.masks import supervision_mask
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.methods.cot import explicit_batch

SPEC = LatentSpec(think_ids=(5,), end_think_ids=(21, 22, 23), eos_id=1, pad_id=0, vocab_size=40, rate=2, top_k=2)
# r = 2: prompt of 5, CoT a b c d e, answer A EOS; and a short row whose CoT is one segment
LONG = {"id": "0", "hash": "x", "prompt": [1, 2, 3, 4, 5], "cot": [11, 12, 13, 14, 15], "segment_lengths": [2, 2, 1]}
LONG |= {"answer": [31, 32]}
SHORT = {"id": "1", "hash": "y", "prompt": [1, 5], "cot": [16], "segment_lengths": [1], "answer": [33, 32]}


def test_decoder_in_two_track_order() -> None:
    batch = stage1_batch([LONG, SHORT], SPEC, loss_reduction="token")
    # P P P P P z1 z2 z3 </ th > A | c; d and e end a chunk and EOS the answer: nobody sees them, they predict nothing
    assert batch["ids"].tolist() == [
        [1, 2, 3, 4, 5, 0, 0, 0, 21, 22, 23, 31, 13],
        [1, 5, 0, 21, 22, 23, 33, 0, 0, 0, 0, 0, 0],
    ]
    assert batch["kind"].tolist() == [[1] * 5 + [2] * 3 + [4] * 4 + [3], [1, 1, 2, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0]]
    # the main track counts on, a chunk counts on from its latent
    assert batch["position"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 6]
    # where each stands in P P P P P z1 c d z2 e z3 </ th > A E
    assert batch["time"][0].tolist() == [0, 1, 2, 3, 4, 5, 8, 10, 11, 12, 13, 14, 6]
    assert batch["anchor"].tolist() == [[[5]], [[0]]]
    assert batch["latent_mask"].tolist() == [[True, True, True], [True, False, False]]
    # z1 -> c, c -> d, z2 -> e, z3 -> </ and on; in the second row z1 -> </
    where = dict(zip(batch["target_index"].tolist(), batch["targets"].tolist(), strict=True))
    first = {5: 13, 12: 14, 6: 15, 7: 21, 8: 22, 9: 23, 10: 31, 11: 32}
    assert where == {**first, **{13 + t: v for t, v in {2: 21, 3: 22, 4: 23, 5: 33, 6: 32}.items()}}


def test_groups_are_as_wide_as_the_longest_chunk_of_the_batch() -> None:
    rows = [{**LONG, "segment_lengths": [1, 1, 3]}, {**LONG, "segment_lengths": [1, 2, 2]}]
    batch = stage1_batch(rows, SPEC, loss_reduction="token")
    main = 5 + 3 + 3 + 1
    # c | d e of `b | c d e`; then b of `b c` and d of `d e`: one group of the first row stays empty
    assert batch["ids"][:, main:].tolist() == [[13, 14, 0, 0], [12, 0, 14, 0]]
    assert batch["time"][:, main:].tolist() == [[8, 9, -1, -1], [6, -1, 9, -1]]
    assert batch["anchor"].tolist() == [[[6, 6], [0, 0]], [[5, 5], [6, 6]]]


def test_encoder_in_two_track_order() -> None:
    batch = encoder_batch([LONG, SHORT], SPEC)
    # no marker sees </think>
    assert batch["encoder_ids"][0].tolist() == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15, 0, 0, 0]
    assert batch["encoder_kind"].tolist() == [[1] * 10 + [5] * 3, [1] * 3 + [0] * 7 + [5, 0, 0]]
    # transparent: a marker has the position of its anchor, the last text token it sees
    assert batch["encoder_anchor"].tolist() == [[[6], [8], [9]], [[2], [0], [0]]]
    assert batch["encoder_position"][0].tolist() == [*range(10), 6, 8, 9]
    stretched = encoder_batch([LONG], dataclasses.replace(SPEC, marker_positions="stretched"))
    assert stretched["encoder_position"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 7, 10, 12]


def test_given_latents_take_the_encoders_place() -> None:
    labels = {"0": Superposition(torch.ones(3, 2, dtype=torch.long), torch.full((3, 2), 0.5))}
    labels["1"] = Superposition(torch.full((1, 2), 7), torch.tensor([[0.9, 0.1]]))
    asked = []

    def label_of(row_id: str, row_hash: str) -> Superposition:
        asked.append((row_id, row_hash))
        return labels[row_id]

    batch = stage1_batch([LONG, SHORT], SPEC, loss_reduction="token", label_of=label_of)
    assert asked == [("0", "x"), ("1", "y")]
    assert not any(key.startswith("encoder") for key in batch)
    assert batch["latent_ids"][1].tolist() == [[7, 7], [0, 0], [0, 0]]
    assert batch["latent_weights"][1, 0].tolist() == [0.8999999761581421, 0.10000000149011612]
    plain = stage1_batch([LONG, SHORT], SPEC, loss_reduction="token")
    for key in ("ids", "target_index", "anchor", "latent_mask", "count_ce"):
        assert torch.equal(batch[key], plain[key])


def test_what_is_left_out_neither_predicts_nor_is_seen() -> None:
    row = decoder_row(LONG["prompt"], split_cot(LONG["cot"], [2, 2, 1]), SPEC.end_think_ids, [31, 32], "token")
    main, groups = two_track(row)
    assert main == [0, 1, 2, 3, 4, 5, 8, 10, 11, 12, 13, 14] and groups == [[6]]
    left_out = set(range(len(row.ids))) - {*main, *groups[0]}
    keep = supervision_mask(torch.tensor([row.kind]), torch.tensor([row.branch]))[0, 0]
    for t in left_out:
        assert row.target[t] == IGNORE and keep[:, t].sum() == 1  # itself


def test_workers_hand_over_no_square_tensor() -> None:
    """Masks are never made by data workers: nothing in a batch grows with the square of its length."""
    label = Superposition(torch.ones(3, 2, dtype=torch.long), torch.full((3, 2), 0.5))
    options = {"spec": SPEC, "loss_reduction": "token"}
    batches = [
        stage1_batch([LONG], **options),
        stage2_batch([LONG], **options, label_of=lambda *_: label),
        explicit_batch([LONG], **options, with_cot=True),
    ]
    for batch in batches:
        assert max(value.numel() for value in batch.values()) <= batch["ids"].numel()
