"""Thoughts in hidden states, one after another and all at once, against a loop without cache or batch."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from models.families import FAMILIES, build
from reference_thinkers import Solved, all_at_once, one_after_another, projected
from torch import Tensor

from latent_sft.inference import slots as engine
from latent_sft.inference.cache import SlotCache
from latent_sft.inference.generate import Decoded, Sampling, generate
from latent_sft.inference.solve import Thinker, solve
from latent_sft.method.types import LatentSpec, Superposition, ThoughtSpec
from latent_sft.models.thoughts import Thoughts

END, END2, EOS = 3, 4, 1
SPEC = LatentSpec(
    think_ids=(2,),
    end_think_ids=(END, END2),
    eos_id=EOS,
    pad_id=0,
    vocab_size=40,
    top_k=4,
    decode_temperature=2.0,
    max_latents=2,  # does not count for thoughts of a fixed number
    max_answer_tokens=4,
)
PROMPTS = [[7, 8, 2], [9, 10, 11, 12, 13, 15, 2], [5, 2], [20, 21, 22, 23, 2], [2]]
M = 4
SEQUENTIAL, PARALLEL, PAUSES = (ThoughtSpec(num_latents=M, iterations=t, projection=True) for t in (M, 2, 0))
EVERY = pytest.mark.parametrize("spec", [SEQUENTIAL, PARALLEL, PAUSES], ids=["sequential", "parallel", "pauses"])


def model_of(family: str):
    """Return a random model that now and then stops answering by itself."""
    model = build(family, scale=6.0)
    with torch.no_grad():
        model.get_output_embeddings().weight[[END, EOS]] *= 1.5
    return model


def thoughts_of(model, spec: ThoughtSpec, seed: int = 0) -> Thoughts:
    """Return random weights that make inputs of about the size of embeddings."""
    torch.manual_seed(seed)
    size = model.get_input_embeddings().weight.shape[1]
    thoughts = Thoughts(spec, torch.randn(size))
    with torch.no_grad():
        for parameter in thoughts.projection.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return thoughts


def reference(model, thoughts: Thoughts, prompt: list[int], spec: LatentSpec = SPEC) -> Solved:
    weights, own = {k: v.detach() for k, v in thoughts.state_dict().items()}, thoughts.spec
    rest = prompt, spec.end_think_ids, spec.eos_id, spec.max_answer_tokens

    def f(hidden: Tensor) -> Tensor:
        return projected(weights, hidden)

    if own.iterations >= own.num_latents:
        return one_after_another(model, f, own.num_latents, *rest)
    return all_at_once(model, f, weights["placeholder"], own.num_latents, own.iterations, *rest)


def assert_reference(model, thoughts: Thoughts, prompts: list[list[int]], found: list[Decoded]) -> None:
    for prompt, row in zip(prompts, found, strict=True):
        slow = reference(model, thoughts, prompt)
        assert row.answer_ids + [EOS] * row.finished == slow.answer, (prompt, row, slow)
        assert row.forward_passes == slow.passes
        assert row.num_steps == len(slow.inputs)
        torch.testing.assert_close(row.latent_embeds, torch.stack(slow.inputs), rtol=1e-4, atol=1e-4)
        assert row.latent_embeds.dtype == torch.float32
        for ids, weights, logits in zip(row.latent_ids, row.latent_weights, slow.said, strict=True):
            assert ids.tolist() == logits.argsort(descending=True)[: SPEC.top_k].tolist()
            torch.testing.assert_close(weights, torch.softmax(logits[ids] / 2.0, 0), rtol=1e-3, atol=1e-4)
        assert row.thought_ids == row.latent_ids[:, 0].tolist()


def same(a: Decoded, b: Decoded) -> bool:
    return a.answer_ids == b.answer_ids and a.finished == b.finished and a.thought_ids == b.thought_ids


def think(model, thoughts: Thoughts, prompts=PROMPTS, **options) -> list[Decoded]:
    return generate(model, SPEC, prompts, thinker="continuous", thoughts=thoughts, **options)


@EVERY
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_refilled_slots_equals_the_reference(family, spec):
    model = model_of(family)
    thoughts = thoughts_of(model, spec)
    found = think(model, thoughts, batch_size=2)
    assert_reference(model, thoughts, PROMPTS, found)
    assert all(same(a, b) for a, b in zip(found, think(model, thoughts, batch_size=5), strict=True))
    if not family.startswith(("gemma", "cohere")):  # tied and scaled: random ones repeat their input for ever
        assert len({tuple(d.answer_ids) for d in found}) > 1, "a model that always writes the same shows nothing"


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 9])
def test_every_number_of_iterations_with_and_without_projection(iterations):
    model = model_of("llama")
    for projection in (False, True):
        thoughts = thoughts_of(model, ThoughtSpec(num_latents=M, iterations=iterations, projection=projection))
        assert_reference(model, thoughts, PROMPTS, think(model, thoughts, batch_size=3))


def test_as_many_iterations_as_latents_are_the_sequential_thoughts(monkeypatch):
    model = model_of("qwen3")
    thoughts = thoughts_of(model, SEQUENTIAL)
    one_by_one = think(model, thoughts)
    monkeypatch.setattr(ThoughtSpec, "sequential", property(lambda self: False))
    at_once = think(model, thoughts)
    for a, b in zip(one_by_one, at_once, strict=True):
        assert same(a, b)
        torch.testing.assert_close(a.latent_embeds, b.latent_embeds, rtol=1e-4, atol=1e-4)
        # M + E steps after the prefill against T passes, the last of which writes the first answer token
        assert a.forward_passes - b.forward_passes == M + 2 - M
    fewer = think(model, thoughts_of(model, dataclasses.replace(SEQUENTIAL, iterations=M - 1)))
    assert any(not torch.allclose(a.latent_embeds, b.latent_embeds) for a, b in zip(one_by_one, fewer, strict=True))


def test_no_iterations_are_pause_tokens():
    """The placeholders as given embeddings give the same answers, and a plain pass over token ids does too."""
    model = model_of("llama")
    thoughts = thoughts_of(model, PAUSES)
    found = think(model, thoughts)
    given = [thoughts.placeholder.detach().clone().expand(M, -1)] * len(PROMPTS)
    again = generate(model, SPEC, PROMPTS, thinker="continuous", latents=given)
    pause = 30
    with torch.no_grad():
        thoughts.placeholder.copy_(model.get_input_embeddings().weight[pause])
    tokens = [prompt + [pause] * M for prompt in PROMPTS]
    written = generate(model, SPEC, tokens, thinker="explicit", max_cot_tokens=0)
    for a, b in zip(found, again, strict=True):
        assert a.answer_ids == b.answer_ids and a.forward_passes == b.forward_passes
        assert torch.equal(a.latent_embeds, b.latent_embeds)
    assert [d.answer_ids for d in think(model, thoughts)] == [d.answer_ids for d in written]


@EVERY
def test_a_batch_equals_single_problems_to_float_noise(spec):
    model = model_of("qwen2")
    thoughts = thoughts_of(model, spec)
    for prompt, row in zip(PROMPTS, think(model, thoughts, batch_size=5), strict=True):
        (alone,) = think(model, thoughts, [prompt])
        assert same(row, alone) and row.forward_passes == alone.forward_passes
        torch.testing.assert_close(row.latent_embeds, alone.latent_embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(row.latent_weights, alone.latent_weights, rtol=1e-4, atol=1e-5)


@EVERY
def test_counted_passes_are_calls_of_the_model(spec):
    model, calls = model_of("llama"), []
    thoughts = thoughts_of(model, spec)
    model.model.register_forward_hook(lambda *_: calls.append(1))
    (row,) = think(model, thoughts, PROMPTS[1:2])
    assert row.forward_passes == len(calls)
    written = len(row.answer_ids) + row.finished
    before_the_answer = {M: 1 + M + 2, 2: 1 + 2, 0: 1}[spec.iterations]
    assert row.forward_passes == before_the_answer + written - 1


def test_logits_of_a_step_are_computed_once(monkeypatch):
    model, heads = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: heads.append(inputs[0].shape))
    (row,) = think(model, thoughts_of(model, SEQUENTIAL), PROMPTS[1:2])
    assert len(heads) == row.forward_passes
    assert {shape[0] for shape in heads} == {1}, "logits where none are needed"


@EVERY
@pytest.mark.parametrize("static", [False, True])
def test_moving_growing_and_shrinking_change_nothing(spec, static, monkeypatch):
    for name, value in {"WASTE": 2, "FIRST_COLUMNS": 2, "PREFILL_TOKENS": 24}.items():
        monkeypatch.setattr(engine, name, value)
    packs, inner = [], SlotCache.repack
    monkeypatch.setattr(SlotCache, "repack", lambda self, *args: packs.append(args) or inner(self, *args))
    model, rng = model_of("llama"), random.Random(0)
    prompts = [[rng.randrange(5, 40) for _ in range(rng.choice([1, 2, 3, 14]))] + [2] for _ in range(12)]
    thoughts = thoughts_of(model, spec)
    found = think(model, thoughts, prompts, batch_size=5, static=static)
    assert_reference(model, thoughts, prompts, found)
    assert spec is PAUSES or any(first > 0 for _, first, _ in packs)


WINDOWS = {
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}


@EVERY
@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows(family, spec, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, WINDOWS[family])
    model = model_of(family)
    thoughts = thoughts_of(model, spec)
    prompts = [[6 + (3 * n * i + i) % 30 for i in range(n)] + [2] for n in (9, 2, 7)]
    assert_reference(model, thoughts, prompts, think(model, thoughts, prompts, batch_size=2))


@pytest.mark.parametrize("spec", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_the_compiled_step_is_one_graph_for_all_steps(spec, monkeypatch):
    inner = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, *, mode, dynamic: inner(f, backend="eager", fullgraph=True, dynamic=dynamic)
    )
    model = model_of("llama")
    thoughts = thoughts_of(model, spec)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = think(model, thoughts, batch_size=3, compile=True)
    assert_reference(model, thoughts, PROMPTS, found)
    torch._dynamo.reset()


@EVERY
def test_sampled_answers_depend_on_seed_and_problem_only(spec):
    model = model_of("llama")
    thoughts, sampling = thoughts_of(model, spec), Sampling(temperature=1.0, top_p=0.9, latent_noise=True, seed=5)
    whole = think(model, thoughts, sampling=sampling, batch_size=5)
    cut = think(model, thoughts, sampling=sampling, batch_size=2)
    assert all(same(a, b) for a, b in zip(whole, cut, strict=True))
    other = think(model, thoughts, sampling=dataclasses.replace(sampling, seed=6))
    assert any(a.answer_ids != b.answer_ids for a, b in zip(whole, other, strict=True))
    for a, b in zip(whole, other, strict=True):  # hidden states have no noise
        torch.testing.assert_close(a.latent_embeds, b.latent_embeds)


@EVERY
def test_given_embeddings_repeat_what_was_thought(spec):
    model = model_of("llama")
    own = think(model, thoughts_of(model, spec))
    again = generate(model, SPEC, PROMPTS, thinker="continuous", latents=[d.latent_embeds for d in own], batch_size=2)
    for a, b in zip(own, again, strict=True):
        assert a.answer_ids == b.answer_ids and b.num_steps == M
        assert b.latent_ids is None and b.thought_ids == []
        assert torch.equal(a.latent_embeds, b.latent_embeds)
        assert b.forward_passes == len(b.answer_ids) + b.finished


def test_given_embeddings_of_any_number_equal_single_runs_and_mixtures():
    model = model_of("llama")
    table, size = model.get_input_embeddings().weight.detach(), 32
    given = [torch.randn(n, size, generator=torch.Generator().manual_seed(n)) for n in (0, 3, 1, 5, 2)]
    found = generate(model, SPEC, PROMPTS, thinker="latent", latents=given, batch_size=2)
    for prompt, embeds, row in zip(PROMPTS, given, found, strict=True):
        (alone,) = generate(model, SPEC, [prompt], thinker="explicit", latents=[embeds])
        assert same(row, alone) and row.num_steps == len(embeds)
    none = generate(model, SPEC, PROMPTS[:1], thinker="explicit", max_cot_tokens=0)
    assert found[0].answer_ids == none[0].answer_ids
    mixed = Superposition(torch.tensor([[7, 9]]), torch.tensor([[0.25, 0.75]]))
    as_embeds = (0.25 * table[7] + 0.75 * table[9])[None]
    a, b = generate(model, SPEC, PROMPTS[:1] * 2, thinker="latent", latents=[mixed, as_embeds])
    assert a.answer_ids == b.answer_ids


def test_the_modules_are_left_as_they_were():
    model = model_of("llama").train()
    thoughts = Thoughts(PARALLEL, torch.ones(32), dropout=0.9).train()
    first, again = think(model, thoughts), think(model, thoughts)
    assert all(same(a, b) for a, b in zip(first, again, strict=True)), "dropout while decoding"
    assert thoughts.training and model.training


def test_settings_that_are_missing_are_named():
    model = model_of("llama")
    with pytest.raises(ValueError, match="thinker 'continuous' needs its settings"):
        generate(model, SPEC, PROMPTS, thinker="continuous")
    with pytest.raises(ValueError, match="thinker 'soft' needs its settings"):
        generate(model, SPEC, PROMPTS, thinker="soft")


def test_solve_hands_over_thoughts_and_latents():
    model = model_of("llama")
    thoughts = thoughts_of(model, PARALLEL)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    options = {"batch_size": 2, "max_cot_tokens": 3}
    found = solve(Thinker("continuous", model, thoughts), SPEC, rows, **options)
    assert all(same(a, b) for a, b in zip(found, think(model, thoughts), strict=True))
    given = [d.latent_embeds for d in found]
    again = solve(Thinker("continuous", model), SPEC, rows, latents=given, **options)
    assert [d.answer_ids for d in again] == [d.answer_ids for d in found]
