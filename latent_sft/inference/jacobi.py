"""All latents at once, a few times over: what happens between a prompt and its answer where T < M, or inputs are added.

    pass 1      prompt, M placeholders                  -> first inputs of the latents
    pass 2..T   the latents, each fed the state before it in the last pass, or its own plus the placeholder
    pass T+1    the latents once more, and `</think>`   -> first token of the answer

Each pass writes the keys and values of the latents over those of the one before. T = 0 is one pass over all of it: the
placeholders are pause tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latent_sft.method.thinking import Thinking
from latent_sft.method.types import Superposition
from latent_sft.models.logits import head
from latent_sft.models.thoughts import Thoughts, iterate

SAID_STATES = 256  # whose logits are computed at once


class Thought(NamedTuple):
    """What was thought.

    Attributes:
        hidden: `[n, D]` state of the last token of `</think>`, from which the answer goes on.
        inputs: `[n, M, D]` what the latents were fed in the last pass.
        states: `[n, M, D]` the states that say what they are, see `iterate`.
    """

    hidden: Tensor
    inputs: Tensor
    states: Tensor


def think_at_once(thoughts: Thoughts, embeds: Tensor, end: int, read: Callable[[Tensor, int], Tensor]) -> Thought:
    """Run the 1 + T passes.

    Args:
        thoughts: M, T, and how a state becomes an input.
        embeds: `[n, W, D]` left-padded prompts, M placeholders, `</think>`.
        end: tokens of `</think>`.
        read: `(inputs [n, Q, D], index of the first in W) -> last hidden states [n, Q, D]`; it sees what was read
            before, and forgets what stood in its place.
    """
    stop = embeds.shape[1] - end
    first = stop - thoughts.spec.num_latents

    def again(inputs: Tensor, final: bool) -> Tensor:
        inputs = inputs.to(embeds.dtype)
        return read(torch.cat([inputs, embeds[:, stop:]], dim=1) if final else inputs, first)

    hidden = read(embeds[:, :stop] if thoughts.spec.iterations else embeds, 0)
    inputs, states, hidden = iterate(thoughts, hidden[:, first - 1], hidden[:, first:], again)
    return Thought(hidden[:, -1], embeds[:, first:stop] if inputs is None else inputs, states)


def said(model: nn.Module, thinking: Thinking, states: Tensor) -> Superposition:
    """Return what the LM head makes of states `[n, M, D]`: `[n, M, K]`."""
    logits = head(model)
    parts = [thinking.said(logits(some).to(some.device)) for some in states.flatten(0, 1).split(SAID_STATES)]
    return Superposition(*(torch.cat(each).view(*states.shape[:2], -1) for each in zip(*parts, strict=True)))
