"""Load, build, adapt, merge and save language models; the only place that decides how a base model comes about."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from latent_sft.config.schema import LoraConfig, ModelConfig, TinyModelConfig
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.method.types import LatentSpec
from latent_sft.models.backbone import core, embed, input_table
from latent_sft.models.head import check_head
from latent_sft.models.sharding import whole

log = logging.getLogger(__name__)


def load_tokenizer(path: str | Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        ConfigError: it cannot be found.
    """
    try:
        return AutoTokenizer.from_pretrained(path, **_hub_options(config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name_or_path: no tokenizer at {str(path)!r} ({_first_line(error)}).") from error


def load_config(path: str | Path, **options: Any) -> PreTrainedConfig:
    """Load the configuration of a model; that of an export as the type it was trained as, without its own code."""
    values, _ = PreTrainedConfig.get_config_dict(path, **options)
    if "base_model_type" not in values:
        return AutoConfig.from_pretrained(path, **options)
    kept = {key: value for key, value in values.items() if key not in ("auto_map", "base_model_type")}
    base = values["base_model_type"]
    return CONFIG_MAPPING[base].from_dict({**kept, "model_type": base})


def vocabulary_size(path: str | Path, config: ModelConfig) -> int:
    """Return the number of rows of the embedding table, without loading weights."""
    try:
        return int(load_config(path, **_hub_options(config)).get_text_config().vocab_size)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name_or_path: no model at {str(path)!r} ({_first_line(error)}). Give a folder saved by "
            "transformers or the name of a Hub model (needs network, or a local cache)."
        ) from error


def load_lm(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """Load a causal decoder in the configured dtype and attention, and check that its head is understood.

    Raises:
        ConfigError: not found, not a causal decoder, or logits computed in an unknown way.
    """
    options = dict(_hub_options(config), dtype=getattr(torch, config.dtype))
    try:
        options["config"] = load_config(path, **_hub_options(config))
        try:
            model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=config.attention, **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            log.warning("%s has no SDPA attention in transformers; using eager attention.", path)
            model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name_or_path: cannot load {str(path)!r} ({_first_line(error)}).") from error
    check_head(model)
    return model


def build_tiny(config: TinyModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build a randomly initialised decoder from sizes, reproducibly and without touching the global RNG.

    Raises:
        ConfigError: the model type is unknown or does not take these sizes.
    """
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    }
    try:
        hf_config = AutoConfig.for_model(config.model_type, **sizes, **special)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(hf_config)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model.tiny.model_type: cannot build {config.model_type!r} ({_first_line(error)})."
        ) from error


def trainable(lm: nn.Module, config: LoraConfig) -> nn.Module:
    """Return the model with adapters on a frozen base, or (rank 0) as it is, to be trained as a whole."""
    return add_lora(lm, config) if config.rank else lm


def add_lora(lm: nn.Module, config: LoraConfig) -> nn.Module:
    """Return the model wrapped with trainable adapters; the base is frozen.

    Target modules are found by PEFT (`all-linear` leaves out the head), not listed by family.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets: str | list[str] = config.target_modules
    if targets != "all-linear":
        targets = [t.strip() for t in config.target_modules.split(",")]
    try:
        return get_peft_model(
            lm,
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ConfigError(f"model.lora.target_modules: {_first_line(error)}") from error


def twin(lm: PreTrainedModel) -> PreTrainedModel:
    """Return a second model with modules of its own around the very same parameters and buffers.

    Each of the two can have its own adapters while the weights below are in memory once.
    """
    shared = [*lm.parameters(), *lm.buffers()]
    return copy.deepcopy(lm, {id(tensor): tensor for tensor in shared})


def merged(lm: nn.Module) -> PreTrainedModel:
    """Return the plain transformers model, adapters folded into its weights (in place)."""
    return lm.merge_and_unload() if hasattr(lm, "merge_and_unload") else lm


def save_lm(lm: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer), complete or not at all.

    Raises:
        ArtefactError: it could not be written, for example because the disk is full.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        core(lm).save_pretrained(part)
        tokenizer.save_pretrained(part)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    except Exception as error:  # safetensors raises its own error type for I/O failures
        shutil.rmtree(part, ignore_errors=True)
        raise ArtefactError(
            f"{folder}: could not be written ({_first_line(error)}); nothing partial was left."
        ) from error


def initial_marker(lm: nn.Module, spec: LatentSpec) -> Tensor:
    """Return the `[D]` start value of the marker vector.

    `learned`: the mean embedding of the opening delimiter's tokens; in the model's own scale, unlike a random vector,
    and not the embedding of a word of the text. `previous`: zero, since it is added to a token's embedding.
    """
    ids = torch.tensor(spec.think_ids, device=input_table(lm).device)
    with whole([input_table(lm)]):
        start = embed(lm, ids).detach().float().mean(0)
    return torch.zeros_like(start) if spec.marker_input == "previous" else start


def _hub_options(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
