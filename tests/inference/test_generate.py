"""The engine: a batch equals single runs, for fourteen families and both thinkers; counts; reproducible sampling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models.families import FAMILIES, build

from latent_sft.inference.generate import Sampling, generate
from latent_sft.method.types import LatentSpec, Superposition

SPEC = LatentSpec(
    think_ids=(2,), end_think_ids=(3, 4), eos_id=1, pad_id=0, vocab_size=40, top_k=4, max_latents=5, max_answer_tokens=6
)
PROMPTS = [[7, 8, 2], [9, 10, 11, 12, 13, 2], [5, 2], [20, 21, 22, 23, 2]]


def model_of(family: str):
    return build(family, scale=6.0)


def same(a, b) -> bool:
    return a.thought_ids == b.thought_ids and a.answer_ids == b.answer_ids and a.forward_passes == b.forward_passes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinker", ["latent", "explicit"])
def test_a_batch_equals_single_runs(family, thinker):
    model = model_of(family)
    options = {"thinker": thinker, "max_cot_tokens": 7}
    together = generate(model, SPEC, PROMPTS, batch_size=4, **options)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = generate(model, SPEC, [prompt], **options)
        assert same(found, alone)
        if thinker == "latent":
            torch.testing.assert_close(found.latent_weights, alone.latent_weights, rtol=1e-4, atol=1e-5)
    if not family.startswith(("gemma", "cohere")):  # tied and scaled: random ones repeat their input for ever
        assert len({tuple(d.answer_ids) for d in together}) > 1, "a model that always writes the same shows nothing"


def test_given_latents_are_fed_and_counted():
    model = model_of("llama")
    own = generate(model, SPEC, PROMPTS, thinker="latent")
    given = [Superposition(d.latent_ids, d.latent_weights) for d in own]
    again = generate(model, SPEC, PROMPTS, thinker="latent", latents=given)
    for a, b in zip(own, again, strict=True):
        assert a.answer_ids == b.answer_ids
        assert b.num_steps == a.num_steps
        # one prefill instead of prompt + latents + delimiter one by one
        assert b.forward_passes == a.forward_passes - a.num_steps - len(SPEC.end_think_ids)


def test_forward_passes_count_prefill_latents_delimiter_and_answer():
    """N latents, 2 delimiter tokens and an answer of A tokens: 1 + N + 2 + (A - 1), the last token is not fed."""
    spec = dataclasses.replace(SPEC, min_latents=3, max_latents=3)
    for found in generate(model_of("llama"), spec, PROMPTS, thinker="latent"):
        written = len(found.answer_ids) + found.finished
        assert found.num_steps == 3
        assert found.forward_passes == 1 + 3 + 2 + written - 1


def test_no_cot_takes_no_reasoning_steps():
    for found in generate(model_of("llama"), SPEC, PROMPTS, thinker="explicit", max_cot_tokens=0):
        assert found.num_steps == 0
        assert found.thought_ids == []


@pytest.mark.parametrize("thinker", ["latent", "explicit"])
def test_sampling_depends_on_seed_and_problem_only(thinker):
    model, spec = model_of("llama"), dataclasses.replace(SPEC, noise_scale=1.0, min_latents=3)
    sampling = Sampling(temperature=1.0, top_p=0.9, latent_noise=True, seed=5)
    options = {"thinker": thinker, "max_cot_tokens": 6}
    whole = generate(model, spec, PROMPTS, sampling=sampling, batch_size=4, **options)
    cut = generate(model, spec, PROMPTS, sampling=sampling, batch_size=1, **options)
    other = generate(model, spec, PROMPTS, sampling=dataclasses.replace(sampling, seed=6), **options)
    assert all(same(a, b) for a, b in zip(whole, cut, strict=True))
    assert any(not same(a, b) for a, b in zip(whole, other, strict=True))


def test_top_p_leaves_only_the_nucleus():
    """Probabilities 0.6, 0.3, 0.1: top_p 0.5 keeps the first, 0.7 the first two (the one that crosses stays)."""
    from latent_sft.inference.generate import _Noise

    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    for top_p, allowed in ((0.5, {0}), (0.7, {0, 1}), (1.0, {0, 1, 2})):
        noise = _Noise(Sampling(temperature=1.0, top_p=top_p), [0], SPEC, torch.device("cpu"))
        drawn = [noise.tokens(logits).item() for _ in range(300)]
        assert set(drawn) == allowed
    assert drawn.count(0) / 300 == pytest.approx(0.6, abs=0.09)  # three standard errors


def test_an_unknown_thinker_is_refused():
    with pytest.raises(ValueError, match="thinker must be"):
        generate(model_of("llama"), SPEC, PROMPTS, thinker="aloud")
