"""The engine against a loop without cache or batch, for every family: slots, windows, moves, sampling, counts."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from models.families import FAMILIES, build
from torch._dynamo.utils import counters

from latent_sft.errors import ConfigError
from latent_sft.inference import slots as engine
from latent_sft.inference.cache import SlotCache
from latent_sft.inference.generate import Decoded, Sampling, generate
from latent_sft.method.types import LatentSpec, Superposition

END, END2, EOS = 3, 4, 1
SPEC = LatentSpec(
    think_ids=(2,),
    end_think_ids=(END, END2),
    eos_id=EOS,
    pad_id=0,
    vocab_size=40,
    top_k=4,
    max_latents=4,
    max_answer_tokens=4,
)
PROMPTS = [[7, 8, 2], [9, 10, 11, 12, 13, 15, 2], [5, 2], [20, 21, 22, 23, 2], [6, 30, 2]]
MAX_COT = 5
WINDOWS = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
}


def model_of(family: str):
    """Return a random model that now and then stops thinking, and answering, by itself."""
    model = build(family, scale=6.0)
    with torch.no_grad():
        model.get_output_embeddings().weight[[END, EOS]] *= 1.5
    return model


def same(a: Decoded, b: Decoded) -> bool:
    return a.thought_ids == b.thought_ids and a.answer_ids == b.answer_ids and a.forward_passes == b.forward_passes


@torch.no_grad()
def slow(model, spec: LatentSpec, prompt: list[int], thinker: str, max_cot: int = MAX_COT) -> Decoded:
    """One problem, the whole sequence again at every step, by the model's own `forward` on plain causal inputs."""
    embed = model.get_input_embeddings()
    inputs = [embed(torch.tensor(t)) for t in prompt]

    def logits() -> torch.Tensor:
        return model(inputs_embeds=torch.stack(inputs)[None], use_cache=False).logits[0, -1]

    def write(token: int) -> int:
        inputs.append(embed(torch.tensor(token)))
        return token

    ids, weights, thought, answer, finished, ended = [], [], [], [], False, False
    while thinker == "latent" and len(ids) < spec.max_latents:
        found = logits()
        if found.argmax() == END and len(ids) >= spec.min_latents:
            break
        kept = [v for v in found.argsort(descending=True).tolist() if v != END][: spec.top_k]
        ids.append(kept)
        weights.append(torch.softmax(found[kept], 0))
        inputs.append(sum(w * embed(torch.tensor(v)) for v, w in zip(kept, weights[-1], strict=True)))
    closed = False
    while thinker == "explicit" and len(thought) < max_cot and not closed and not ended:
        thought.append(write(int(logits().argmax())))
        closed = thought[-2:] == [END, END2]
        ended = thought[-1] == EOS
    passes = len(ids) + len(thought) + (0 if closed or ended else 2)
    thought = thought[:-2] if closed else thought
    if not closed and not ended:
        write(END), write(END2)
    while len(answer) < spec.max_answer_tokens and not finished and not ended:
        answer.append(write(int(logits().argmax())))
        finished = answer[-1] == EOS
    return Decoded(
        latent_ids=torch.tensor(ids) if thinker == "latent" else None,
        latent_weights=torch.stack(weights) if ids else None,
        thought_ids=[kept[0] for kept in ids] if thinker == "latent" else thought,
        answer_ids=[t for t in answer if t != EOS],
        num_steps=len(ids) if thinker == "latent" else len(thought),
        forward_passes=passes + len(answer),
        finished=finished,
    )


