"""Soft Thinking in the engine against a loop without cache or batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models.families import FAMILIES, build
from reference_thinkers import softly

from latent_sft.inference.generate import Decoded, Sampling, generate
from latent_sft.inference.solve import Thinker, solve
from latent_sft.method.types import LatentSpec, Soft

END, END2, EOS = 3, 4, 1
SPEC = LatentSpec(
    think_ids=(2,), end_think_ids=(END, END2), eos_id=EOS, pad_id=0, vocab_size=40, top_k=3, max_answer_tokens=4
)
PROMPTS = [[7, 8, 2], [9, 10, 11, 12, 13, 15, 2], [5, 2], [20, 21, 22, 23, 2], [6, 30, 2], [12, 2], [33, 17, 9, 2]]
CAP = 6
SOFT = Soft(temperature=1.5, top_k=5, top_p=0.8, min_p=0.1, cold_stop_entropy=0.0)


def model_of(family: str):
    """Return a random model that now and then writes the delimiter, a part of it, or EOS."""
    model = build(family, scale=6.0)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[[END, END2, EOS]] *= 1.5
    return model


def think(model, soft: Soft = SOFT, spec: LatentSpec = SPEC, prompts=PROMPTS, **options) -> list[Decoded]:
    return generate(model, spec, prompts, thinker="soft", mixture=soft, **{"max_cot_tokens": CAP, **options})


def assert_reference(model, soft: Soft, spec: LatentSpec, prompts: list[list[int]], found: list[Decoded]) -> None:
    for prompt, row in zip(prompts, found, strict=True):
        slow = softly(
            model,
            prompt,
            spec.end_think_ids,
            spec.eos_id,
            spec.max_answer_tokens,
            CAP,
            temperature=soft.temperature,
            top_k=soft.top_k,
            top_p=soft.top_p,
            min_p=soft.min_p,
            cold_entropy=soft.cold_stop_entropy,
            cold_steps=soft.cold_stop_steps,
        )
        assert row.thought_ids == slow.thought and row.answer_ids + [EOS] * row.finished == slow.answer, (prompt, slow)
        assert row.forward_passes == slow.passes and row.num_steps == len(slow.mixtures)
        for ids, weights, expected in zip(row.latent_ids, row.latent_weights, slow.mixtures, strict=True):
            kept = {i: w for i, w in zip(ids.tolist(), weights.tolist(), strict=True) if w > 0}
            assert kept == pytest.approx(expected, rel=1e-3, abs=1e-4)


def same(a: Decoded, b: Decoded) -> bool:
    return a.thought_ids == b.thought_ids and a.answer_ids == b.answer_ids and a.forward_passes == b.forward_passes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_refilled_slots_equals_the_reference(family):
    model = model_of(family)
    found = think(model, batch_size=3)
    assert_reference(model, SOFT, SPEC, PROMPTS, found)
    assert all(same(a, b) for a, b in zip(found, think(model, batch_size=7), strict=True))


@pytest.mark.parametrize("delimiter", [(END,), (END, END2), (END, END, END2)])
def test_delimiters_of_one_and_of_several_tokens(delimiter):
    spec = dataclasses.replace(SPEC, end_think_ids=delimiter)
    models = [build("llama", seed=seed, scale=6.0) for seed in (4, 6, 7)]
    ends = set()
    for model in models:
        with torch.no_grad():
            model.lm_head.weight[sorted(set(delimiter))] *= 4
        found = think(model, spec=spec, batch_size=3)
        assert_reference(model, SOFT, spec, PROMPTS, found)
        ends |= {d.num_steps < CAP and bool(d.answer_ids or d.finished) for d in found}
    assert ends == {True, False}, "thinking that always or never ends by itself shows little"


@pytest.mark.parametrize("delimiter", [(END,), (END, END2)])
@pytest.mark.parametrize("family", ["llama", "gemma", "granite"])
def test_mixtures_of_one_token_are_greedy_decoding(family, delimiter):
    model, spec = model_of(family), dataclasses.replace(SPEC, end_think_ids=delimiter)
    found = think(model, dataclasses.replace(SOFT, top_k=1), spec, batch_size=3)
    greedy = generate(model, spec, PROMPTS, thinker="explicit", max_cot_tokens=CAP, batch_size=2)
    for a, b in zip(found, greedy, strict=True):
        assert same(a, b) and (a.num_steps, a.finished) == (b.num_steps, b.finished)
    narrow = think(model, dataclasses.replace(SOFT, top_p=1e-6), spec)  # a nucleus of one token is the same
    assert all(same(a, b) for a, b in zip(found, narrow, strict=True))


def test_mixtures_change_what_is_thought():
    model = model_of("llama")
    greedy = think(model, dataclasses.replace(SOFT, top_k=1))
    assert not all(same(a, b) for a, b in zip(think(model), greedy, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_cold_stop(steps):
    """Sure of its token for so many steps in a row, the model is told to answer."""
    model = model_of("llama")
    sharp = dataclasses.replace(SOFT, temperature=0.2)
    soft = dataclasses.replace(sharp, cold_stop_entropy=1.5, cold_stop_steps=steps)
    found = think(model, soft)
    assert_reference(model, soft, SPEC, PROMPTS, found)
    assert any(a.num_steps < b.num_steps for a, b in zip(found, think(model, sharp), strict=True)), (
        "nothing was stopped"
    )
    always = think(model, dataclasses.replace(soft, cold_stop_entropy=100.0))
    assert {d.num_steps for d in always if d.answer_ids or d.finished} == {steps - 1}


def test_noise_depends_on_seed_and_problem_only():
    model, soft = model_of("llama"), dataclasses.replace(SOFT, noise_scale=1.0)
    found, clean = think(model, soft), think(model)
    cut = think(model, soft, batch_size=2)
    assert all(same(a, b) and torch.equal(a.latent_ids, b.latent_ids) for a, b in zip(found, cut, strict=True))
    for a, b in zip(found, cut, strict=True):
        torch.testing.assert_close(a.latent_weights, b.latent_weights, rtol=1e-4, atol=1e-5)
    other = think(model, soft, sampling=Sampling(seed=7))

    def differ(some: list[Decoded], others: list[Decoded]) -> bool:
        return any(
            not torch.equal(a.latent_weights[:1], b.latent_weights[:1]) for a, b in zip(some, others, strict=True)
        )

    assert differ(found, clean) and differ(found, other)
    for a, b in zip(found, clean, strict=True):  # the first step saw the same logits: what was left out stays out
        assert torch.equal(a.latent_ids[:1], b.latent_ids[:1])
        assert torch.equal(a.latent_weights[:1] > 0, b.latent_weights[:1] > 0)
        torch.testing.assert_close(a.latent_weights.sum(-1), torch.ones(len(a.latent_weights)))


@pytest.mark.parametrize("static", [False, True])
def test_static_shapes_and_more_entries_than_the_vocabulary_has(static):
    model, soft = model_of("qwen3"), dataclasses.replace(SOFT, top_k=100, top_p=1.0, min_p=0.0)
    found = think(model, soft, static=static)
    assert_reference(model, soft, SPEC, PROMPTS, found)
    assert found[0].latent_ids.shape[1] == SPEC.vocab_size


def test_the_compiled_step_is_one_graph_for_all_steps(monkeypatch):
    inner = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, *, mode, dynamic: inner(f, backend="eager", fullgraph=True, dynamic=dynamic)
    )
    model, soft = model_of("llama"), dataclasses.replace(SOFT, cold_stop_entropy=0.01)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = think(model, soft, batch_size=3, compile=True)
    assert_reference(model, soft, SPEC, PROMPTS, found)
    torch._dynamo.reset()


def test_answers_may_be_sampled_and_solve_hands_the_settings_over():
    model, sampling = model_of("llama"), Sampling(temperature=1.0, seed=3)
    whole = think(model, sampling=sampling)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    cut = solve(Thinker("soft", model, mixture=SOFT), SPEC, rows, batch_size=2, max_cot_tokens=CAP, sampling=sampling)
    assert all(same(a, b) for a, b in zip(whole, cut, strict=True))
    assert [d.thought_ids for d in whole] == [d.thought_ids for d in think(model)], "thinking is not sampled"
    assert [d.answer_ids for d in whole] != [d.answer_ids for d in think(model)]
