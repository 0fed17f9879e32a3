"""Causal attention within each row of a packed batch (`latent_sft.data.packing`), for any Hugging Face decoder.

Queries, keys and values are put back into padded rows, attended to causally by SDPA, and packed again. Padding stands
behind its row, so nothing real sees it, and no mask over the packed sequence exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from latent_sft.errors import ConfigError
from latent_sft.method.attention import softcapped
from latent_sft.models.backbone import core, hidden_states
from latent_sft.models.plain_attention import plain_attention, refuse_sinks

PACKED = "latent_sft_packed"


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface; without `rows` (decoding) it is plain SDPA."""
    refuse_sinks(module, others, "packing: {name}, which packed attention does not have; set packing=false.")
    if rows is None:
        return plain_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, others)
    slots, place = rows
    padded = [states[0][:, slots].transpose(0, 1) for states in (query, key, value)]  # [B, H, T, d]
    mask = None
    if sliding_window is not None and slots.shape[1] > sliding_window:
        ones = torch.ones(slots.shape[1], slots.shape[1], dtype=torch.bool, device=slots.device)
        mask = (ones.tril() & ones.triu(1 - sliding_window))[None, None]
    if softcap is not None:
        out = softcapped(*padded, mask, scaling, dropout, softcap)
    else:
        out = scaled_dot_product_attention(
            *padded,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.transpose(1, 2).flatten(0, 1)[place][None], None


AttentionInterface.register(PACKED, _forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def use_packing(model: nn.Module) -> None:
    """Prepare a causal LM for packed batches; other batches and decoding work as before.

    Raises:
        ConfigError: the model's attention does not go through transformers' interface.
    """
    lm = core(model)
    if not getattr(lm, "_supports_attention_backend", False):
        raise ConfigError(
            f"packing: {type(lm).__name__} does not use transformers' attention interface; set packing=false."
        )
    lm.set_attn_implementation(PACKED)


def row_states(model: nn.Module, embeds: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return hidden states of plain causal rows, `[B, T, D]`, or `[1, S, D]` where the batch is packed.

    Args:
        model: causal LM, prepared by `use_packing` where batches are packed.
        embeds: input embeddings, of the same shape.
        batch: of `explicit_batch` or `stage2_batch`, or what `packed` makes of it.
    """
    if "row_slots" not in batch:
        return hidden_states(model, embeds)
    if core(model).config._attn_implementation != PACKED:
        raise RuntimeError("a packed batch needs a model prepared by use_packing")
    # a mask of four dimensions is passed on untouched; it keeps transformers from building one over the packed row
    unused = embeds.new_zeros(1, 1, 1, 1)
    rows = (batch["row_slots"].clamp(min=0), batch["row_place"])
    return hidden_states(model, embeds, batch["position"], unused, rows=rows)
