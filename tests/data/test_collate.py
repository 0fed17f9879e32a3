"""Batches in two-track order against the worked example, written out by hand."""

from __future__ import annotations

import torch

from latent_sft.data.collate import encoder_batch, explicit_batch, stage1_batch, stage2_batch
from latent_sft.method.layout import decoder_row, split_cot, two_track
from latent_sft.method.types import LatentSpec, Superposition

SPEC = LatentSpec(think_ids=(5,), end_think_ids=(21, 22, 23), eos_id=1, pad_id=0, vocab_size=40, rate=2, top_k=2)
# r = 2: prompt of 5, CoT a b c d e, answer A EOS; and a short row whose CoT is one segment
LONG = {"id": "0", "hash": "x", "prompt": [1, 2, 3, 4, 5], "cot": [11, 12, 13, 14, 15], "segment_lengths": [2, 2, 1]}
LONG |= {"answer": [31, 32]}
SHORT = {"id": "1", "hash": "y", "prompt": [1, 5], "cot": [16], "segment_lengths": [1], "answer": [33, 32]}


def test_decoder_in_two_track_order() -> None:
    batch = stage1_batch([LONG, SHORT], SPEC, normalisation="token")
    #  main: P P P P P z1 z2 z3 </ th > A E | c d | e .
    assert batch["ids"].tolist() == [
        [1, 2, 3, 4, 5, 0, 0, 0, 21, 22, 23, 31, 32, 13, 14, 15, 0],
        [1, 5, 0, 21, 22, 23, 33, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch["kind"].tolist() == [
        [1, 1, 1, 1, 1, 2, 2, 2, 4, 4, 4, 4, 4, 3, 3, 3, 0],
        [1, 1, 2, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    # the main track counts on, a chunk counts on from its latent
    assert batch["position"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 6, 7, 7, 0]
    # where each stands in P P P P P z1 c d z2 e z3 </ th > A E
    assert batch["time"][0].tolist() == [0, 1, 2, 3, 4, 5, 8, 10, 11, 12, 13, 14, 15, 6, 7, 9, -1]
    assert batch["anchor"].tolist() == [[[5, 5], [6, 6]], [[0, 0], [0, 0]]]
    assert batch["latent_mask"].tolist() == [[True, True, True], [True, False, False]]
    # z1 -> c, c -> d, z2 -> e, z3 -> </ and on; in the second row z1 -> </
    where = dict(zip(batch["target_index"].tolist(), batch["targets"].tolist(), strict=True))
    first = {5: 13, 13: 14, 6: 15, 7: 21, 8: 22, 9: 23, 10: 31, 11: 32}
    assert where == {**first, **{17 + t: v for t, v in {2: 21, 3: 22, 4: 23, 5: 33, 6: 32}.items()}}


def test_encoder_in_two_track_order() -> None:
    batch = encoder_batch([LONG, SHORT], SPEC)
    assert batch["encoder_ids"][0].tolist() == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15, 21, 22, 23, 0, 0, 0]
    assert batch["encoder_kind"].tolist() == [[1] * 13 + [5] * 3, [1] * 6 + [0] * 7 + [5, 0, 0]]
    # transparent: a marker has the position of its anchor, the last text token it sees
    assert batch["encoder_anchor"].tolist() == [[[6], [8], [9]], [[2], [0], [0]]]
    assert batch["encoder_position"][0].tolist() == [*range(13), 6, 8, 9]
    assert "marker_index" not in batch


def test_given_latents_take_the_encoders_place() -> None:
    labels = {"0": Superposition(torch.ones(3, 2, dtype=torch.long), torch.full((3, 2), 0.5))}
    labels["1"] = Superposition(torch.full((1, 2), 7), torch.tensor([[0.9, 0.1]]))
    asked = []

    def label_of(row_id: str, row_hash: str) -> Superposition:
        asked.append((row_id, row_hash))
        return labels[row_id]

    batch = stage1_batch([LONG, SHORT], SPEC, normalisation="token", label_of=label_of)
    assert asked == [("0", "x"), ("1", "y")]
    assert not any(key.startswith("encoder") for key in batch)
    assert batch["latent_ids"][1].tolist() == [[7, 7], [0, 0], [0, 0]]
    assert batch["latent_weights"][1, 0].tolist() == [0.8999999761581421, 0.10000000149011612]
    plain = stage1_batch([LONG, SHORT], SPEC, normalisation="token")
    for key in ("ids", "target_index", "anchor", "latent_mask", "counts"):
        assert torch.equal(batch[key], plain[key])


def test_two_track_is_a_permutation_that_keeps_each_track_in_order() -> None:
    row = decoder_row(LONG["prompt"], split_cot(LONG["cot"], [2, 2, 1]), SPEC.end_think_ids, [31, 32], "token")
    main, groups = two_track(row)
    assert main == [0, 1, 2, 3, 4, 5, 8, 10, 11, 12, 13, 14, 15] and groups == [[6, 7], [9]]
    assert sorted([*main, *groups[0], *groups[1]]) == list(range(len(row.ids)))


def test_workers_hand_over_no_square_tensor() -> None:
    """Masks are never made by data workers: nothing in a batch grows with the square of its length."""
    label = Superposition(torch.ones(3, 2, dtype=torch.long), torch.full((3, 2), 0.5))
    options = {"spec": SPEC, "normalisation": "token"}
    batches = [
        stage1_batch([LONG], **options),
        stage2_batch([LONG], **options, label_of=lambda *_: label),
        explicit_batch([LONG], **options, with_cot=True),
    ]
    for batch in batches:
        assert max(value.numel() for value in batch.values()) <= batch["ids"].numel()