def assert_slow(model, spec: LatentSpec, prompts: list[list[int]], found: list[Decoded], thinker: str) -> None:
    for prompt, row in zip(prompts, found, strict=True):
        expected = slow(model, spec, prompt, thinker)
        assert same(row, expected), (prompt, row, expected)
        assert (row.num_steps, row.finished) == (expected.num_steps, expected.finished)
        if expected.latent_weights is not None:
            assert torch.equal(row.latent_ids, expected.latent_ids)
            torch.testing.assert_close(row.latent_weights, expected.latent_weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinker", ["latent", "explicit"])
def test_refilled_slots_equal_one_problem_at_a_time(family, thinker):
    model = model_of(family)
    found = generate(model, SPEC, PROMPTS, thinker=thinker, max_cot_tokens=MAX_COT, batch_size=2)
    assert_slow(model, SPEC, PROMPTS, found, thinker)
    if not family.startswith(("gemma", "cohere")):  # tied and scaled: random ones repeat their input for ever
        assert len({tuple(d.answer_ids) for d in found}) > 1, "a model that always writes the same shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_given_latents_and_samples_equal_single_runs(family):
    model, spec = model_of(family), dataclasses.replace(SPEC, noise_scale=1.0)
    sampling = Sampling(temperature=1.0, top_p=0.9, latent_noise=True, seed=5)
    sampled = generate(model, spec, PROMPTS[:3], thinker="latent", sampling=sampling, batch_size=2)
    given = [Superposition(d.latent_ids, d.latent_weights) for d in sampled]
    found = generate(model, SPEC, PROMPTS[:3], thinker="latent", latents=given, batch_size=2)
    for i, row in enumerate(found):
        (alone,) = generate(model, SPEC, PROMPTS[i : i + 1], thinker="latent", latents=given[i : i + 1])
        assert same(row, alone)
        assert torch.equal(row.latent_ids, given[i].ids) and row.num_steps == len(given[i].ids)
    whole = generate(model, spec, PROMPTS[:3], thinker="latent", sampling=sampling, batch_size=4)
    assert all(same(a, b) for a, b in zip(sampled, whole, strict=True))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_shorter_than_the_prompts(family, static, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, WINDOWS[family])
    model = model_of(family)
    prompts = [[6 + (3 * n * i + i) % 30 for i in range(n)] + [2] for n in (9, 2, 7)]
    found = generate(model, SPEC, prompts, thinker="latent", batch_size=2, static=static)
    assert_slow(model, SPEC, prompts, found, "latent")
    model.config.sliding_window = 128  # the window matters here, or the test would show nothing
    wide = generate(model, SPEC, prompts, thinker="latent", batch_size=2)
    assert not all(same(a, b) for a, b in zip(found, wide, strict=True))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("thinker", ["latent", "explicit"])
def test_moving_growing_and_shrinking_change_nothing(static, thinker, monkeypatch):
    """Buffers of a few columns, prompts read one by one, rows of very different lengths."""
    for name, value in {"WASTE": 2, "FIRST_COLUMNS": 2, "PREFILL_TOKENS": 8}.items():
        monkeypatch.setattr(engine, name, value)
    packs, inner = [], SlotCache.repack
    monkeypatch.setattr(SlotCache, "repack", lambda self, *args: packs.append(args) or inner(self, *args))
    model, spec = model_of("llama"), dataclasses.replace(SPEC, max_latents=12, max_answer_tokens=9)
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 40) for _ in range(rng.choice([1, 2, 3, 14]))] + [2] for _ in range(12)]
    found = generate(model, spec, prompts, thinker=thinker, max_cot_tokens=MAX_COT, batch_size=5, static=static)
    assert_slow(model, spec, prompts, found, thinker)
    assert len({d.forward_passes for d in found}) > 3, "rows of one length would not need slots"
    assert any(first > 0 for _, first, _ in packs)
    if not static:
        assert any(rows is not None for rows, *_ in packs), "no slots were given up at the end"
        assert max(capacity for *_, capacity in packs) > max(map(len, prompts)) + 2, "buffers did not grow"


