"""The decoding state machine on scripted logits: stop rule, limits, delimiters of several tokens, independent rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_sft.method.superposition import gumbel
from latent_sft.method.thinking import THINK, ExplicitThinking, HiddenStateThinking, LatentThinking, answer_phase
from latent_sft.method.types import LatentSpec, ThoughtSpec

EOS, END, END2, END3, X, Y, PAD, THINK_ID = range(8)
VOCAB = 8
CPU = torch.device("cpu")


def make_spec(**changes: Any) -> LatentSpec:
    settings_ = {"think_ids": (THINK_ID,), "end_think_ids": (END,), "eos_id": EOS, "pad_id": PAD, "vocab_size": VOCAB}
    return LatentSpec(**{**settings_, "top_k": 2, "max_latents": 5, "max_answer_tokens": 4, **changes})


def says(*tokens: int) -> Tensor:
    """[steps, V] logits whose most likely token is the given one at each step; the runner-up is the next id."""
    logits = torch.zeros(len(tokens), VOCAB)
    for step, token in enumerate(tokens):
        logits[step, token] = 4.0
        logits[step, (token + 1) % VOCAB] = 2.0
    return logits


class Run(NamedTuple):
    """What one row was fed: latents {id: weight}, forced and written tokens, and its phase before every step."""

    latents: list[dict[int, float]]
    tokens: list[int]
    phases: list[int]


def run(script: Tensor, spec: LatentSpec, draws: Tensor | None = None, max_tokens: int | None = None) -> list[Run]:
    """Feed `[B, steps, V]` scripted logits to the state machine (explicit thinking where `max_tokens` is given)."""
    explicit = max_tokens is not None
    thinking = ExplicitThinking(spec, CPU, max_tokens=max_tokens) if explicit else LatentThinking(spec, CPU)
    state = thinking.start([THINK] * len(script))
    done = answer_phase(spec) + 1
    rows = [Run([], [], []) for _ in script]
    for step in range(script.shape[1]):
        logits = script[:, step]
        before = state
        fed, state = thinking.step(logits, before, draws=draws)
        for b, row in enumerate(rows):
            row.phases.append(int(before.phase[b]))
            if before.phase[b] == done:
                assert state.phase[b] == done and state.num_answer[b] == before.num_answer[b]
                continue
            if max_tokens is None and state.num_steps[b] > before.num_steps[b]:
                row.latents.append(dict(zip(fed.ids[b].tolist(), fed.weights[b].tolist(), strict=True)))
            else:
                assert fed.weights[b, 0] == 1 and fed.weights[b, 1:].sum() == 0
                row.tokens.append(int(fed.ids[b, 0]))
    return rows


def test_latents_then_delimiter_then_answer() -> None:
    (row,) = run(says(X, Y, END, X, Y, EOS, X)[None], make_spec())
    assert [max(latent, key=latent.get) for latent in row.latents] == [X, Y]
    # the two largest logits are 4 and 2: weights 1 / (1 + e^-2) and its rest
    assert row.latents[0] == pytest.approx({X: 0.8807971, Y: 0.1192029})
    assert row.tokens == [END, X, Y, EOS]
    assert row.phases == [THINK, THINK, THINK, 1, 1, 1, 2]  # one delimiter token: 1 is answering, 2 done


def test_the_whole_delimiter_is_fed_whatever_the_model_says() -> None:
    (row,) = run(says(X, END, Y, Y, X, EOS)[None], make_spec(end_think_ids=(END, END2, END3)))
    assert row.tokens == [END, END2, END3, X, EOS]
    assert row.phases == [THINK, THINK, 1, 2, 3, 3]  # so many delimiter tokens fed; answering


def test_only_the_first_delimiter_token_stops() -> None:
    (row,) = run(says(END2, END3, END, X, EOS)[None], make_spec(end_think_ids=(END, END2)))
    assert len(row.latents) == 2
    assert row.tokens == [END, END2, EOS]


def test_max_latents_ends_thinking() -> None:
    (row,) = run(says(X, X, X, X, Y, EOS)[None], make_spec(max_latents=3))
    assert len(row.latents) == 3
    assert row.tokens == [END, Y, EOS]


def test_max_latents_zero_never_thinks() -> None:
    (row,) = run(says(X, Y, EOS)[None], make_spec(max_latents=0))
    assert row.latents == [] and row.tokens == [END, Y, EOS]


def test_min_latents_delays_the_stop_and_keeps_the_end_token_out() -> None:
    (row,) = run(says(END, END, END, X, EOS)[None], make_spec(min_latents=2))
    assert len(row.latents) == 2
    assert all(END not in latent for latent in row.latents)
    assert row.tokens == [END, X, EOS]


def test_answer_is_cut_at_the_limit() -> None:
    (row,) = run(says(END, X, Y, X, Y, X, Y)[None], make_spec(max_answer_tokens=4))
    assert row.tokens == [END, X, Y, X, Y]
    assert row.phases[-2:] == [2, 2]


def test_decode_temperature_flattens_the_latent() -> None:
    (row,) = run(says(X, END)[None], make_spec(decode_temperature=2.0))
    assert row.latents[0] == pytest.approx({X: 0.7310586, Y: 0.2689414})  # logits 2 and 1 after division


def test_noise_changes_weights_but_neither_ids_nor_the_stop() -> None:
    """The stop test reads the clean argmax; strong noise on the runner-up changes the mixture only."""
    script = says(X, Y, END, X, EOS)[None]
    draws = torch.tensor([[[-3.0, 3.0]]])
    (clean,), (noised,) = run(script, make_spec()), run(script, make_spec(noise_scale=1.0), draws)
    assert noised.tokens == clean.tokens
    assert [latent.keys() for latent in noised.latents] == [latent.keys() for latent in clean.latents]
    # log-odds 2 - 1.5 - 3.0 = -2.5 for the top-1
    assert noised.latents[0] == pytest.approx({X: 0.0758582, Y: 0.9241418}, rel=1e-4)


def test_explicit_thinking_ends_with_the_spelt_delimiter() -> None:
    spec = make_spec(end_think_ids=(END, END2))
    script = says(X, END, Y, END, END2, X, EOS)[None]
    (row,) = run(script, spec, max_tokens=10)
    assert row.tokens == [X, END, Y, END, END2, X, EOS]  # the lone END was text
    assert row.phases == [THINK] * 5 + [2] * 2


def test_explicit_steps_do_not_count_the_delimiter() -> None:
    spec = make_spec(end_think_ids=(END, END2))
    thinking = ExplicitThinking(spec, CPU, max_tokens=10)
    state = thinking.start([THINK])
    for logits in says(X, Y, X, END, END2):
        _fed, state = thinking.step(logits[None], state)
    assert state.num_steps.tolist() == [3]
    assert state.phase.tolist() == [answer_phase(spec)]


def test_explicit_thinking_is_closed_after_the_limit() -> None:
    (row,) = run(says(X, Y, X, X, X, Y, EOS)[None], make_spec(end_think_ids=(END, END2)), max_tokens=3)
    assert row.tokens == [X, Y, X, END, END2, Y, EOS]


def test_an_eos_while_thinking_ends_the_row_without_an_answer() -> None:
    spec = make_spec(end_think_ids=(END, END2))
    thinking = ExplicitThinking(spec, CPU, max_tokens=10)
    state = thinking.start([THINK])
    for logits in says(X, EOS):
        fed, state = thinking.step(logits[None], state)
    assert fed.ids.tolist() == [[EOS]]
    assert (state.phase.tolist(), state.num_steps.tolist(), state.num_answer.tolist()) == ([3], [2], [0])


def test_start_in_the_answer_phase() -> None:
    spec = make_spec(end_think_ids=(END, END2))
    thinking = LatentThinking(spec, CPU)
    state = thinking.start([answer_phase(spec)] * 2)
    assert state.phase.tolist() == [2, 2]
    fed, state = thinking.step(torch.stack([says(X)[0], says(EOS)[0]]), state)
    assert fed.ids[:, 0].tolist() == [X, EOS] and fed.weights.tolist() == [[1.0, 0.0]] * 2
    assert state.phase.tolist() == [2, 3] and state.num_answer.tolist() == [1, 1]


def test_given_answers_replace_the_argmax_but_not_the_stop() -> None:
    """Sampled tokens are written while answering; whether thinking stops is read from the logits themselves."""
    spec = make_spec()
    thinking = LatentThinking(spec, CPU)
    fed, state = thinking.step(says(X, X), thinking.start([THINK, 1]), answers=torch.tensor([END, Y]))
    assert fed.ids[0].tolist() == [X, Y] and fed.ids[1, 0] == Y
    assert state.phase.tolist() == [THINK, 1] and state.num_steps.tolist() == [1, 0]


class ScriptedModel:
    """A model for `reference.decode` whose logits depend only on how many inputs it has seen."""

    def __init__(self, script: Tensor) -> None:
        self.script = script

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=torch.eye(VOCAB))

    def __call__(self, inputs_embeds: Tensor, use_cache: bool) -> SimpleNamespace:
        step = inputs_embeds.shape[1] - 1  # after a prompt of one token
        return SimpleNamespace(logits=self.script[step][None, None])


@st.composite
def scripts(draw: st.DrawFn) -> tuple[Tensor, LatentSpec]:
    """Random logits of a few rows, the end tokens made likely, and random limits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    max_latents = draw(st.integers(0, 5))
    spec = make_spec(
        end_think_ids=draw(st.sampled_from([(END,), (END, END2), (END, END2, END3)])),
        top_k=draw(st.integers(1, VOCAB)),
        max_latents=max_latents,
        min_latents=draw(st.integers(0, max_latents)),
        decode_temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
        exclude_end=draw(st.booleans()),
    )
    script = torch.randn(draw(st.integers(1, 4)), 14, VOCAB, generator=generator)
    script[..., END] += 0.8
    script[..., EOS] += 0.4
    return script, spec


