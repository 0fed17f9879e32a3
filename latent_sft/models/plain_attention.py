"""What our attention functions do when they have nothing special to do, and what none of them can do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from latent_sft.errors import ConfigError
from latent_sft.method.attention import softcapped


def refuse_sinks(module: nn.Module, others: dict[str, Any], what: str) -> None:
    """Refuse a layer whose scores have additions that our attention leaves out.

    Args:
        module: the attention layer.
        others: keyword arguments it passed on.
        what: the setting, and what to do, as `key: ...{name}...`.

    Raises:
        ConfigError: it has sinks or biases.
    """
    if others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise ConfigError(what.format(name=f"{type(module).__name__} adds sinks or biases to its scores"))


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it, or written out where scores are soft-capped (Gemma 2), `[B, T, H, d]`."""
    if softcap is not None:
        out = softcapped(query, key, value, attention_mask, scaling, dropout, softcap)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
