"""A model thinks the same thoughts while it is trained and when it is decoded."""

from __future__ import annotations

import pytest
import torch
from inference.test_thoughts import EVERY, PROMPTS, SPEC, model_of, same, think, thoughts_of

from latent_sft.models.logits import head
from latent_sft.models.thought_passes import read, read_on, think_at_once, think_in_turn, use_thoughts

FAMILIES = ("llama", "gpt2", "gemma3_text", "granite")


@EVERY
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_passes_predict_what_decoding_writes(family, spec):
    model = model_of(family)
    thoughts = thoughts_of(model, spec).eval()
    plain = think(model, thoughts, batch_size=2)
    use_thoughts(model)
    found = think(model, thoughts, batch_size=3)  # decoding also works through the attention of training
    assert all(same(a, b) for a, b in zip(plain, found, strict=True))

    length = torch.tensor([len(prompt) for prompt in PROMPTS])
    ids = torch.tensor([prompt + [0] * (int(length.max()) - len(prompt)) for prompt in PROMPTS])
    prompt = read(model, ids, length, None if spec.sequential else thoughts)
    if spec.sequential:
        thought = think_in_turn(model, thoughts, prompt, torch.ones(len(PROMPTS), spec.num_latents, dtype=torch.bool))
    else:
        thought = think_at_once(model, thoughts, prompt)
    written = [[*row.answer_ids, *([SPEC.eos_id] if row.finished else [])] for row in found]
    tails = [[*SPEC.end_think_ids, *answer] for answer in written]
    sizes = torch.tensor([len(tail) for tail in tails])
    padded = torch.tensor([tail + [0] * (int(sizes.max()) - len(tail)) for tail in tails])
    result = read_on(model, padded, sizes, thought.position, (prompt.piece, *thought.pieces))
    likeliest = head(model)(result.hidden).argmax(-1)
    for row, answer, tail in zip(likeliest.tolist(), written, tails, strict=True):
        assert row[len(SPEC.end_think_ids) - 1 : len(tail) - 1] == answer
