from types import SimpleNamespace

import pytest
import torch

from latent_sft.evaluation.agreement import agreement


def row(prompt, cot):
    return {"prompt": prompt, "cot": cot}


def explicit(*tokens):
    return SimpleNamespace(latent_ids=None, latent_weights=None, thought_ids=list(tokens))


def latent(ids, weights):
    return SimpleNamespace(latent_ids=torch.tensor(ids), latent_weights=torch.tensor(weights), thought_ids=[])


def test_by_hand():
    rows = [row([1, 2], [1, 5, 6, 6, 9]), row([3], [3, 7, 9])]
    decoded = [latent([[5, 9], [8, 6]], [[0.9, 0.1], [1.0, 0.0]]), explicit(7, 5, 5)]
    found = agreement(decoded, rows)
    # of {5, 6, 9} 5 and 9 are named (6 has weight 0); of {7, 9} 7
    assert found["gold_recall"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # the likeliest tokens are 5 and 8, of which 5 is in the CoT; explicit tokens are what they are
    assert found["gold_recall_top1"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    # exchanged: of {7, 9} the first names none by its top-1
    assert found["gold_recall_top1_chance"] == pytest.approx((0 + 1 / 3) / 2)
    # exchanged: of {7, 9} the first names 9; of {5, 6, 9} the second names 5
    assert found["gold_recall_chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_thoughts_that_name_every_token_are_no_better_than_chance():
    rows = [row([0], [i, i + 1]) for i in range(1, 6)]
    found = agreement([explicit(*range(1, 9))] * 5, rows)
    assert set(found.values()) == {1.0} and len(found) == 4


def test_what_cannot_be_asked_is_left_out():
    rows = [row([1], [1, 2]), row([1], []), row([2], [2]), row([1], [4])]
    decoded = [explicit(2), explicit(2), explicit(2), explicit()]
    # no CoT, no token of its own, no thought: only the first problem counts, and has nobody to exchange with
    assert agreement(decoded, rows) == {"gold_recall": 1.0, "gold_recall_top1": 1.0}
    assert agreement([explicit()] * 4, rows) == {}


def test_what_another_problem_only_repeats_from_a_prompt_is_not_counted():
    rows = [row([1, 2], [1, 2, 5]), row([5, 8], [5, 8, 2, 6])]
    # 2 is new in the second CoT but stands in the first prompt; 5 is new in the first but stands in the second prompt
    found = agreement([explicit(5, 2), explicit(6, 5)], rows)
    assert (found["gold_recall"], found["gold_recall_chance"]) == ((1 / 1 + 1 / 2) / 2, 0.0)


def test_latents_in_any_order_and_none_at_all():
    rows = [row([0], [1, 2]), row([0], [3])]
    found = agreement([latent([[5, 1]], [[0.2, 0.8]]), latent([[3, 4]], [[0.6, 0.4]])], rows)
    assert (found["gold_recall"], found["gold_recall_top1"]) == (0.75, 0.75)
    none = SimpleNamespace(latent_ids=torch.zeros(0, 2).long(), latent_weights=torch.zeros(0, 2), thought_ids=[])
    assert agreement([none, none], rows) == {}
