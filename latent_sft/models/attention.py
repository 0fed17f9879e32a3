"""Which code computes the structured attention of stage 1, and how it gets into any Hugging Face decoder.

    two_track  `method.attention` through transformers' AttentionInterface: pieces of SDPA, CPU and GPU
    flex       FlexAttention with a block mask over the same sequence, CUDA only
    dense      a `[B, 1, T, T]` mask and the model's own attention: the reference

All three see the same sequence in two-track order and the same explicit position ids, and give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from latent_sft.errors import ConfigError
from latent_sft.method.attention import Tracks, induction_tracks, supervision_tracks, tracked_attention
from latent_sft.method.layout import Kind
from latent_sft.method.masks import induction_mask, supervision_mask, to_additive
from latent_sft.models.backbone import check_window, core, hidden_states
from latent_sft.models.plain_attention import plain_attention, refuse_sinks

TWO_TRACK = "latent_sft_two_track"
BACKENDS = ("auto", "two_track", "flex", "dense")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    tracks: Tracks | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface; without `tracks` (decoding) it is plain SDPA."""
    refuse_sinks(module, others, "stage1.attention: {name}, which two_track does not have; set stage1.attention=dense.")
    if tracks is None:
        return plain_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, others)
    out = tracked_attention(query, key, value, tracks, scaling, dropout, softcap)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(TWO_TRACK, _forward)
AttentionMaskInterface.register(TWO_TRACK, sdpa_mask)


def use_backend(model: nn.Module, backend: str) -> str:
    """Prepare a causal LM for a backend and return the one chosen.

    `auto` takes two_track where the model's attention goes through transformers' interface, else dense.

    Raises:
        ConfigError: the model or this machine cannot run the backend that was asked for.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"stage1.attention: got {backend!r}, expected one of {', '.join(BACKENDS)}.")
    lm = core(model)
    pluggable = bool(getattr(lm, "_supports_attention_backend", False))
    if backend == "auto":
        backend = "two_track" if pluggable else "dense"
    if backend == "dense":
        return backend
    if not pluggable:
        raise ConfigError(
            f"stage1.attention: {type(lm).__name__} does not use transformers' attention interface; only dense works."
        )
    if backend == "flex" and not torch.cuda.is_available():
        raise ConfigError("stage1.attention: flex needs a CUDA device (FlexAttention has no backward on the CPU).")
    lm.set_attn_implementation(TWO_TRACK if backend == "two_track" else "flex_attention")
    return backend


def encoder_states(model: nn.Module, backend: str, embeds: Tensor, part: Mapping[str, Tensor], span: int) -> Tensor:
    """Return hidden states `[B, T, D]` under the induction mask.

    Args:
        model: the encoder, prepared by `use_backend`.
        backend: what `use_backend` returned.
        embeds: `[B, T, D]` in two-track order.
        part: `kind, time, position` `[B, T]` and `anchor` `[B, N, 1]`.
        span: largest distance of two positions plus one, to check sliding windows with.
    """
    check_window(core(model), span)
    kind, time = part["kind"], part["time"]
    if backend == "two_track":
        text_length = embeds.shape[1] - part["anchor"].shape[1]
        return _tracked(model, embeds, part["position"], induction_tracks(part["anchor"], text_length, embeds.dtype))
    if backend == "dense":
        return _dense(model, embeds, part["position"], induction_mask(kind, time))

    def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        earlier_text = (time[b, k] < time[b, q]) & (kind[b, k] == Kind.TEXT) & (kind[b, q] != Kind.PAD)
        return earlier_text | (q == k)

    return _flex(model, embeds, part["position"], keep)


def decoder_states(model: nn.Module, backend: str, embeds: Tensor, part: Mapping[str, Tensor]) -> Tensor:
    """Return hidden states `[B, T, D]` under the supervision mask; `part` as in `encoder_states`, with `branch`."""
    kind, branch, time = part["kind"], part["branch"], part["time"]
    tracks = supervision_tracks(part["anchor"])
    check_window(core(model), tracks.main_length(embeds.shape[1]))
    if backend == "two_track":
        return _tracked(model, embeds, part["position"], tracks)
    if backend == "dense":
        return _dense(model, embeds, part["position"], supervision_mask(kind, branch, time))

    def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        chunk, real = kind[b, q] == Kind.CHUNK, (kind[b, q] != Kind.PAD) & (kind[b, k] != Kind.PAD)
        same_branch = branch[b, q] == branch[b, k]
        sees = torch.where(chunk, same_branch, kind[b, k] != Kind.CHUNK)
        return ((time[b, k] < time[b, q]) & sees & real) | (q == k)

    return _flex(model, embeds, part["position"], keep)


def _tracked(model: nn.Module, embeds: Tensor, position: Tensor, tracks: Tracks) -> Tensor:
    # a mask of four dimensions is passed on untouched; it keeps transformers from building a causal one
    unused = embeds.new_zeros(1, 1, 1, 1)
    return hidden_states(model, embeds, position, unused, tracks=tracks)


def _dense(model: nn.Module, embeds: Tensor, position: Tensor, keep: Tensor) -> Tensor:
    return hidden_states(model, embeds, position, to_additive(keep, embeds.dtype))


def _flex(model: nn.Module, embeds: Tensor, position: Tensor, keep: Any) -> Tensor:
    batch, length = embeds.shape[:2]
    # compiled, so that the mask is evaluated block by block and never exists as a whole
    block_mask = torch.compile(create_block_mask)(keep, batch, None, length, length, device=str(embeds.device))
    return hidden_states(model, embeds, position, block_mask)
