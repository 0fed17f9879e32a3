"""A plugin of vLLM: exports run in its unmodified engine and server, and think in latents.

vLLM loads `register` in all of its processes, by the entry point `vllm.general_plugins`. An export names a model type
that only this package knows, so vLLM asks it for the configuration, and is given that of the base type with another
name of the architecture: `Latent` and the name that vLLM knows. That is vLLM's own class, which also tells vLLM's model
runner to keep the state below beside the requests: what is fed comes from `serve.rows`, and so does what rows say that
do not answer.

The classes of vLLM are looked up when they are asked for: this package is imported without it, too.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latent_sft.errors import ConfigError
from latent_sft.export.remote import MODEL_TYPE
from latent_sft.serve.vllm.state import state_class, thinking_of

KNOWN = ("0.32.0", "0.33.0")  # versions of vLLM that this ran with, on a CPU
PREFIX = "Latent"  # before the name of an architecture
PARSER = "latent_sft"  # --reasoning-parser
WEIGHTS = ("placeholder", "projection")  # of `models.thoughts`, which vLLM finds beside the model's


def register() -> None:
    """Tell vLLM of exports; of a version that is not known, only so much that they are refused."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager

    AutoConfig.register(MODEL_TYPE, ExportConfig, exist_ok=True)
    # those in the map have settings of their own, which ours would replace
    here = set(ModelRegistry.get_supported_archs()) - MODELS_CONFIG_MAP.keys()
    for name in here & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")
        MODELS_CONFIG_MAP[PREFIX + name] = Settings
    ReasoningParserManager.register_lazy_module(PARSER, "latent_sft.serve.vllm.reasoning", "LatentReasoningParser")


def check_version() -> None:
    """Refuse a version of vLLM whose hooks are not known.

    Raises:
        ConfigError: with the versions that are.
    """
    found = metadata.version("vllm")
    if found.split("+")[0] not in KNOWN:
        raise ConfigError(
            f"vllm: found version {found}, expected {' or '.join(KNOWN)}; the hooks that latent_sft thinks by differ "
            "between versions. Install 'latent_sft[vllm]', or serve with latent_sft's own engine."
        )


class ExportConfig(PreTrainedConfig):
    """What `config.json` of an export is read as: the configuration of its base type."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration that the model was trained with, of an architecture that thinks."""
        check_version()
        kept = {key: value for key, value in config_dict.items() if key not in ("auto_map", "base_model_type")}
        base = config_dict["base_model_type"]
        changed = {"model_type": base, "architectures": [PREFIX + name for name in config_dict["architectures"]]}
        return CONFIG_MAPPING[base].from_dict({**kept, **changed}, **kwargs)


class Settings:
    """Looked up by vLLM under the name of the architecture, before anything is loaded."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Leave it as it is."""

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Refuse what would run wrong, and set what thinking needs.

        Raises:
            ConfigError: with the option to change.
        """
        check_version()
        parallel, scheduler = config.parallel_config, config.scheduler_config
        refused = {
            "VLLM_USE_V2_MODEL_RUNNER": None
            if config.use_v2_model_runner
            else "vLLM chose its old model runner; set 1",
            "--speculative-config": config.speculative_config and "latents cannot be drafted; leave it out",
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1 and "embedding and head are on one rank",
            "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1 and "rows must be whole",
            "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling and "every rank thinks all rows",
            "--scheduling-policy": scheduler.policy != "fcfs" and "rows that wait again must be the next; use fcfs",
            "--scheduler-cls": scheduler.scheduler_cls and "latent_sft needs its own, which keeps thoughts uncached",
        }
        for option, reason in refused.items():
            if reason:
                raise ConfigError(f"{option}: models that think in latents do not run this way ({reason}).")
        thinking = thinking_of(config, torch.device("cpu"))
        scheduler.scheduler_cls = "latent_sft.serve.vllm.scheduler.scheduler"
        # the export counts answer tokens, and writes greedily, which it says in words that vLLM does not read
        spec, asked = thinking.spec, config.model_config.override_generation_config
        asked.setdefault("max_new_tokens", len(spec.end_think_ids) + thinking.most_steps + spec.max_answer_tokens)
        if not config.model_config.try_get_generation_config().get("do_sample"):
            asked.setdefault("temperature", 0.0)


class LatentModel:
    """What a model class of vLLM is given in addition."""

    last_hidden: Tensor

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the state that vLLM keeps for this model."""
        return state_class()

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return logits, and keep the states that they came from: thoughts may be such states."""
        self.last_hidden = hidden_states
        return super().compute_logits(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def load_weights(self, weights: Any) -> Any:
        """Load the weights of the model, without those of its thoughts."""
        own = ((name, weight) for name, weight in weights if name.split(".")[0] not in WEIGHTS)
        return super().load_weights(own)  # type: ignore[misc]


@cache
def _model_class(name: str) -> type:
    from vllm.model_executor.models import ModelRegistry

    base = ModelRegistry.models[name].load_model_cls()
    if hasattr(base, "get_model_state_cls") or getattr(base, "has_inner_state", False):
        raise ConfigError(f"{name}: vLLM keeps a state of its own for it; serve it with latent_sft's own engine.")
    return type(PREFIX + name, (LatentModel, base), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Return the class of an architecture, `Latent…`; vLLM looks it up here by its name."""
    if not name.startswith(PREFIX) or importlib.util.find_spec("vllm") is None:
        raise AttributeError(name)
    check_version()
    return _model_class(name.removeprefix(PREFIX))