@pytest.mark.parametrize("thinker", ["latent", "explicit"])
def test_static_shapes_give_the_same(thinker):
    model = model_of("qwen3")
    options = {"thinker": thinker, "max_cot_tokens": MAX_COT, "batch_size": 3}
    free, fixed = (generate(model, SPEC, PROMPTS, static=static, **options) for static in (False, True))
    assert all(same(a, b) for a, b in zip(free, fixed, strict=True))


def test_the_compiled_step_is_one_graph_for_all_steps(monkeypatch):
    inner, modes = torch.compile, []

    def traced(function, *, mode, dynamic):
        modes.append(mode)
        return inner(function, backend="eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    model = model_of("llama")
    with torch._dynamo.config.patch(error_on_recompile=True):  # monkeypatch would hide the setting from later tests
        found = generate(model, SPEC, PROMPTS, thinker="latent", batch_size=3, compile=True)
    assert_slow(model, SPEC, PROMPTS, found, "latent")
    assert modes == ["reduce-overhead"]
    torch._dynamo.reset()


def test_every_number_of_slots_is_compiled(monkeypatch):
    inner = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: inner(function, backend="eager", dynamic=False))
    torch._dynamo.reset()
    counters.clear()
    model = model_of("llama")
    with torch._dynamo.config.patch(cache_size_limit=1):  # torch's own limit is 8
        for size in (2, 3):
            generate(model, SPEC, PROMPTS, thinker="latent", batch_size=size, compile=True)
    assert counters["frames"]["ok"] == 2
    torch._dynamo.reset()


def test_buffers_do_not_grow_with_the_number_of_problems(monkeypatch):
    sizes, inner = {}, SlotCache.update

    def update(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        sizes.setdefault(count, []).append(self.num_bytes())
        return out

    monkeypatch.setattr(SlotCache, "update", update)
    model = model_of("llama")
    for count in (4, 40):
        generate(model, SPEC, (PROMPTS * 10)[:count], thinker="latent", batch_size=3)
    longest = max(map(len, PROMPTS)) + SPEC.max_latents + 2 + SPEC.max_answer_tokens + engine.WASTE
    two_layers_of_two_heads_of_eight = 2 * 2 * 2 * 8 * 4
    assert max(sizes[40]) == max(sizes[4]) <= 3 * longest * two_layers_of_two_heads_of_eight


def test_the_order_of_problems_changes_nothing():
    model, order = model_of("llama"), [4, 0, 2, 1, 3]
    straight = generate(model, SPEC, PROMPTS, thinker="latent", batch_size=2)
    mixed = generate(model, SPEC, [PROMPTS[i] for i in order], thinker="latent", batch_size=2)
    assert all(same(mixed[place], straight[i]) for place, i in enumerate(order))


def test_one_long_row_does_not_keep_its_neighbours_slots_busy():
    """Once nothing is left in the queue, the model is called with fewer and fewer rows."""
    model, rows = model_of("llama"), []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: rows.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    found = generate(model, SPEC, PROMPTS, thinker="latent", batch_size=5)
    lengths = sorted((d.forward_passes for d in found), reverse=True)
    assert lengths[0] > lengths[2], "rows of one length would not show it"
    assert len(rows) == lengths[0]
    assert rows[0] == 5 and rows[-1] <= 2


def test_rows_that_are_done_do_not_leave_the_known_positions():
    """Learned positions for exactly what is fed, while a row that is done waits for one that works on."""
    model, prompts = build("gpt2", scale=6.0), [*PROMPTS, [9 + n % 20 for n in range(60)]]
    ends = generate(model, SPEC, prompts, thinker="latent")[-1].answer_ids[0]
    spec = dataclasses.replace(SPEC, eos_id=ends)  # the last problem is answered after one token
    free = generate(model, spec, prompts, thinker="latent", static=True)
    assert max(d.forward_passes for d in free) > free[-1].forward_passes
    last = len(prompts[-1]) + free[-1].forward_passes - 1  # the last token is not fed
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:last].clone())
    found = generate(model, spec, prompts, thinker="latent", static=True)
    assert all(same(a, b) for a, b in zip(found, free, strict=True))


