"""From a hidden state to the next input: what thinking in hidden states adds to a causal LM."""

from __future__ import annotations

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


def placeholders(thoughts: Thoughts, batch: int) -> Tensor:
    """Return the inputs `[B, M, D]` before the first iteration, also where ZeRO-3 shares the parameter out."""
    shape = (batch, thoughts.spec.num_latents, -1)
    return call_with(thoughts, lambda: thoughts.placeholder.expand(shape).clone())


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
