"""Load, build, adapt, merge and save language models; the only place that decides how a base model comes about."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
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
from latent_sft.method.types import SPEC_FILE, THINKER_FILE, How, LatentSpec, Mixtures, SpanCode, ThoughtSpec
from latent_sft.models.backbone import embed, input_table, unwrap_peft
from latent_sft.models.head import check_head
from latent_sft.models.sharding import gathered_parameters
from latent_sft.runs import file_sha256, fingerprint, read_json, write_json

log = logging.getLogger(__name__)

# ways of thinking that come with settings
SETTINGS: dict[str, type[How]] = {how.thinker: how for how in (ThoughtSpec, SpanCode, Mixtures)}
# key of `model.tiny` -> names in the configurations of transformers
_SIZE_NAMES = {
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_positions": ("max_position_embeddings",),
    "tie_embeddings": ("tie_word_embeddings",),
}


def load_tokenizer(path: str | Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        ConfigError: it cannot be found.
    """
    options = _hub_options(config)
    with contextlib.suppress(OSError, ValueError):  # an export is read as the type it was trained as, and not warned of
        options["config"] = load_config(path, **options)
    try:
        return AutoTokenizer.from_pretrained(path, **options)
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
    return int(_text_config(path, config).vocab_size)


def max_positions(path: str | Path, config: ModelConfig) -> int | None:
    """Return the length of the longest sequence the model was made for, or None where it does not say."""
    return getattr(_text_config(path, config), "max_position_embeddings", None)


def _text_config(path: str | Path, config: ModelConfig) -> Any:
    try:
        return load_config(path, **_hub_options(config)).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name_or_path: no model at {str(path)!r} ({_first_line(error)}). Give a folder saved by "
            "transformers or the name of a Hub model (needs network, or a local cache)."
        ) from error


def weights_fingerprint(folder: Path, remember: Path) -> str:
    """Return 16 hex digits over the weights in a folder, and the files that say how to run them; not over its place.

    Args:
        folder: of a model, or of a stage-1 phase (`encoder`, `decoder` and marker).
        remember: JSON file of what was hashed before, so that a large model is read once a run.
    """
    before = read_json(remember) if remember.exists() else {}
    patterns = ("*.safetensors", "pytorch_model*.bin", "config.json", "*.py")
    found, now = {}, dict(before)
    for path in sorted(p for part in (".", "encoder", "decoder") for x in patterns for p in (folder / part).glob(x)):
        stat, key = path.stat(), str(path.resolve())
        # the time of change, unlike that of modification, is not kept by copying
        same = {"size": stat.st_size, "changed": stat.st_ctime_ns}
        if not same.items() <= before.get(key, {}).items():
            now[key] = {**same, "sha256": file_sha256(path)}
        found[str(path.relative_to(folder))] = now[key]["sha256"]
    if now != before:
        write_json(remember, now)
    return fingerprint(found)


def check_start(
    folder: Path, key: str, base: str | Path, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a folder whose weights cannot take the place of the base model's.

    Args:
        folder: of one model.
        key: of the configuration, for the message.
        base: folder or name of the base model.
        config: of the base model.
        tokenizer: of the base model.

    Raises:
        ConfigError: no model there, other sizes, or a tokenizer with other ids.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"{key}: no model in {str(folder)!r}, expected the folder of a finished stage (RUN/STAGE), an export, or "
            "any folder saved by transformers, with its tokenizer."
        )
    here, own = (AutoConfig.from_pretrained(p, **_hub_options(config)).get_text_config() for p in (folder, base))
    names = ("model_type", "vocab_size", *(name for names in _SIZE_NAMES.values() for name in names))
    sizes = {n: (getattr(here, n, None), getattr(own, n, None)) for n in names}
    differ = [f"{name} {theirs!r} instead of {ours!r}" for name, (theirs, ours) in sizes.items() if theirs != ours]
    if differ:
        raise ConfigError(
            f"{key}: {str(folder)!r} is another architecture than `model` ({', '.join(differ)}). Give weights of the "
            "same sizes, or make that folder the base: model.name_or_path."
        )
    try:
        same = AutoTokenizer.from_pretrained(folder, **_hub_options(config)).get_vocab() == tokenizer.get_vocab()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: no tokenizer in {str(folder)!r} ({_first_line(error)}); save it there.") from error
    if not same:
        raise ConfigError(
            f"{key}: the tokenizer in {str(folder)!r} has other ids than that of `model`, so its weights mean other "
            "tokens. A model from scratch takes its vocabulary from the training text: give the same data, or make "
            "that folder the base: model.name_or_path."
        )