@pytest.mark.parametrize("thinker", ["latent", "explicit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_process_goes_on_with_the_others_of_its_job(family, thinker):
    """Another one has problems for 90 steps more, beyond the buffers of this one: as many calls, the same results."""
    model, calls = model_of(family), []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    alone = generate(model, SPEC, PROMPTS, thinker=thinker, max_cot_tokens=MAX_COT)
    counts = []
    for others in (0, 90):
        calls.clear()
        left = iter([True] * others)
        found = generate(
            model,
            SPEC,
            PROMPTS,
            thinker=thinker,
            max_cot_tokens=MAX_COT,
            together=lambda busy: busy or next(left, False),  # noqa: B023
        )
        assert all(same(a, b) for a, b in zip(found, alone, strict=True))
        counts.append(len(calls))
    assert counts[1] == counts[0] + 90


def test_min_latents_hold_the_end_back_and_zero_latents_never_think():
    model = model_of("llama")
    for changes in ({"min_latents": 3}, {"max_latents": 0}, {"min_latents": 4}, {"exclude_end": False}):
        spec = dataclasses.replace(SPEC, **changes)
        found = generate(model, spec, PROMPTS, thinker="latent", batch_size=3)
        if spec.exclude_end:
            assert_slow(model, spec, PROMPTS, found, "latent")
        assert all(spec.min_latents <= d.num_steps <= spec.max_latents for d in found)


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


def test_an_answer_of_one_token_takes_the_prefill_only():
    model = model_of("llama")
    spec = dataclasses.replace(SPEC, max_answer_tokens=1)
    none = Superposition(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4))
    found = generate(model, spec, PROMPTS, thinker="latent", latents=[none] * len(PROMPTS), batch_size=2)
    assert [d.forward_passes for d in found] == [1] * len(PROMPTS)
    assert all(len(d.answer_ids) + d.finished == 1 for d in found)


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
    whole = generate(model, spec, PROMPTS, sampling=sampling, batch_size=5, **options)
    for slots in (1, 3):
        cut = generate(model, spec, PROMPTS, sampling=sampling, batch_size=slots, **options)
        assert all(same(a, b) for a, b in zip(whole, cut, strict=True))
    other = generate(model, spec, PROMPTS, sampling=dataclasses.replace(sampling, seed=6), **options)
    assert any(not same(a, b) for a, b in zip(whole, other, strict=True))


def test_progress_and_no_problems():
    model, seen = model_of("llama"), []
    generate(model, SPEC, PROMPTS, thinker="latent", batch_size=2, progress=seen.append)
    assert sum(seen) == len(PROMPTS) and len(seen) > 1
    assert generate(model, SPEC, [], thinker="latent") == []


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_the_model_is_left_as_it_was(implementation):
    """The first takes no mask, the second compiles for every shape: another one stands in for the call."""
    model = model_of("llama").train()
    model.config._attn_implementation = implementation
    found = generate(model, SPEC, PROMPTS, thinker="latent")
    assert model.training and model.config._attn_implementation == implementation
    again = generate(model_of("llama"), SPEC, PROMPTS, thinker="latent")
    assert all(same(a, b) for a, b in zip(found, again, strict=True))
    with pytest.raises(ValueError, match="prompt: got the token id 40, expected ids below 40"):
        generate(model, SPEC, [[40, 2]], thinker="latent")
    assert model.training and model.config._attn_implementation == implementation


def test_layers_of_unknown_kinds_are_refused():
    model = model_of("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM has linear_attention layers, which decoding does not know"):
        generate(model, SPEC, PROMPTS, thinker="latent")


def test_an_unknown_thinker_is_refused():
    with pytest.raises(ValueError, match="thinker must be"):
        generate(model_of("llama"), SPEC, PROMPTS, thinker="aloud")
