"""Draws that belong to a problem, and tokens sampled from the nucleus."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from latent_sft.inference.noise import Noise, Sampling, sample
from latent_sft.method.soft import SoftThinking
from latent_sft.method.superposition import NOISE_DRAWS
from latent_sft.method.thinking import ExplicitThinking, LatentThinking, Thinking
from latent_sft.method.types import LatentSpec, Soft

SPEC = LatentSpec(
    think_ids=(2,), end_think_ids=(3,), eos_id=1, pad_id=0, vocab_size=9, top_k=4, noise_scale=1.0, max_latents=5
)
BOTH = Sampling(temperature=1.0, latent_noise=True, seed=5)
CPU = torch.device("cpu")


def test_a_problem_draws_the_same_wherever_it_sits():
    one, other = Noise(BOTH, 4, CPU), Noise(BOTH, 4, CPU)
    together = [one.draw([4, 7, None]) for _ in range(2)]
    alone = [other.draw([7]) for _ in range(2)]
    for (tokens, latents), (token, latent) in zip(together, alone, strict=True):
        assert tokens.shape == (3,) and latents.shape == (NOISE_DRAWS, 3, 4)
        assert torch.equal(tokens[1], token[0]) and torch.equal(latents[:, 1], latent[:, 0])
        assert tokens[0] != tokens[1]
        assert tokens[2] == 0 and not latents[:, 2].any()
    assert not torch.equal(together[0][0], together[1][0])


def test_a_forgotten_problem_begins_anew():
    noise = Noise(BOTH, 4, CPU)
    (first, _), (second, _) = noise.draw([3]), noise.draw([3])
    noise.forget(3)
    assert torch.equal(noise.draw([3])[0], first) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("sampling", "drawn"),
    [
        (None, (False, False)),
        (Sampling(), (False, False)),
        (Sampling(temperature=1.0), (True, False)),
        (Sampling(latent_noise=True), (False, True)),
        (BOTH, (True, True)),
    ],
)
def test_only_what_is_needed_is_drawn(sampling, drawn):
    def draws(thinking: Thinking) -> tuple[bool, bool]:
        noisy = sampling is not None and sampling.latent_noise
        return tuple(d is not None for d in Noise(sampling, thinking.num_draws(noisy), CPU).draw([0]))

    assert draws(LatentThinking(SPEC, CPU)) == drawn
    assert draws(ExplicitThinking(SPEC, CPU)) == (drawn[0], False)
    assert draws(LatentThinking(dataclasses.replace(SPEC, noise_scale=0.0), CPU)) == (drawn[0], False)
    assert draws(SoftThinking(SPEC, CPU, mixture=Soft(noise_scale=1.0))) == (drawn[0], True)  # by its own setting
    assert draws(SoftThinking(SPEC, CPU, mixture=Soft())) == (drawn[0], False)


def test_top_p_leaves_only_the_nucleus():
    """Probabilities 0.6, 0.3, 0.1: top_p 0.5 keeps the first, 0.7 the first two (the one that crosses stays)."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(300, 3)
    for top_p, allowed in ((0.5, {0}), (0.7, {0, 1}), (1.0, {0, 1, 2})):
        sampling = Sampling(temperature=1.0, top_p=top_p)
        drawn = sample(logits, Noise(sampling, 2, CPU).draw(range(300))[0], sampling).tolist()
        assert set(drawn) == allowed
    assert drawn.count(0) / 300 == pytest.approx(0.6, abs=0.09)  # three standard errors


def test_top_k_leaves_the_likeliest_and_top_p_counts_what_is_left():
    """Probabilities 0.5, 0.3, 0.2: of the first two, 0.625 and 0.375, top_p 0.6 keeps one and 0.7 both."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(300, 3)
    uniform = torch.linspace(0, 1 - 1e-6, 300)
    for top_k, top_p, allowed in (
        (1, 1.0, {0}),
        (2, 1.0, {0, 1}),
        (2, 0.6, {0}),
        (2, 0.7, {0, 1}),
        (9, 1.0, {0, 1, 2}),
    ):
        drawn = sample(logits, uniform, Sampling(temperature=1.0, top_p=top_p, top_k=top_k)).tolist()
        assert set(drawn) == allowed
        assert drawn.count(0) / 300 == pytest.approx(0.5 / sum([0.5, 0.3, 0.2][i] for i in allowed), abs=0.01)


def test_rows_with_settings_of_their_own_draw_what_they_draw_alone():
    ways = [Sampling(temperature=t, top_p=p, top_k=k) for t in (0.5, 1.5) for p in (1.0, 0.7) for k in (0, 3)]
    logits, uniform = torch.randn(20, len(ways) + 1, 30).mul(2), torch.rand(20, len(ways) + 1)
    noise = Noise(None, 0, CPU)
    assert noise.settings(range(3)) is None
    for number, way in enumerate(ways):
        noise.own(number, way, 0)
    assert noise.settings([77, None]) is None  # nobody in the batch is sampled
    rows = noise.settings([*range(len(ways)), 77])
    for some, numbers in zip(logits, uniform, strict=True):
        drawn = sample(some, numbers, rows).tolist()
        assert drawn == [sample(some[i : i + 1], numbers[i : i + 1], way).item() for i, way in enumerate(ways)] + [-1]


def test_temperature_sharpens():
    """Probabilities 0.8 and 0.2: at temperature 1/2 their squares, 16/17 and 1/17."""
    sampling = Sampling(temperature=0.5)
    noise = Noise(sampling, 2, CPU).draw(range(2000))[0]
    drawn = sample(torch.tensor([0.8, 0.2]).log().expand(2000, 2), noise, sampling).tolist()
    assert drawn.count(0) / 2000 == pytest.approx(16 / 17, abs=0.016)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_least_and_the_largest_number_pick_entries_of_the_nucleus(top_p):
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 0.9, float("-inf")]])
    drawn = [sample(logits, torch.tensor([u]), Sampling(temperature=0.7, top_p=top_p)) for u in (0.0, 1 - 2.0**-24)]
    assert torch.cat(drawn).tolist() == [1, 3]


def test_one_number_is_drawn_a_row_whatever_the_vocabulary(monkeypatch):
    """While rows think, no noise as wide as the vocabulary is made either."""
    asked = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: asked.append(rand(*shape, **how)) or asked[-1])
    Noise(Sampling(temperature=1.0), 0, CPU).draw(range(64))
    assert sum(drawn.numel() for drawn in asked) == 64
