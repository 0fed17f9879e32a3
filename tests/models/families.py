"""Tiny random models of many families, built from configuration objects; shared by the tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "cohere": {},
}


def build(
    family: str, *, seed: int = 1, scale: float = 1.0, tied: bool | None = None, vocab_size: int | None = None
) -> PreTrainedModel:
    """Return a model.

    Args:
        family: of FAMILIES.
        seed: of its weights.
        scale: multiplies its matrices, since random tiny models write one token for ever.
        tied: whether the head is the embedding table; None as the family has it.
        vocab_size: None is that of SIZES.
    """
    torch.manual_seed(seed)
    own_sizes = ("hidden", "num_", "inter", "max_")
    sizes = {k: v for k, v in SIZES.items() if family != "gpt2" or not k.startswith(own_sizes)}
    chosen = {"tie_word_embeddings": tied, "vocab_size": vocab_size}
    chosen = {k: v for k, v in chosen.items() if v is not None}
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **chosen})
    # Gemma 2 has no SDPA attention in transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.eval()
