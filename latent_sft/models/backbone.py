"""What the method needs from any Hugging Face causal decoder, through the library's own accessors.

Tables, embeddings and last hidden states; no family names. The head is in `head.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from latent_sft.errors import ConfigError
from latent_sft.method.superposition import combine, mix
from latent_sft.method.types import Superposition


def unwrap_peft(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper (adapters stay active), or the model itself."""
    # of no type: transformers finds tables and decoders by name, so that a checker would take them for tensors
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """Return input embeddings `[..., D]` of ids `[...]`, by the model's own module (Gemma scales in it)."""
    return unwrap_peft(model).get_input_embeddings()(ids)


def input_table(model: nn.Module) -> nn.Parameter:
    """Return the raw input embedding table `[V, D]`."""
    return unwrap_peft(model).get_input_embeddings().weight


def head_table(model: nn.Module) -> Tensor:
    """Return the LM head's weight `[V, D]` (the input table itself for tied models)."""
    return unwrap_peft(model).get_output_embeddings().weight


def mix_latents(model: nn.Module, latent: Superposition, train_table: bool = False) -> Tensor:
    """Return embeddings `[..., D]` of superpositions, the table detached (reference: W is never trained through z).

    Gradient reaches the weights of the superposition, and the table with `train_table` only.
    """

    def held(table: Tensor) -> Tensor:
        return table if train_table else table.detach()

    module = unwrap_peft(model).get_input_embeddings()
    # a table partitioned by DeepSpeed ZeRO-3 is there only while its module is called
    if type(module) is nn.Embedding and not hasattr(module.weight, "ds_id"):
        return mix(latent, held(module.weight))
    if latent.ids.shape[-1] == module.num_embeddings:  # every row once, not once for every latent
        return mix(latent, held(module(torch.arange(module.num_embeddings, device=latent.ids.device))))
    return combine(held(module(latent.ids)), latent.weights)


def hidden_states(
    model: nn.Module, embeds: Tensor, position: Tensor | None = None, mask: Any = None, **attention: Any
) -> Tensor:
    """Return the last hidden states after the final norm, `[B, T, D]`.

    Args:
        model: causal LM, possibly wrapped by PEFT.
        embeds: `[B, T, D]` input embeddings.
        position: `[B, T]` position ids; None is 0..T-1.
        mask: additive `[B, 1, T, T]` or a BlockMask; None is plain causal attention (right padding needs no mask).
        attention: passed on to the attention function.
    """
    decoder = unwrap_peft(model).get_decoder()
    with _one_sequence_per_row():
        out = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False, **attention)
    return out.last_hidden_state


@contextmanager
def _one_sequence_per_row() -> Iterator[None]:
    """Keep transformers from looking at positions for packed sequences: the host would wait for a GPU at every pass."""
    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


def check_window(
    lm: nn.Module, length: int, what: str = "stage-1", why: str = "The induction and supervision masks need"
) -> None:
    """Refuse structured attention over positions further apart than the model's sliding window: it would run wrong."""
    window = getattr(lm.config, "sliding_window", None)
    layers = getattr(lm.config, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    if window is not None and slides and length > window:
        raise ConfigError(
            f"model: sliding-window attention of {window} with a {what} sequence of {length} tokens. {why} full "
            "attention. Use shorter CoTs (data.max_cot_tokens) or another model."
        )
