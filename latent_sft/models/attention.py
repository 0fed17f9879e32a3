"""Our attention inside any Hugging Face decoder: one function behind transformers' AttentionInterface, told by a plan.

    no plan   plain SDPA: whole sequences and decoding work as before
    Plan      a callable that computes a layer's attention: stage 1's two tracks here, `thought_passes.Pass` elsewhere

The structured attention of stage 1 comes in three forms, which see the same sequence in two-track order and the same
explicit position ids, and give the same numbers:

    two_track  `method.attention`: pieces of SDPA, CPU and GPU
    flex       FlexAttention with a block mask over the same sequence, CUDA only
    dense      a `[B, 1, T, T]` mask and the model's own attention: the reference
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from latent_sft.errors import ConfigError
from latent_sft.method.attention import Tracks, induction_tracks, softcapped, supervision_tracks, tracked_attention
from latent_sft.method.layout import Kind
from latent_sft.method.masks import induction_mask, supervision_mask, to_additive
from latent_sft.models.backbone import check_window, hidden_states, unwrap_peft

OURS = "latent_sft"
PLAN = "attention_plan"
BACKENDS = ("auto", "two_track", "flex", "dense")

Plan = Callable[[int, Tensor, Tensor, Tensor, float | None, float, float | None], Tensor]
"""(layer, query `[B, H, T, d]`, key, value `[B, H_kv, T, d]`, scale, dropout, softcap) -> `[B, H, T, d]`."""


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    attention_plan: Plan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface, `[B, T, H, d]`."""
    if others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise ConfigError(
            f"model: {type(module).__name__} adds sinks or biases to its attention scores, which ours leaves out. "
            "Stage 1 can do with stage1.attention=dense; thinking in hidden states needs another model."
        )
    if attention_plan is not None:
        out = attention_plan(module.layer_idx, query, key, value, scaling, dropout, softcap)
        return out.transpose(1, 2).contiguous(), None
    if softcap is not None:  # Gemma 2
        out = softcapped(query, key, value, attention_mask, scaling, dropout, softcap)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)


AttentionInterface.register(OURS, _forward)
AttentionMaskInterface.register(OURS, sdpa_mask)


def use_plans(model: nn.Module) -> bool:
    """Let a causal LM's layers follow plans; False where its attention does not go through transformers' interface."""
    lm = unwrap_peft(model)
    if not getattr(lm, "_supports_attention_backend", False):
        return False
    lm.set_attn_implementation(OURS)
    return True


def planned(model: nn.Module, embeds: Tensor, position: Tensor, plan: Plan, **options: Any) -> Any:
    """Return the output of the decoder over `[B, T, D]` at `[B, T]`, attending by a plan."""
    # a mask of four dimensions is passed on untouched; it keeps transformers from building a causal one
    unused = embeds.new_zeros(1, 1, 1, 1)
    return unwrap_peft(model).get_decoder()(
        inputs_embeds=embeds, attention_mask=unused, position_ids=position, use_cache=False, **options, **{PLAN: plan}
    )


def use_backend(model: nn.Module, backend: str) -> str:
    """Prepare a causal LM for a backend and return the one chosen.

    `auto` takes two_track where the model's attention goes through transformers' interface, else dense.

    Raises:
        ConfigError: the model or this machine cannot run the backend that was asked for.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"stage1.attention: got {backend!r}, expected one of {', '.join(BACKENDS)}.")
    if backend == "flex" and not torch.cuda.is_available():
        raise ConfigError("stage1.attention: flex needs a CUDA device (FlexAttention has no backward on the CPU).")
    if backend == "dense":
        return backend
    if not use_plans(model):
        if backend == "auto":
            return "dense"
        raise ConfigError(
            f"stage1.attention: {type(unwrap_peft(model)).__name__} does not use transformers' attention interface; "
            "only dense works."
        )
    if backend == "flex":
        lm = unwrap_peft(model)
        if not lm._supports_flex_attn:
            raise ConfigError(
                f"stage1.attention: {type(lm).__name__} has no FlexAttention; use auto, two_track or dense."
            )
        lm.set_attn_implementation("flex_attention")
    return "two_track" if backend == "auto" else backend


def encoder_states(model: nn.Module, backend: str, embeds: Tensor, part: Mapping[str, Tensor], span: int) -> Tensor:
    """Return hidden states `[B, T, D]` under the induction mask.

    Args:
        model: the encoder, prepared by `use_backend`.
        backend: what `use_backend` returned.
        embeds: `[B, T, D]` in two-track order.
        part: `kind, time, position` `[B, T]` and `anchor` `[B, N, 1]`.
        span: largest distance of two positions plus one, to check sliding windows with.
    """
    check_window(unwrap_peft(model), span)
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
    check_window(unwrap_peft(model), tracks.main_length(embeds.shape[1]))
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
    def plan(_: int, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        return tracked_attention(query, key, value, tracks, *options)

    return planned(model, embeds, position, plan).last_hidden_state


def _dense(model: nn.Module, embeds: Tensor, position: Tensor, keep: Tensor) -> Tensor:
    return hidden_states(model, embeds, position, to_additive(keep, embeds.dtype))


def _flex(model: nn.Module, embeds: Tensor, position: Tensor, keep: Any) -> Tensor:
    batch, length = embeds.shape[:2]
    # compiled, so that the mask is evaluated block by block and never exists as a whole
    block_mask = torch.compile(create_block_mask)(keep, batch, None, length, length, device=str(embeds.device))
    return hidden_states(model, embeds, position, block_mask)