@settings(deadline=None, max_examples=50)
@given(scripts())
def test_every_row_of_a_batch_decodes_as_the_reference_does_alone(drawn: tuple[Tensor, LatentSpec]) -> None:
    script, spec = drawn
    for logits, row in zip(script, run(script, spec), strict=True):
        expected = reference.decode(
            ScriptedModel(logits),
            [THINK_ID],
            end_think=spec.end_think_ids,
            eos=EOS,
            top_k=spec.top_k,
            temperature=spec.decode_temperature,
            min_latents=spec.min_latents,
            max_latents=spec.max_latents,
            max_answer_tokens=spec.max_answer_tokens,
            exclude_end=spec.exclude_end,
        )
        assert len(row.latents) == len(expected.latents)
        for mine, theirs in zip(row.latents, expected.latents, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        written = [*spec.end_think_ids, *expected.answer, *([EOS] if expected.finished else [])]
        assert row.tokens == written


@settings(deadline=None, max_examples=30)
@given(scripts(), st.integers(0, 100))
def test_noise_of_one_row_does_not_touch_another(drawn: tuple[Tensor, LatentSpec], seed: int) -> None:
    script, spec = drawn
    noisy_spec = make_spec(noise_scale=1.0, top_k=spec.top_k, end_think_ids=spec.end_think_ids)
    shape = (4, len(script), spec.top_k)
    draws = gumbel(shape, torch.Generator().manual_seed(seed), torch.device("cpu"))
    together = run(script, noisy_spec, draws)
    alone = [run(script[b : b + 1], noisy_spec, draws[:, b : b + 1])[0] for b in range(len(script))]
    for mine, other in zip(alone, together, strict=True):
        assert mine.tokens == other.tokens and mine.phases == other.phases
        for latent, expected in zip(mine.latents, other.latents, strict=True):
            assert latent == pytest.approx(expected)


def two_thoughts(spec: LatentSpec) -> HiddenStateThinking:
    return HiddenStateThinking(spec, CPU, thoughts=SimpleNamespace(spec=ThoughtSpec(num_latents=2, iterations=2)))


def test_thoughts_are_of_a_fixed_number_whatever_the_model_would_say() -> None:
    """Two thoughts although the first logits say END; then the delimiter, the answer, and nothing more."""
    spec = make_spec(min_latents=0, max_latents=1)
    thinking = two_thoughts(spec)
    state = thinking.start([THINK])
    thinks, tokens, phases = [], [], []
    logits = says(END, X, Y, Y, X, EOS, X)
    for step, row in enumerate(logits):
        phases.append(int(state.phase[0]))
        before = int(state.num_steps)
        fed, state = thinking.step(row[None], state)
        thinks.append(int(state.num_steps) > before)
        if step < 2:  # what a thought says: the two largest logits are 4 and 2, and the end token is not left out
            assert fed.ids[0, 0] == row.argmax()
            assert fed.weights[0, :2].tolist() == pytest.approx([0.8807971, 0.1192029], rel=1e-5)
        else:
            assert fed.weights[0, 0] == 1
            tokens.append(int(fed.ids[0, 0]))
    assert thinks == [True, True] + [False] * 5
    assert tokens[:4] == [END, Y, X, EOS]
    assert phases == [THINK, THINK, THINK, 1, 1, 1, 2]
    assert (int(state.num_steps[0]), int(state.num_answer[0])) == (2, 3)


def test_sampled_answers_after_thoughts() -> None:
    spec = make_spec()
    thinking = two_thoughts(spec)
    fed, after = thinking.step(says(X), thinking.start([answer_phase(spec)]), answers=torch.tensor([Y]))
    assert int(fed.ids[0, 0]) == Y and int(after.num_steps[0]) == 0 and int(after.num_answer[0]) == 1
