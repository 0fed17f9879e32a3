"""The map from hidden states to logits of any Hugging Face causal decoder; no family names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from latent_sft.models.backbone import unwrap_peft


def head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the map from hidden states `[M, D]` to logits `[M, V]`, with the family's scaling and soft-capping."""
    output = unwrap_peft(model).get_output_embeddings()
    scale, cap = head_scalars(model)

    def logits(hidden: Tensor) -> Tensor:
        out = output(hidden)
        if scale != 1.0:
            out = out * scale
        if cap is not None:
            out = torch.tanh(out / cap) * cap
        return out

    return logits


def head_scalars(model: nn.Module) -> tuple[float, float | None]:
    """Return the factor on the logits and their soft-cap (None: no cap), from the configuration."""
    config = unwrap_peft(model).config
    divide = getattr(config, "logits_scaling", None)
    times = getattr(config, "logit_scale", None)
    scale = (1.0 if times is None else times) / (1.0 if divide is None else divide)
    return scale, getattr(config, "final_logit_softcapping", None)