def load_lm(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """Load a causal decoder in the configured dtype and attention, and check that its head is understood.

    A folder of adapters names its base; the two are merged.

    Raises:
        ConfigError: not found, not a causal decoder, or logits computed in an unknown way.
    """
    if (Path(path) / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        base = load_lm(str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path), config)
        return merged(PeftModel.from_pretrained(base, str(path)))
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
    try:
        hf_config = tiny_hf_config(config, vocab_size=len(tokenizer), **special)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(hf_config)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model.tiny.model_type: cannot build {config.model_type!r} ({_first_line(error)})."
        ) from error


def tiny_hf_config(config: TinyModelConfig, **others: Any) -> PreTrainedConfig:
    """Return the configuration of a model from scratch: these sizes, no dropout, and what else is given."""
    usual = AutoConfig.for_model(config.model_type)
    # families differ in their usual dropout; latents are noisy only where the configuration says so
    no_dropout = {k: 0.0 for k, v in usual.to_dict().items() if "drop" in k and isinstance(v, float)}
    return AutoConfig.for_model(config.model_type, **_sizes(config, usual), **no_dropout, **others)


def _sizes(config: TinyModelConfig, usual: PreTrainedConfig) -> dict[str, Any]:
    """Return the sizes by the names of this model type, which would take others without a word and not use them."""
    known, sizes = {*usual.to_dict(), *usual.attribute_map}, {}
    for key, names in _SIZE_NAMES.items():
        name = next((n for n in names if n in known), None)
        if name is not None:
            sizes[name] = getattr(config, key)
        elif key != "num_kv_heads" or config.num_kv_heads != config.num_heads:
            expected = f"num_heads={config.num_heads}" if key == "num_kv_heads" else "a model type that has this size"
            raise ConfigError(
                f"model.tiny.{key}: got {getattr(config, key)!r}, expected {expected}; a {config.model_type!r} model "
                f"has no {names[0]} of its own."
            )
    return sizes


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
                lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number does
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


def merged(lm: Any) -> PreTrainedModel:
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
        unwrap_peft(lm).save_pretrained(part)
        tokenizer.save_pretrained(part)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    except Exception as error:  # safetensors raises its own error type for I/O failures
        shutil.rmtree(part, ignore_errors=True)
        raise ArtefactError(
            f"{folder}: could not be written ({_first_line(error)}); nothing partial was left."
        ) from error


def save_thinker(folder: Path, spec: LatentSpec, thinker: str, settings: How | None = None) -> None:
    """Write the spec beside a model, and how it thinks, with the settings of that."""
    write_json(folder / SPEC_FILE, spec.to_dict())
    how = {} if settings is None else {settings.key: dataclasses.asdict(settings)}
    write_json(folder / THINKER_FILE, {"thinker": thinker, **how})


def read_thinker(folder: Path) -> tuple[str, How | None]:
    """Return how the model of a folder thinks, in latent tokens where it does not say, and the settings of that.

    Raises:
        ArtefactError: `thinker.json` is damaged.
    """
    path = folder / THINKER_FILE
    how: dict[str, Any] = read_json(path) if path.exists() else {"thinker": "latent"}
    try:
        settings = SETTINGS.get(how["thinker"])
        return how["thinker"], None if settings is None else settings(**how[settings.key])
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: unusable ({error}); train that stage again.") from error


def initial_marker(lm: nn.Module, spec: LatentSpec) -> Tensor:
    """Return the `[D]` start value of the marker vector.

    `learned`: the mean embedding of the opening delimiter's tokens; in the model's own scale, unlike a random vector,
    and not the embedding of a word of the text. `previous`: zero, since it is added to a token's embedding.
    """
    ids = torch.tensor(spec.think_ids, device=input_table(lm).device)
    with gathered_parameters([input_table(lm)]):
        start = embed(lm, ids).detach().float().mean(0)
    return torch.zeros_like(start) if spec.marker_input == "previous" else start


def _hub_options(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
