"""Requests that join and leave while others are in work, against the same requests one at a time."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from inference.test_generate import PROMPTS, SPEC, model_of, same
from inference.test_thoughts import PARALLEL, SEQUENTIAL, thoughts_of

from latent_sft.inference.cache import SlotCache
from latent_sft.inference.engine import Decoded, Engine
from latent_sft.inference.generate import Sampling, generate
from latent_sft.method.thinking import Limits
from latent_sft.method.types import Soft, Superposition

WAYS = {
    "latent": {},
    "explicit": {"max_cot_tokens": 9},
    "soft": {"max_cot_tokens": 9, "mixture": Soft(temperature=1.5, top_k=5)},
    "sequential": {"thinker": "continuous", "thoughts": SEQUENTIAL},
    "parallel": {"thinker": "continuous", "thoughts": PARALLEL},
}
LIMITS = dataclasses.replace(SPEC, max_latents=12, max_answer_tokens=9)


def options_of(way: str, model) -> dict:
    options = {"thinker": way, **WAYS[way]}
    return {**options, "thoughts": thoughts_of(model, options["thoughts"])} if "thoughts" in options else options


def served(engine: Engine, prompts: list[list[int]], rng: random.Random) -> tuple[dict[int, Decoded], set[int]]:
    """Add the prompts a few at a time while the engine runs; about one in eight is cancelled before it is done."""
    found, cancelled, waiting = {}, set(), list(prompts)
    with engine:
        while waiting or engine.busy():
            for _ in range(min(len(waiting), rng.choice([0, 0, 0, 1, 1, 6]))):
                engine.add(waiting.pop(0))
            found |= engine.step()
            if (
                open_ := sorted(set(range(len(prompts) - len(waiting))) - set(found) - cancelled)
            ) and rng.random() < 0.1:
                number = rng.choice(open_)
                assert engine.cancel(number)
                cancelled.add(number)
    return found, cancelled


@pytest.mark.parametrize(("way", "static"), [*((way, False) for way in WAYS), ("latent", True)])
def test_random_arrivals_and_cancellations_equal_one_at_a_time(way, static, monkeypatch):
    moves, inner = [], SlotCache.repack
    monkeypatch.setattr(SlotCache, "repack", lambda self, *args: moves.append(args[1]) or inner(self, *args))
    model, rng = model_of("llama"), random.Random(0)
    options = options_of(way, model)
    prompts = [[rng.randrange(5, 40) for _ in range(rng.randrange(16, 217))] + [2] for _ in range(40)]
    engine = Engine(model, LIMITS, longest=217, batch_size=8, static=static, **options)
    found, cancelled = served(engine, prompts, rng)
    assert sorted(found) == sorted(set(range(40)) - cancelled) and len(cancelled) > 2
    assert min(moves) < 0, "nothing moved to the right"
    for number, row in found.items():
        (alone,) = generate(model, LIMITS, [prompts[number]], **options)
        assert same(row, alone) and row.num_steps == alone.num_steps
    assert len({row.forward_passes for row in found.values()}) > 3 or way == "parallel"


def test_draws_belong_to_the_number_of_a_request():
    model, sampling = model_of("llama"), Sampling(temperature=1.0, latent_noise=True, seed=5)
    spec = dataclasses.replace(SPEC, noise_scale=1.0, min_latents=3)
    expected = generate(model, spec, PROMPTS, thinker="latent", sampling=sampling)
    with Engine(model, spec, thinker="latent", longest=9, batch_size=2, sampling=sampling) as engine:
        found = {}
        for number in (3, 0, 4, 1, 2):
            assert engine.add(PROMPTS[number], number=number) == number
            found |= engine.step()
        assert engine.add(PROMPTS[0]) == 5 and engine.cancel(5)
        while engine.busy():
            found |= engine.step()
    assert all(same(found[i], row) for i, row in enumerate(expected))


def test_requests_with_given_latents_share_the_batch_with_others():
    model = model_of("llama")
    own = generate(model, SPEC, PROMPTS, thinker="latent")
    with Engine(model, SPEC, thinker="latent", longest=12, batch_size=3) as engine:
        for prompt, row in zip(PROMPTS, own, strict=True):
            engine.add(prompt)
            engine.add(prompt, Superposition(row.latent_ids, row.latent_weights))
        found = {}
        while engine.busy():
            found |= engine.step()
    for i, row in enumerate(own):
        assert same(found[2 * i], row)
        assert found[2 * i + 1].answer_ids == row.answer_ids and found[2 * i + 1].num_steps == row.num_steps


def test_slots_are_as_many_as_the_load_asks_for():
    model, rows = model_of("llama"), []
    model.register_forward_pre_hook(lambda _m, _a, given: rows.append(len(given["inputs_embeds"])), with_kwargs=True)
    with Engine(model, SPEC, thinker="latent", longest=9, batch_size=6) as engine:
        for count in (1, 3, 9, 1):
            for _ in range(count):
                engine.add(PROMPTS[0])
            rows.append(f"{count} more")
            while engine.busy():
                engine.step()
    widths = [[*dict.fromkeys(part.split())] for part in " ".join(map(str, rows)).split("more")[1:]]
    # of the prompts first, then of all slots: the next power of two, or all; four times too many are given up
    assert widths == [["1", "3"], ["3", "4", "9"], ["6", "3", "1"], ["1"]]


@pytest.mark.parametrize("way", WAYS)
def test_every_request_has_sampling_and_limits_of_its_own(way):
    model = model_of("llama").double()
    options = options_of(way, model)
    if "thoughts" in options:
        options["thoughts"] = options["thoughts"].double()
    settings = [
        (None, None),
        (Sampling(temperature=1.3, seed=3), Limits(0, 2, 9)),
        (Sampling(temperature=0.9, top_p=0.8, top_k=7, seed=4), None),
        (Sampling(temperature=2.0, top_k=3, seed=3), Limits(0, 1, 2)),
        (None, Limits(2, 2, 3)),
    ]
    fixed = way in ("sequential", "parallel")  # they always think as many steps

    def alone(prompt, sampling, limits):
        spec = LIMITS
        if limits is not None:
            spec = dataclasses.replace(
                spec, min_latents=limits.least, max_latents=limits.most, max_answer_tokens=limits.answer
            )
        capped = options | ({"max_cot_tokens": limits.most} if limits and "max_cot_tokens" in options else {})
        return generate(model, spec, [prompt] * 3, sampling=sampling, **capped)[2]

    with Engine(model, LIMITS, longest=9, batch_size=3, **options) as engine:
        if fixed:
            settings = [(s, limits and limits._replace(least=0, most=4)) for s, limits in settings]
        asked = [(prompt, *own) for own in settings for prompt in PROMPTS]
        for prompt, sampling, limits in asked:
            engine.add(prompt, sampling=sampling, place=2, limits=limits)
        found = {}
        while engine.busy():
            found |= engine.step()
        with pytest.raises(ValueError, match=r"limits: got Limits\(least=0, most=99, answer=9\), expected 0 <= least"):
            engine.add(PROMPTS[0], limits=Limits(0, 99, 9))
    for number, one in enumerate(asked):
        assert same(found[number], alone(*one)), one
    assert len({tuple(row.answer_ids) for row in found.values()}) > 8


@pytest.mark.parametrize("way", WAYS)
def test_rows_in_work_are_shown_as_far_as_they_are(way):
    model, seen = model_of("llama"), {}
    with Engine(model, LIMITS, longest=9, batch_size=3, **options_of(way, model)) as engine:
        for prompt in PROMPTS:
            engine.add(prompt)
        while engine.busy():
            found = engine.step()
            shown = engine.peek(range(len(PROMPTS)))
            assert not set(shown) & set(found)
            for number, row in (shown | found).items():
                seen.setdefault(number, []).append(row)
    assert max(map(len, seen.values())) > 4
    for rows in seen.values():
        last = rows[-1]
        for row in rows:
            assert row.answer_ids == last.answer_ids[: len(row.answer_ids)]
            if row.latent_ids is not None:
                assert torch.equal(row.latent_ids, last.latent_ids[: len(row.latent_ids)])


def test_requests_that_cannot_be_served_are_refused_and_the_others_go_on():
    model = model_of("llama").train()
    given = torch.zeros(2, 32)
    with Engine(model, SPEC, thinker="latent", longest=7, batch_size=2) as engine:
        assert not model.training
        number = engine.add(PROMPTS[0])
        for prompt, latents, reason in (
            ([7] * 8, None, "got 8 tokens"),
            ([7] * 6, given, "got 8 tokens"),
            ([], None, "got 0 tokens"),
            ([7, 40, 2], None, "got the token id 40, expected ids below 40"),
        ):
            with pytest.raises(ValueError, match=reason):
                engine.add(prompt, latents)
        assert not engine.cancel(number + 1)
        found = {}
        while engine.busy():
            found |= engine.step()
        assert not engine.cancel(number)
    assert model.training
    assert same(found[number], generate(model, SPEC, PROMPTS[:1], thinker="latent")[0])
    parallel = Engine(model, SPEC, longest=7, batch_size=2, **options_of("parallel", model))
    with pytest.raises(ValueError, match="cannot be given where they are thought at once"):
        parallel.add(PROMPTS[0], given)
