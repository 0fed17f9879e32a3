"""Validation grades what evaluation grades."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from latent_sft.config.experiment import Config
from latent_sft.config.schema import PromptConfig, TinyModelConfig
from latent_sft.evaluation.answers import answer_text
from latent_sft.evaluation.score import score
from latent_sft.inference.generate import Decoded
from latent_sft.inference.solve import Thinker
from latent_sft.models.tiny_tokenizer import build_tokenizer
from latent_sft.train import share, validation


@pytest.mark.parametrize(
    ("said", "right"), [("Tom is a lempus.", 1), ("Tom is a <pad> lempus.", 0), ("Tom is a lempus.<pad>", 0)]
)
def test_a_special_token_in_an_answer_is_seen_in_validation_and_in_evaluation(monkeypatch, said, right):
    tokenizer = build_tokenizer(["Tom is a lempus."], TinyModelConfig(), PromptConfig())
    ids = tokenizer(said)["input_ids"]
    row = {"id": "a", "reference": "Tom is a lempus.", "answer": [*ids, tokenizer.eos_token_id], "cot": []}
    sample = Decoded(
        latent_ids=None,
        latent_weights=None,
        thought_ids=[],
        answer_ids=ids,
        num_steps=0,
        forward_passes=1,
        finished=True,
    )
    monkeypatch.setattr(share, "solve", lambda *_, **__: [sample])
    work = SimpleNamespace(config=Config(), tokenizer=tokenizer, spec=None)
    stage = SimpleNamespace(thinker=lambda model: Thinker("none", model))
    assert validation.validation_metrics(torch.nn.Identity(), stage, work, [row])["accuracy"] == right
    grading = {"decode_text": partial(answer_text, tokenizer), "grader": "auto", "wall_seconds": 1.0}
    summary, _ = score(
        [sample],
        [row],
        spec=SimpleNamespace(eos_id=tokenizer.eos_token_id, end_think_ids=(9,)),
        heatmap_problems=0,
        **grading,
    )
    assert summary["accuracy"] == right
