"""From a hidden state to the next input: what thinking in hidden states adds to a causal LM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_sft.method.types import ThoughtSpec
from latent_sft.models.sharding import call_with

THOUGHTS_FILE = "thoughts.safetensors"


class Thoughts(nn.Module):
    """Projection and placeholder; M and T are in `spec`.

    They are float32 (float64 for a model in float64) beside a model in 16 bit, which would round small updates away.

    Attributes:
        spec: see ThoughtSpec.
        placeholder: `[D]`, input of a latent before its first iteration; its initial value is that of `start`.
    """

    def __init__(self, spec: ThoughtSpec, start: Tensor, inner: int = 0, dropout: float = 0.0) -> None:
        """Build it for a model.

        Args:
            spec: of the method.
            start: `[D]` embedding the placeholder starts from, such as that of `<think>`.
            inner: width of the projection; 0 is D.
            dropout: before the projection, while training.
        """
        super().__init__()
        self.spec = spec
        like: dict[str, Any] = {"dtype": torch.promote_types(start.dtype, torch.float32), "device": start.device}
        self.placeholder = nn.Parameter(start.detach().to(**like, copy=True))
        size = len(start)
        self.projection: nn.Module = nn.Identity()
        if spec.projection:
            self.projection = nn.Sequential(
                nn.Dropout(dropout),
                nn.Linear(size, inner or size, **like),
                nn.GELU(),
                nn.Linear(inner or size, size, **like),
                nn.LayerNorm(size, **like),
            )
        # what a method does not use would be a parameter without gradient
        self.placeholder.requires_grad_(not spec.sequential)
        self.projection.requires_grad_(spec.iterations > 0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the next input `[..., D]` of last hidden states `[..., D]` (after the final norm), in their dtype."""
        return self.projection(hidden.to(self.placeholder.dtype)).to(hidden.dtype)


def placeholders(thoughts: Thoughts, batch: int, count: int | None = None) -> Tensor:
    """Return the inputs `[B, M, D]` before the first iteration, also where ZeRO-3 shares the parameter out."""
    shape = (batch, thoughts.spec.num_latents if count is None else count, -1)
    return call_with(thoughts, lambda: thoughts.placeholder.expand(shape).clone())


def iterate(
    thoughts: Thoughts,
    last: Tensor,
    hidden: Tensor,
    read: Callable[[Tensor, bool], Tensor],
    spec: ThoughtSpec | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Run T iterations over all M latents at once, for training and decoding alike.

    Jacobi iterations (arXiv 2506.18582) feed a latent f of the state before it; the state of the last prompt token
    makes the first latent, which therefore never changes. With `added`, a latent is fed the placeholder plus f of its
    own state, as in a looped model.

    Args:
        thoughts: f and the placeholder.
        last: `[B, D]` hidden state of the last prompt token.
        hidden: `[B, >= M, D]` those of the M placeholders, and what follows.
        read: inputs `[B, M, D]`, whether it is the last pass -> last hidden states `[B, >= M, D]`.
        spec: M and T, where they are not those of `thoughts`.

    Returns:
        The inputs of the last pass (None for T = 0: the placeholders were pause tokens); the states `[B, M, D]` that
        say what the latents are: those that the inputs were made of or, with `added`, the last ones before each latent;
        and what the last pass returned.
    """
    spec = spec or thoughts.spec
    inputs, before, others = None, hidden, spec.num_latents - 1
    start: Tensor | None = None
    if spec.iterations:
        start = placeholders(thoughts, len(last), spec.num_latents) if spec.added else thoughts(last)[:, None]
        start = start.to(last.dtype)
    for iteration in range(spec.iterations):
        assert start is not None
        before = hidden
        if spec.added:
            inputs = start + thoughts(hidden[:, : spec.num_latents])
        else:
            inputs = torch.cat([start, thoughts(hidden[:, :others])], dim=1)
        hidden = read(inputs, iteration == spec.iterations - 1)
    before = hidden if spec.added else before
    return inputs, torch.cat([last[:, None], before[:, :others]], dim=1), hidden


def save_thoughts(thoughts: Thoughts, folder: Path) -> None:
    """Write the weights beside a model's."""
    save_file({k: v.detach().cpu().contiguous() for k, v in thoughts.state_dict().items()}, folder / THOUGHTS_FILE)


def load_thoughts(path: Path, spec: ThoughtSpec, device: torch.device) -> Thoughts:
    """Read what `save_thoughts` wrote, in its dtype; `path` is the file."""
    state = load_file(path)
    inner = len(state["projection.1.weight"]) if spec.projection else 0
    thoughts = Thoughts(spec, state["placeholder"], inner)
    thoughts.load_state_dict(state)
    return thoughts.to(device).eval()
