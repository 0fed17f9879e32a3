"""Thinking inside an engine that decodes tokens: what each row is fed and what it says, by its place in its output.

Such an engine asks for one token per row and step and embeds that token for the next one. A row that thinks gives it
a token that stands for what it thought, and everything else is kept here: with n tokens put out so far, a row is in
state n, and token n is fed as embedding n. The engine may compute any place again, in pieces or in another batch, since
nothing here counts steps. Before the answer a row puts out at most

    the tokens of <think> that its prompt lacks, its latents, the tokens of </think>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_sft.method.superposition import combine
from latent_sft.method.thinking import THINK, Thinking, ThinkState, answer_phase
from latent_sft.method.types import Superposition


class Said(NamedTuple):
    """What rows say in place of what the engine would sample: ids `[B]`, where `forced` `[B]`."""

    ids: Tensor
    forced: Tensor


class Rows:
    """The thoughts of R rows, each of `width` places and one more that is written where nothing is to be kept.

    Attributes:
        thinking: how rows think.
        embed: ids `[N]` -> input embeddings `[N, D]`, by the engine's own module.
        width: most tokens before the answer.
        embeds: `[R, width + 1, D]` what is fed at each place.
        states: of each row at each place, fields `[R, width + 2, ...]`; all begin with the same.
        missing: `[R]` tokens of `<think>` that the prompt lacks.
        shown: `[R]` whether the row says the first token of each latent, or the placeholder.
    """

    def __init__(
        self, thinking: Thinking, embed: Callable[[Tensor], Tensor], count: int, size: int, dtype: torch.dtype
    ) -> None:
        """Make room for `count` rows of embeddings of `size` entries."""
        spec, device = thinking.spec, thinking.device
        self.thinking, self.embed = thinking, embed
        self.width = len(spec.think_ids) + thinking.most_steps + len(spec.end_think_ids)
        self.embeds = torch.zeros(count, self.width + 1, size, dtype=dtype, device=device)
        start = thinking.start([THINK])
        self.states = ThinkState(
            *(f[:, None].expand(count, self.width + 2, *f.shape[1:]).clone() for f in start)  # fields may share memory
        )
        self.missing = torch.zeros(count, dtype=torch.long, device=device)
        self.shown = torch.ones(count, dtype=torch.bool, device=device)
        self.opening = torch.tensor(spec.think_ids, device=device)

    def open(self, row: int, prompt: Sequence[int], shown: bool) -> None:
        """Give a row to a request; the tokens of `<think>` that its prompt does not end with are put out first."""
        think = self.thinking.spec.think_ids
        there = next(n for n in range(len(think), -1, -1) if n == 0 or tuple(prompt[-n:]) == think[:n])
        self.missing[row] = len(think) - there
        self.shown[row] = shown

    def inputs(self, ids: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        """Return the input embeddings `[N, D]` of tokens `[N]`, at places `[N]` of their rows' output (< 0: prompt)."""
        kept = place.clamp(0, self.width)
        thought = (
            (place >= 0) & (place < self.width) & (self.states.phase[rows, kept] < answer_phase(self.thinking.spec))
        )
        return torch.where(thought[:, None], self.embeds[rows, kept], self.embed(ids))

    def think(self, logits: Tensor, rows: Tensor, place: Tensor, ready: Tensor, hidden: Tensor | None) -> Said:
        """Choose what rows are fed next, and keep it.

        Args:
            logits: `[B, V]` after the last token of each row.
            rows: `[B]`, all different.
            place: `[B]` tokens that each row has put out so far.
            ready: `[B]` whether all tokens so far were read; rows that are not stay as they are.
            hidden: `[B, D]` last hidden states; needed where thoughts are such states.

        Returns:
            What the rows say that do not answer.
        """
        thinking, spec = self.thinking, self.thinking.spec
        here = place.clamp(0, self.width)
        state = ThinkState(*(f[rows, here] for f in self.states))
        fed, after = thinking.step(logits, state)
        missing = self.missing[rows]
        opens = place < missing
        opener = self.opening[(len(self.opening) - missing + place).clamp(0, len(self.opening) - 1)]
        fed = Superposition(
            torch.where(opens[:, None], opener[:, None], fed.ids),
            torch.where(opens[:, None], thinking.one, fed.weights),
        )
        after = ThinkState(*(torch.where(_beside(opens, a), s, a) for a, s in zip(after, state, strict=True)))
        vector = self._mixed(fed)
        if thinking.thoughts is not None:
            assert hidden is not None
            thinks = after.num_steps > state.num_steps
            vector = torch.where(thinks[:, None], thinking.thoughts(hidden).to(vector.dtype), vector)
        forced = (place < self.width) & (state.phase < answer_phase(spec))
        kept = torch.where(forced & ready, place, self.width)
        self.embeds[rows, kept] = vector.to(self.embeds.dtype)
        following = torch.where(ready & (place < self.width), place + 1, self.width + 1)
        for own, new in zip(self.states, after, strict=True):
            own[rows, following] = new
        return Said(self._words(fed, state, after, opens, self.shown[rows]), forced)

    def _mixed(self, fed: Superposition) -> Tensor:
        count, width = fed.ids.shape
        if width == self.thinking.spec.vocab_size:  # every embedding once, not once for every row
            dense = torch.zeros_like(fed.weights).scatter_add(-1, fed.ids, fed.weights)
            table = self.embed(torch.arange(width, device=fed.ids.device))
            return dense.to(table.dtype) @ table
        return combine(self.embed(fed.ids.flatten()).view(count, width, -1), fed.weights)

    def _words(self, fed: Superposition, state: ThinkState, after: ThinkState, opens: Tensor, shown: Tensor) -> Tensor:
        """Return the token `[B]` that stands for what is fed: for a latent its first, or the placeholder.

        A latent may hold tokens that mean something to the engine or to who reads its output: EOS, `</think>`.
        """
        spec, words = self.thinking.spec, fed.ids[:, 0]
        latent = (state.phase == THINK) & (after.phase == THINK) & ~opens
        mixed = fed.weights[:, 0] < 1
        means = (words == spec.eos_id) | (mixed & (words == spec.end_think_ids[0]))
        return torch.where(latent & (means | ~shown), spec.think_ids[-1], words)


def _beside(mask: Tensor, field: Tensor) -> Tensor:
    return mask if field.dim() == 1 else mask[:, None]
