"""What the method needs from any Hugging Face causal decoder, through the library's own accessors.

Embedding, last hidden states under a given mask, and the head. No family names: the three scalars that some families
put between hidden states and logits are read from their configuration, and `check_head` compares with the model's own
logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from latent_sft.errors import ConfigError
from latent_sft.method.masks import to_additive
from latent_sft.method.superposition import combine, mix
from latent_sft.method.types import Superposition


def core(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper (adapters stay active), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """Return input embeddings `[..., D]` of ids `[...]`, by the model's own module (Gemma scales in it)."""
    return core(model).get_input_embeddings()(ids)


def input_table(model: nn.Module) -> Tensor:
    """Return the raw input embedding table `[V, D]`."""
    return core(model).get_input_embeddings().weight


def head_table(model: nn.Module) -> Tensor:
    """Return the LM head's weight `[V, D]` (the input table itself for tied models)."""
    return core(model).get_output_embeddings().weight


def mix_latents(model: nn.Module, latent: Superposition) -> Tensor:
    """Return embeddings `[..., D]` of superpositions, the table detached (reference: W is never trained through z).

    Gradient reaches the weights of the superposition only.
    """
    module = core(model).get_input_embeddings()
    if type(module) is nn.Embedding:
        return mix(latent, module.weight.detach())
    return combine(module(latent.ids).detach(), latent.weights)


def hidden_states(model: nn.Module, embeds: Tensor, keep: Tensor | None, position: Tensor | None) -> Tensor:
    """Return the last hidden states after the final norm.

    Args:
        model: causal LM, possibly wrapped by PEFT.
        embeds: `[B, T, D]` input embeddings.
        keep: `[B, 1, T, T]` bool, True = may attend; None is plain causal attention (right padding needs no mask).
        position: `[B, T]` position ids; None is 0..T-1.

    Returns:
        `[B, T, D]`.

    Raises:
        ConfigError: the model has sliding-window layers and the sequence is longer than the window under `keep`.
    """
    lm = core(model)
    mask = None
    if keep is not None:
        check_window(lm, embeds.shape[1])
        mask = to_additive(keep, embeds.dtype)
    decoder = lm.get_decoder()
    return decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state


def check_window(lm: nn.Module, length: int) -> None:
    """Refuse a structured mask over a sequence longer than the model's sliding window: it would run wrong."""
    window = getattr(lm.config, "sliding_window", None)
    layers = getattr(lm.config, "layer_types", None)
    slides = window is not None and (layers is None or "sliding_attention" in layers)
    if slides and length > window:
        raise ConfigError(
            f"model: sliding-window attention of {window} with a stage-1 sequence of {length} tokens. The induction "
            "and supervision masks need full attention. Use shorter CoTs (data.max_cot_tokens) or another model."
        )


def head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the map from hidden states `[M, D]` to logits `[M, V]`, with the family's scaling and soft-capping."""
    lm = core(model)
    output = lm.get_output_embeddings()
    config = lm.config
    cap = getattr(config, "final_logit_softcapping", None)
    divide = getattr(config, "logits_scaling", None)
    times = getattr(config, "logit_scale", None)

    def logits(hidden: Tensor) -> Tensor:
        out = output(hidden)
        if divide is not None:
            out = out / divide
        if times is not None:
            out = out * times
        if cap is not None:
            out = torch.tanh(out / cap) * cap
        return out

    return logits


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare our logits with the model's own on three tokens.

    Raises:
        ConfigError: they differ; the family does something between hidden states and logits that is not known here.
    """
    lm = core(model)
    was_training = lm.training
    lm.eval()
    device = input_table(lm).device
    ids = torch.arange(3, device=device)[None] % lm.config.get_text_config().vocab_size
    own = lm(input_ids=ids, use_cache=False).logits
    ours = head(lm)(hidden_states(lm, embed(lm, ids), None, None))
    lm.train(was_training)
    scale = own.abs().max().clamp(min=1.0)
    if (own - ours).abs().max() > 1e-2 * scale:
        raise ConfigError(
            f"model: {type(lm).__name__} computes its logits in a way this version does not know (difference "
            f"{(own - ours).abs().max().item():.3g}). Please report the model type {lm.config.model_type!r}."
        )
