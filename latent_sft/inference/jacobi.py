"""All latents at once, a few times over (arXiv 2506.18582): what happens between a prompt and its answer where T < M.

    pass 1      prompt, M placeholders                  -> first inputs of the latents
    pass 2..T   the latents, each fed the state before it in the last pass
    pass T+1    the latents once more, and `</think>`   -> first token of the answer

The state of the last prompt token makes the first latent, which therefore never changes. Each pass writes the keys and
values of the latents over those of the one before. T = 0 is one pass over all of it: the placeholders are pause tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latent_sft.method.superposition import largest, weighted
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.logits import head
from latent_sft.models.thoughts import Thoughts

SAID_STATES = 256  # whose logits are computed at once


class Thought(NamedTuple):
    """What was thought.

    Attributes:
        hidden: `[n, D]` state of the last token of `</think>`, from which the answer goes on.
        inputs: `[n, M, D]` what the latents were fed in the last pass.
        states: `[n, M, D]` the states that these were made of (for T = 0: the states before the placeholders).
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
    num_latents, iterations = thoughts.spec.num_latents, thoughts.spec.iterations
    width = embeds.shape[1]
    first = width - end - num_latents
    hidden = read(embeds if iterations == 0 else embeds[:, : width - end], 0)
    states = hidden[:, first - 1 : first - 1 + num_latents]
    inputs = embeds[:, first : first + num_latents]
    for iteration in range(iterations):
        inputs = thoughts(states).to(embeds.dtype)
        if iteration == iterations - 1:
            hidden = read(torch.cat([inputs, embeds[:, first + num_latents :]], dim=1), first)
        else:
            hidden = read(inputs, first)
            states = torch.cat([states[:, :1], hidden[:, : num_latents - 1]], dim=1)
    return Thought(hidden[:, -1], inputs, states)


def said(model: nn.Module, spec: LatentSpec, states: Tensor) -> Superposition:
    """Return what the LM head makes of states `[n, M, D]`: the softmax `[n, M, K]` over its top-k logits."""
    logits = head(model)
    parts = []
    for some in states.flatten(0, 1).split(SAID_STATES):
        kept, ids = largest(logits(some).to(some.device), spec.top_k)
        parts.append(weighted(kept, ids, spec.decode_temperature))
    return Superposition(*(torch.cat(each).view(*states.shape[:2], -1) for each in zip(*parts, strict=True)))
