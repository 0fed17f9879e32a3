import json
from types import SimpleNamespace

import pytest
import torch

from latent_sft.evaluation.score import score
from latent_sft.method.types import LatentSpec

WORDS = ["<pad>", "</think>", "<think>", "1", "2", "3", "4", "5", "#eos"]
SPEC = LatentSpec(think_ids=(2,), end_think_ids=(1,), eos_id=8, pad_id=0, vocab_size=9, top_k=2)


def decode_text(ids):
    return " ".join(WORDS[i] for i in ids)


def row(id, reference, cot, num_steps):
    return {
        "answer": [WORDS.index(word) for word in reference] + [SPEC.eos_id],
        "id": id,
        "problem": f"problem {id}",
        "reference": reference,
        "cot": cot,
        "segment_lengths": [2] * (len(cot) // 2) + [1] * (len(cot) % 2),
        "steps": ["step"] * num_steps,
    }


ROWS = [row("a", "3", [3, 4, 5, 6], 2), row("b", "5", [7, 7, 3], 1), row("c", "4", [3, 3], 2)]


def explicit(answer, steps, passes=9, finished=True):
    return SimpleNamespace(
        latent_ids=None,
        latent_weights=None,
        thought_ids=[3] * steps,
        answer_ids=answer,
        num_steps=steps,
        forward_passes=passes,
        finished=finished,
    )


def latent(answer, ids, weights, finished=True):
    ids, weights = torch.tensor(ids).view(-1, 2), torch.tensor(weights).view(-1, 2)
    return SimpleNamespace(
        latent_ids=ids,
        latent_weights=weights,
        thought_ids=ids[:, 0].tolist(),
        answer_ids=answer,
        num_steps=len(ids),
        forward_passes=len(ids) + len(answer) + 2,
        finished=finished,
    )


def run(decoded, rows=ROWS, **options):
    options = {"spec": SPEC, "decode_text": decode_text, "grader": "auto", "wall_seconds": 6.0} | options
    summary, problems = score(decoded, rows, **options)
    json.dumps([summary, problems], allow_nan=False)  # what is written is JSON
    return summary, problems


def test_explicit_by_hand():
    summary, problems = run([explicit([5], 4), explicit([3], 2, 7), explicit([6, 6], 0, 5, finished=False)])
    assert [p["correct"] for p in problems] == [True, False, False]  # "3" is 3, "1" is not 5, "4 4" is not a number
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["accuracy_se"] == pytest.approx(1 / 3)  # variance 1/3, / 3, root
    assert summary["num_examples"] == 3 and summary["samples_per_problem"] == 1
    assert summary["reasoning_steps_mean"] == summary["explicit_tokens_mean"] == 2.0
    assert summary["latent_steps_max"] == 0 and summary["explicit_tokens_max"] == 4
    assert summary["answer_tokens_mean"] == pytest.approx(4 / 3) and summary["answer_tokens_max"] == 2
    assert summary["forward_passes_mean"] == 7.0 and summary["forward_passes_max"] == 9
    assert summary["finished_share"] == pytest.approx(2 / 3)
    assert summary["seconds_per_problem"] == 2.0
    assert summary["pass_at"] == {"1": pytest.approx(1 / 3)}
    assert summary["accuracy_by_steps"] == {
        "1": {"accuracy": 0.0, "accuracy_se": None, "num_examples": 1},
        "2": {"accuracy": 0.5, "accuracy_se": 0.5, "num_examples": 2},
    }
    assert "ecr" not in summary and "latent_entropy_mean" not in summary


def test_accuracy_by_position_by_hand():
    """`345#` and `5#`: each place of the reference, its end included; what is said behind it does not count."""
    rows = [row("a", "345", [], 1), row("b", "5", [], 1)]
    decoded = [explicit([5, 6, 7], 1), explicit([5, 7], 1), explicit([7, 7, 7], 1), explicit([7], 1, finished=False)]
    summary, _ = run(decoded, rows, samples_per_problem=2)
    assert summary["accuracy_by_position"] == {
        "1": {"accuracy": 1.0, "num_examples": 2},  # 3, 3, 5, 5
        "2": {"accuracy": 0.25, "num_examples": 2},  # 4; 5; 5 where b ends; nothing
        "3": {"accuracy": 0.5, "num_examples": 1},  # 5; the end, too early
        "4": {"accuracy": 0.5, "num_examples": 1},  # the end; nothing
    }
    long = [row("a", "3" * 40, [], 1)]
    assert list(run([explicit([5] * 40, 1)], long)[0]["accuracy_by_position"]) == [str(i) for i in range(1, 33)]


def test_latent_numbers_by_hand():
    decoded = [
        latent([5], [[3, 6], [1, 5]], [[0.5, 0.5], [0.75, 0.25]]),
        latent([7], [[7, 3]], [[1.0, 0.0]]),
        latent([6], [], []),  # stopped at once
    ]
    summary, problems = run(decoded, heatmap_problems=2)
    assert summary["accuracy"] == 1.0 and summary["accuracy_se"] == 0.0
    assert summary["latent_steps_mean"] == 1.0 and summary["explicit_tokens_max"] == 0
    assert summary["latent_entropy_mean"] == pytest.approx((0.693147 + 0.562335 + 0.0) / 3, abs=1e-5)
    assert summary["end_top1_share"] == pytest.approx(1 / 3)
    # a: spans [3, 4], [5, 6]; top-1 covers {3}, none; top-2 {3}, {5}. b: one span [7, 7, 3]; top-1 both 7s, 3 no weight
    assert summary["ecr"] == {"1": pytest.approx((1 / 2 + 2) / 2), "2": pytest.approx((2 / 2 + 2) / 2)}
    assert problems[0]["latents"] == [[["1", 0.5], ["4", 0.5]], [["</think>", 0.75], ["3", 0.25]]]
    assert problems[0]["cot_chunks"] == ["1 2", "3 4"] and problems[0]["problem"] == "problem a"
    assert problems[1]["latents"] == [[["5", 1.0], ["1", 0.0]]] and "latents" not in problems[2]


def test_several_samples_per_problem():
    right, wrong = explicit([5], 1), explicit([3], 1)
    summary, problems = run([right, wrong, wrong, right], ROWS[:1], samples_per_problem=4)
    assert summary["num_examples"] == 1 and summary["accuracy"] == 0.5 and summary["accuracy_se"] is None
    assert summary["pass_at"] == {"1": 0.5, "4": 1.0}
    assert [(p["id"], p["sample"], p["correct"]) for p in problems] == [
        ("a", 0, True),
        ("a", 1, False),
        ("a", 2, False),
        ("a", 3, True),
    ]
    assert "thought" in problems[0] and "thought" not in problems[1]


def test_wrong_number_of_samples():
    with pytest.raises(ValueError, match="2 samples for 3 problems of 1 samples each"):
        run([explicit([3], 1)] * 2)
