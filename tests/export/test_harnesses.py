"""What four harnesses pass to `generate`, word for word, and what they take from its result.

lm-eval 0.4.13 (`models/huggingface.py`), inspect-ai 0.3.285 (`model/_providers/hf.py`), lighteval 0.13
(`models/transformers/transformers_model.py`) and evalplus 0.3.1 (`provider/hf.py`, with stop-sequencer 1.2.3).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from latent_sft.data.prompts import render_prompt
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.inference.generate import generate
from latent_sft.method.types import LatentSpec

Inputs = dict[str, Tensor]


class MultiTokenEOSCriteria(StoppingCriteria):
    """Of lm-eval and lighteval: it remembers which rows have stopped, by their place, and stops once all have."""

    def __init__(self, sequence: str, tokenizer: PreTrainedTokenizerBase, width: int, rows: int) -> None:
        self.sequence, self.tokenizer, self.width = sequence, tokenizer, width
        self.done_tracker = [False] * rows
        self.look_back = len(tokenizer.encode(sequence, add_special_tokens=False)) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        recent = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.look_back :])
        for i, done in enumerate(self.done_tracker):
            if not done:
                self.done_tracker[i] = self.sequence in recent[i]
        return False not in self.done_tracker


class StopSequenceCriteria(StoppingCriteria):
    """Of stop-sequencer."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        self.texts, self.tokenizer, self.width = texts, tokenizer, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        written = [self.tokenizer.decode(row[self.width :]) for row in input_ids.tolist()]
        return any(all(text in one for one in written) for text in self.texts)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("harnesses") / "export")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def own_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")


@pytest.fixture(scope="module")
def prompts(folder: Path, problems: list[str], spec: LatentSpec) -> list[list[int]]:
    own = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [render_prompt(own, spec, problem) for problem in problems]


@pytest.fixture(scope="module")
def answers(checkpoint: Path, folder: Path, prompts: list[list[int]], spec: LatentSpec) -> list[str]:
    """Return the answers as `latent-sft eval` decodes them, as text."""
    own = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    decoded = generate(AutoModelForCausalLM.from_pretrained(checkpoint), spec, prompts, thinker="latent")
    texts = [own.decode(row.answer_ids, skip_special_tokens=True) for row in decoded]
    assert len(set(texts)) > 5
    return texts


def padded(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> Inputs:
    return dict(tokenizer.pad({"input_ids": prompts}, return_tensors="pt"))


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_lm_eval(
    batch: int,
    model: PreTrainedModel,
    own_tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    answers: list[str],
) -> None:
    until = ["\n\n", own_tokenizer.eos_token]
    found = []
    for first in range(0, len(prompts), batch):
        inputs = padded(own_tokenizer, prompts[first : first + batch])
        rows, width = inputs["input_ids"].shape
        sequences = model.generate(
            input_ids=inputs["input_ids"],
            max_length=width + 256,
            stopping_criteria=StoppingCriteriaList(MultiTokenEOSCriteria(s, own_tokenizer, width, rows) for s in until),
            pad_token_id=own_tokenizer.pad_token_id,
            use_cache=True,
            attention_mask=inputs["attention_mask"],
            do_sample=False,
        )
        found += [own_tokenizer.decode(row[width:], skip_special_tokens=True) for row in sequences.tolist()]
    assert found == answers


@pytest.mark.parametrize("logprobs", [None, True])
def test_inspect_ai(
    logprobs: bool | None,
    model: PreTrainedModel,
    own_tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    answers: list[str],
) -> None:
    own_tokenizer.pad_token = own_tokenizer.eos_token
    inputs = padded(own_tokenizer, prompts)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7, "return_dict_in_generate": True}
    if logprobs is not None:
        how["output_logits"] = logprobs
    with torch.inference_mode():
        output = model.generate(**how, **inputs)
    written = output.sequences[:, inputs["input_ids"].size(dim=1) :]
    assert output.hidden_states is None
    if logprobs is None:
        assert output.logits is None
    else:
        table = torch.nn.functional.log_softmax(torch.stack(output.logits).transpose(0, 1), dim=-1)
        assert table.shape[:2] == written.shape
        assert torch.equal(table[:, 1].argmax(-1), written[:, 1])
    assert own_tokenizer.batch_decode(written, skip_special_tokens=True) == answers


def test_lighteval(
    model: PreTrainedModel, own_tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], answers: list[str]
) -> None:
    inputs = padded(own_tokenizer, prompts)
    rows, width = inputs["input_ids"].shape
    outputs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        stopping_criteria=StoppingCriteriaList([MultiTokenEOSCriteria("\n\n", own_tokenizer, width, rows)]),
        temperature=0,
        output_scores=True,
        return_dict_in_generate=True,
        max_new_tokens=256,
        pad_token_id=own_tokenizer.pad_token_id,
        eos_token_id=own_tokenizer.eos_token_id,
        num_return_sequences=1,
        output_logits=False,
        renormalize_logits=True,
        do_sample=False,
    )
    generations = torch.reshape(outputs.sequences[:, width:], (rows, 1, -1))
    texts = [own_tokenizer.decode(row[0], skip_special_tokens=True) for row in generations]
    assert all(
        text.startswith(answer) for text, answer in zip(texts, answers, strict=True)
    )  # its limit is a longer one
    assert len(outputs.scores) == generations.shape[-1]


def test_evalplus(
    model: PreTrainedModel, own_tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], answers: list[str]
) -> None:
    own = model._get_stopping_criteria
    for prompt, answer in zip(prompts[:3], answers, strict=False):
        input_tokens = torch.tensor([prompt])

        def with_stop(*args: Any, width: int = len(prompt), **how: Any) -> StoppingCriteriaList:
            criteria = copy.deepcopy(own(*args, **how))
            criteria.append(StopSequenceCriteria(["\nassert"], own_tokenizer, width))
            return criteria

        model._get_stopping_criteria = with_stop
        try:
            common = {"max_new_tokens": 7, "pad_token_id": own_tokenizer.eos_token_id}
            greedy = model.generate(input_tokens, do_sample=False, num_return_sequences=1, **common)
            sampled = model.generate(
                input_tokens, do_sample=True, num_return_sequences=3, top_p=0.95, temperature=0.8, **common
            )
        finally:
            del model._get_stopping_criteria
        assert own_tokenizer.batch_decode(greedy[:, input_tokens.size(-1) :], skip_special_tokens=True) == [answer]
        assert len(sampled) == 3 and torch.equal(sampled[:, : len(prompt)], input_tokens.expand(3, -1))
