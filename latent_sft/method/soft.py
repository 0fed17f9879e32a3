"""Soft Thinking (arXiv 2505.15778): a model that learned to write its CoT is fed mixtures of tokens instead.

A step of thinking is explicit thinking (`thinking.ExplicitThinking`) but for what is fed: the likeliest tokens,
weighted by their probabilities. When thinking ends is decided on the likeliest token without noise, as if it had been
written. The published code knows delimiters of one token only and stops at that token. A delimiter of several is
followed here: a token that goes on spelling it is fed as itself and not as a mixture, and thinking ends when all of it
was spelled; where the model turns away half-way, thinking goes on in mixtures. So with mixtures of one token every
delimiter ends thinking exactly where it does in explicit decoding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latent_sft.method.superposition import largest, perturb
from latent_sft.method.thinking import THINK, Thinking, ThinkState, answer_phase
from latent_sft.method.types import Soft, Superposition


class SoftThinking(Thinking):
    """The likeliest tokens, weighted by their probabilities, are fed back.

    Thinking ends where the delimiter is spelled, at the cap, and by cold stop: when the entropy was below the threshold
    for so many steps in a row, the delimiter is fed in place of the last of them. An EOS as the likeliest token ends
    the row without an answer.
    """

    title = "mixtures of tokens"
    needs = "mixture"

    def _prepare(self, thoughts: Any, mixture: Any) -> None:
        assert isinstance(mixture, Soft)
        self.soft, self.kept = mixture, min(mixture.top_k, self.spec.vocab_size)

    def num_draws(self, noise: bool) -> int:
        """Return K where the mixtures' own settings ask for noise."""
        return self.kept if self.soft.noise_scale > 0 else 0

    def step(
        self, logits: Tensor, state: ThinkState, answers: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Superposition, ThinkState]:
        """See `Thinking.step`."""
        soft = self.soft
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / soft.temperature
        total = scaled.logsumexp(-1, keepdim=True)
        mixture = mixture_of(logits, total, soft, self.kept)
        top = mixture.ids[:, 0]
        thinking = state.phase == THINK
        continues = thinking & (state.num_steps < state.most)
        if soft.cold_stop_entropy > 0:
            nats = torch.special.entr((scaled - total).exp()).sum(-1)
            state = state._replace(cold=torch.where(nats < soft.cold_stop_entropy, state.cold + 1, 0))
            continues = continues & (state.cold < soft.cold_stop_steps)
        if draws is not None:
            mixture = _noisy(mixture, draws, soft, self.spec.end_think_ids[0])
        token, after = self._spelled(thinking, continues, top, state, self._chosen(top, answers))
        spells = _spells(after.recent, self.tokens[: answer_phase(self.spec)])
        return self._mixed(continues & ~spells, mixture, token), after


def mixture_of(logits: Tensor, total: Tensor, soft: Soft, kept: int) -> Superposition:
    """Return the tokens of the nucleus, at most `kept`, with their probabilities; weight 0 where a token is left out.

    Args:
        logits: `[B, V]`.
        total: `[B, 1]` logsumexp of the logits over the temperature.
        soft: settings.
        kept: K.

    Returns:
        Ids `[B, K]`, likeliest first, and weights `[B, K]` that sum to one.
    """
    values, ids = largest(logits, kept)
    shares = (values.to(total.dtype) / soft.temperature - total).exp()
    inside = shares.cumsum(-1) - shares < soft.top_p  # the token that crosses the mass stays
    inside = inside & (shares >= soft.min_p * shares[:, :1])
    weights = torch.where(inside, shares, 0)
    return Superposition(ids, weights / weights.sum(-1, keepdim=True))


def _noisy(mixture: Superposition, draws: Tensor, soft: Soft, end_id: int) -> Superposition:
    """Return the mixture with noise on its weights; tokens that were left out stay so."""
    anywhere = (-math.inf, math.inf)
    noisy = perturb(
        mixture, draws, scale=soft.noise_scale, temperature=soft.noise_temperature, clip=anywhere, end_id=end_id
    )
    weights = torch.where(mixture.weights > 0, noisy.weights, 0)
    return Superposition(mixture.ids, weights / weights.sum(-1, keepdim=True))


def _spells(recent: Tensor, delimiter: Tensor) -> Tensor:
    """Return `[B]` whether the last of the tokens `[B, E]` make up a beginning of the delimiter `[E]`."""
    length = len(delimiter)
    found = [(recent[:, length - n :] == delimiter[:n]).all(-1) for n in range(1, length + 1)]
    return torch.stack(found).any(0)
