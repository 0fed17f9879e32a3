"""How long the batches of Coconut, CODI, PCCoT and KaVa get; the parts are those of `data.thought_batches`.

Counted are the positions that the passes go over, those of the latents once a pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_sft.config.methods import CoconutConfig
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.train.lengths import count_tokens
from latent_sft.train.sampler import Lengths


def distill_lengths(data: Any, spec: LatentSpec, thought_spec: ThoughtSpec) -> Lengths:
    """Lengths of `[P]`, the passes over M latents, `[E, A]` and `[C, E, A]`, with the whole CoT as an upper bound."""
    prompt, cot, answer = (count_tokens(data, column) for column in ("prompt", "cot", "answer"))
    # one at a time: M passes over one; at once: T passes over M, after the placeholders
    passes = 1 if thought_spec.sequential else thought_spec.iterations + 1
    fixed = passes * thought_spec.num_latents
    tail = len(spec.end_think_ids)
    parts = torch.stack([prompt, tail + answer, cot + tail + answer], dim=1)
    return Lengths(parts, lambda parts: parts.sum(-1) + fixed)


def coconut_lengths(data: Any, spec: LatentSpec, config: CoconutConfig) -> Lengths:
    """Lengths of `[P]`, the latents and `[C, E, A]`, with all latents and the whole CoT as an upper bound."""
    prompt, cot, answer = (count_tokens(data, column) for column in ("prompt", "cot", "answer"))
    parts = torch.stack([prompt, cot + len(spec.end_think_ids) + answer], dim=1)

    def width(parts: Tensor) -> Tensor:
        return parts.sum(-1) + config.num_latents

    return Lengths(parts, width)
