"""Soft mixtures on logits whose probabilities are known, and when soft thinking ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_thinkers import mixture
from torch import Tensor

from latent_sft.method.soft import SoftThinking, mixture_of
from latent_sft.method.thinking import THINK, answer_phase
from latent_sft.method.types import LatentSpec, Soft

END, END2, EOS, PAD, X, Y, Z = 0, 1, 2, 3, 4, 5, 6
CPU = torch.device("cpu")


def make_spec(*end: int) -> LatentSpec:
    return LatentSpec(
        think_ids=(7,), end_think_ids=end or (END,), eos_id=EOS, pad_id=PAD, vocab_size=8, max_answer_tokens=2, top_k=3
    )


def logits_of(shares: dict[int, float], temperature: float = 1.0) -> Tensor:
    """Return logits whose softmax at the temperature has these probabilities; the rest share what is left."""
    rest = (1 - sum(shares.values())) / (8 - len(shares))
    return torch.tensor([[math.log(shares.get(v, rest) + 1e-30) * temperature for v in range(8)]])


def mixed(shares: dict[int, float], temperature: float = 1.0, **settings: float) -> dict[int, float]:
    options = {"top_p": 1.0, "top_k": 8, "temperature": temperature, **settings}
    soft, logits = Soft(**options), logits_of(shares, temperature)
    total = (logits / soft.temperature).logsumexp(-1, keepdim=True)
    ids, weights = mixture_of(logits, total, soft, soft.top_k)
    return {i: w for i, w in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if w > 0}


SHARES = {X: 0.5, Y: 0.25, Z: 0.15, END: 0.1}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 4}, SHARES),
        ({"top_k": 2}, {X: 2 / 3, Y: 1 / 3}),
        ({"top_k": 1}, {X: 1.0}),
        ({"top_p": 0.74}, {X: 2 / 3, Y: 1 / 3}),
        ({"top_p": 0.76}, {X: 5 / 9, Y: 2.5 / 9, Z: 1.5 / 9}),
        ({"top_p": 0.1}, {X: 1.0}),
        ({"top_k": 2, "top_p": 0.8}, {X: 2 / 3, Y: 1 / 3}),  # the mass counts in the whole distribution
        ({"min_p": 0.4}, {X: 2 / 3, Y: 1 / 3}),
        ({"min_p": 0.25, "top_p": 0.95}, {X: 5 / 9, Y: 2.5 / 9, Z: 1.5 / 9}),
    ],
)
def test_top_k_top_p_min_p_by_hand(temperature, settings, expected):
    assert mixed(SHARES, temperature, **settings) == pytest.approx(expected, rel=1e-5)


@given(
    st.lists(st.integers(-60, 60).map(lambda n: n / 10), min_size=8, max_size=8, unique=True),
    st.integers(1, 8),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
    st.floats(0.3, 3.0),
)
def test_any_mixture_equals_the_definition(values, top_k, top_p, min_p, temperature):
    soft = Soft(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.tensor([values], dtype=torch.float64)
    total = (logits / temperature).logsumexp(-1, keepdim=True)
    ids, weights = mixture_of(logits, total, soft, top_k)
    found = {i: w for i, w in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if w > 0}
    assert sum(found.values()) == pytest.approx(1)
    assert found == pytest.approx(mixture(logits[0], temperature, top_k, top_p, min_p))


def run(
    tokens: list[int], spec: LatentSpec, soft: Soft, max_tokens: int = 9
) -> tuple[list[dict[int, float]], list[int]]:
    """Feed logits that give each token 60 % of the mass in turn; return what was fed and the phases before."""
    thinking = SoftThinking(spec, CPU, mixture=soft, max_tokens=max_tokens)
    state = thinking.start([THINK])
    fed, phases = [], []
    for token in tokens:
        phases.append(int(state.phase))
        out, state = thinking.step(logits_of({token: 0.6, 7: 0.3}), state)
        fed.append({i: w for i, w in zip(out.ids[0].tolist(), out.weights[0].tolist(), strict=True) if w > 0})
    return fed, [*phases, int(state.phase)]


HALVES = Soft(temperature=1.0, top_k=2, top_p=1.0, cold_stop_entropy=0.0)
MIX = pytest.approx({X: 2 / 3, 7: 1 / 3})


def test_the_delimiter_of_one_token_ends_thinking_at_once():
    fed, phases = run([X, X, END, Y, EOS, X], make_spec(), HALVES)
    assert fed[:2] == [MIX, MIX]
    assert fed[2:5] == [{END: 1.0}, {Y: 1.0}, {EOS: 1.0}]
    assert phases == [THINK, THINK, THINK, 1, 1, 2, 2]


def test_a_delimiter_of_several_tokens_is_fed_plainly_and_ends_where_it_is_complete():
    spec = make_spec(END, END, END2)
    fed, phases = run([X, END, X, END, END, END, END2, Y], spec, HALVES)
    assert fed[0] == fed[2] == MIX
    assert [fed[i] for i in (1, 3, 4, 5, 6)] == [{END: 1.0}] * 4 + [{END2: 1.0}]
    answer = answer_phase(spec)
    assert phases == [THINK] * 7 + [answer, answer]
    assert fed[7] == {Y: 1.0}


def test_the_second_token_of_the_delimiter_alone_is_a_thought():
    fed, _ = run([END2, X], make_spec(END, END2), HALVES)
    assert fed[0] == pytest.approx({END2: 2 / 3, 7: 1 / 3})


def test_the_cap_feeds_the_delimiter():
    fed, phases = run([X, X, X, X, Y], make_spec(END, END2), HALVES, max_tokens=2)
    assert fed == [MIX, MIX, {END: 1.0}, {END2: 1.0}, {Y: 1.0}]
    assert phases[-1] == 2


def test_an_end_of_sequence_while_thinking_ends_the_row():
    _, phases = run([X, EOS], make_spec(), HALVES)
    assert phases[-1] == 2


def test_cold_stop_counts_steps_in_a_row_and_takes_the_place_of_the_last():
    """Entropy at 0.6, 0.3 and six times 1/60: 0.3065 + 0.3612 + 0.4094 = 1.0771 nats."""
    for threshold, stops in ((1.078, True), (1.076, False)):
        soft = Soft(temperature=1.0, top_k=2, top_p=1.0, cold_stop_entropy=threshold, cold_stop_steps=3)
        fed, _ = run([X, X, X, X], make_spec(), soft)
        assert fed[:2] == [MIX, MIX]
        assert (fed[2] == {END: 1.0}) is stops
    soft = Soft(temperature=1.0, top_k=2, top_p=1.0, cold_stop_entropy=1.078, cold_stop_steps=2)
    thinking = SoftThinking(make_spec(), CPU, mixture=soft, max_tokens=9)
    state = thinking.start([THINK])
    flat = torch.zeros(1, 8) + torch.tensor([[0, 0, 0, 0, 0.1, 0, 0, 0]])
    for logits, cold in ((logits_of({X: 0.6, 7: 0.3}), 1), (flat, 0), (logits_of({X: 0.6, 7: 0.3}), 1)):
        _, state = thinking.step(logits, state)
        assert int(state.cold) == cold and int(state.phase) == THINK


def test_noise_never_makes_the_end_the_heaviest_and_leaves_the_argmax_to_decide():
    spec, soft = make_spec(), Soft(temperature=1.0, top_k=2, top_p=1.0, cold_stop_entropy=0.0, noise_scale=1.0)
    draws = torch.tensor([[[-9.0, 9.0]], [[0.5, 0.0]]])  # the first would make the end token the heaviest
    logits = logits_of({X: 0.5, END: 0.4})
    thinking = SoftThinking(spec, CPU, mixture=soft, max_tokens=9)
    fed, state = thinking.step(logits, thinking.start([THINK]), draws=draws)
    assert fed.ids.tolist() == [[X, END]] and int(state.phase) == THINK
    heavy = (5 / 9 * math.exp(0.5)) ** 2, (4 / 9) ** 2  # noise_temperature is 0.5
    torch.testing.assert_close(fed.weights, torch.tensor([[heavy[0], heavy[1]]]) / sum(heavy))
