"""A plugin of vLLM: exports run in its unmodified engine and server, and think in latents.

vLLM loads `register` in all of its processes, by the entry point `vllm.general_plugins`. An export names a model type
that only this package knows, so vLLM asks it for the configuration, and is given that of the base type with another
name of the architecture: `Latent` and the name that vLLM knows. That is vLLM's own class, which also tells vLLM's model
runner to keep the state below beside the requests: what is fed comes from `serve.rows`, and so does what rows say that
do not answer.

The classes of vLLM are looked up when they are asked for: this package is imported without it, too.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latent_sft.errors import ConfigError
from latent_sft.export.remote import MODEL_TYPE
from latent_sft.inference.engine import THINKERS
from latent_sft.method.thinking import Thinking
from latent_sft.method.types import SPEC_FILE, THINKER_FILE, LatentSpec, Soft, ThoughtSpec
from latent_sft.models.load import read_thinker
from latent_sft.models.thoughts import THOUGHTS_FILE, load_thoughts
from latent_sft.runs import read_json
from latent_sft.serve.rows import Rows

KNOWN = ("0.32.0", "0.33.0")  # versions of vLLM whose hooks this was read against and run with
PREFIX = "Latent"  # before the name of an architecture
PARSER = "latent_sft"  # --reasoning-parser
WEIGHTS = ("placeholder", "projection")  # of `models.thoughts`, which vLLM finds beside the model's
MAX_COT_TOKENS = 512


def register() -> None:
    """Tell vLLM of exports; of a version that is not known, only so much that they are refused."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager

    AutoConfig.register(MODEL_TYPE, ExportConfig, exist_ok=True)
    here = set(ModelRegistry.get_supported_archs())
    for name in here & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")
        MODELS_CONFIG_MAP[PREFIX + name] = Settings
    ReasoningParserManager.register_lazy_module(PARSER, "latent_sft.serve.vllm_reasoning", "LatentReasoningParser")


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
        scheduler.scheduler_cls = "latent_sft.serve.vllm_scheduler.scheduler"
        # the export counts answer tokens, and writes greedily, which it says in words that vLLM does not read
        spec, asked = thinking.spec, config.model_config.override_generation_config
        asked.setdefault("max_new_tokens", len(spec.end_think_ids) + thinking.most_steps + spec.max_answer_tokens)
        if not config.model_config.try_get_generation_config().get("do_sample"):
            asked.setdefault("temperature", 0.0)


def thinking_of(config: Any, device: torch.device) -> Thinking:
    """Return how the model of a vLLM configuration thinks.

    Raises:
        ConfigError: not in a way that can be fed step by step.
    """
    folder = Path(config.model_config.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        names = [SPEC_FILE, THINKER_FILE, THOUGHTS_FILE]
        folder = Path(snapshot_download(str(folder), revision=config.model_config.revision, allow_patterns=names))
    spec = LatentSpec.from_dict(read_json(folder / SPEC_FILE))
    kind, how = read_thinker(folder)
    options = config.additional_config if isinstance(config.additional_config, dict) else {}
    needed: dict[str, Any] = {"max_tokens": options.get("max_cot_tokens", MAX_COT_TOKENS)}
    if "soft" in options:
        kind, how = "soft", None
        needed["mixture"] = Soft(**options["soft"])
        if needed["mixture"].noise_scale > 0:
            raise ConfigError(
                f"additional_config.soft.noise_scale: got {needed['mixture'].noise_scale}, expected 0; nothing draws noise here."
            )
    elif isinstance(how, ThoughtSpec):
        needed["thoughts"] = load_thoughts(folder / THOUGHTS_FILE, how, device)
    else:
        needed["mixture"] = how
    if kind not in THINKERS or THINKERS[kind].written:
        raise ConfigError(
            f"{folder}: does not think in latents ({kind!r}); vLLM runs it as it is. For Soft Thinking give "
            "--additional-config '{\"soft\": {}}'."
        )
    thinking = THINKERS[kind](spec, device, **needed)
    if thinking.at_once:
        raise ConfigError(
            f"{folder}: thinks its {thinking.at_once} latents at once, which an engine that decodes tokens cannot do; "
            "serve it with latent_sft's own engine."
        )
    return thinking


class LatentModel:
    """What a model class of vLLM is given in addition."""

    last_hidden: Tensor

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the state that vLLM keeps for this model."""
        return _state_class()

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return logits, and keep the states that they came from: thoughts may be such states."""
        self.last_hidden = hidden_states
        return super().compute_logits(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def load_weights(self, weights: Any) -> Any:
        """Load the weights of the model, without those of its thoughts."""
        own = ((name, weight) for name, weight in weights if name.split(".")[0] not in WEIGHTS)
        return super().load_weights(own)  # type: ignore[misc]


class LatentState:
    """What vLLM's model runner calls: `vllm/v1/worker/gpu/model_states/interface.py`."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        self.latent_model = model
        slots, size = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.get_inputs_embeds_size()
        dtype = vllm_config.model_config.dtype
        thinking = thinking_of(vllm_config, device)
        # A request that was preempted leaves its slot, and comes back before any new one is let in: it finds its row
        # where as many rows of requests that left are kept as there are slots
        self.rows = Rows(thinking, model.embed_input_ids, 2 * slots, size, dtype)
        self.row_of = torch.zeros(slots, dtype=torch.long, device=device)
        self.held: dict[str, int] = {}  # requests -> rows, those that left first in front
        self.live: set[str] = set()
        self.free = list(range(2 * slots))
        self.fed = torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, size, dtype=dtype, device=device)

    def add_request(self, req_index: int, new: Any) -> None:
        """Give a slot to a request, which may have been here before."""
        super().add_request(req_index, new)  # type: ignore[misc]
        name, asked = new.req_id, new.sampling_params
        if len(new.prefill_token_ids) == new.prompt_len:  # else it was preempted, and goes on in the row that it had
            self.rows.open(self._row(name), new.prompt_token_ids, shown=not (asked.stop or asked.stop_token_ids))
        self.row_of[req_index] = self.held[name]
        self.live.add(name)

    def _row(self, name: str) -> int:
        """Return the row of a request; where it has none, one that is free or was left longest ago."""
        if name not in self.held:
            if not self.free:
                self.free.append(self.held.pop(next(other for other in self.held if other not in self.live)))
            self.held[name] = self.free.pop()
        return self.held[name]

    def remove_request(self, req_id: str) -> None:
        """Hold the row of a request that left: it does not say whether for good."""
        super().remove_request(req_id)  # type: ignore[misc]
        self.live.discard(req_id)
        if req_id in self.held:
            self.held[req_id] = self.held.pop(req_id)

    def prepare_inputs(self, batch: Any, requests: Any) -> dict[str, Any]:
        """Return embeddings for all tokens of a flat batch, thoughts among them."""
        count, padded, live = batch.num_tokens, batch.num_tokens_after_padding, batch.num_reqs
        lengths = batch.query_start_loc[1 : live + 1] - batch.query_start_loc[:live]
        slots = torch.repeat_interleave(batch.idx_mapping[:live], lengths, output_size=count)
        place = batch.positions[:count] - requests.prompt_len.gpu[slots]
        self.fed[:count] = self.rows.inputs(batch.input_ids[:count], self.row_of[slots], place)
        self.fed[count:padded] = 0
        own = super().prepare_inputs(batch, requests)  # type: ignore[misc]
        return {**own, "inputs_embeds": self.fed[:padded], "input_ids": None}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return the same buffer, for profiling and for graphs."""
        own = super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]
        return {**own, "inputs_embeds": self.fed[:num_tokens], "input_ids": None}

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """Return a sampler that asks `Rows` first."""
        return LatentSampler(sampler, self), None


class LatentSampler:
    """vLLM's sampler, in whose place rows speak that think."""

    def __init__(self, sampler: Any, state: LatentState) -> None:
        self._sampler, self._state = sampler, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        """Return what rows say."""
        state, requests, slots = self._state, self._sampler.req_states, batch.idx_mapping
        place = batch.positions[batch.logits_indices] + 1 - requests.prompt_len.gpu[slots]
        ready = batch.seq_lens[: batch.num_reqs] >= requests.prefill_len.gpu[slots]  # else its prompt is read in parts
        # before sampling, which may change logits in place
        said = state.rows.think(logits, state.row_of[slots], place, ready, state.latent_model.last_hidden)
        output = self._sampler(logits, batch)
        tokens = output.sampled_token_ids
        tokens[:, 0] = torch.where(said.forced, said.ids.to(tokens.dtype), tokens[:, 0])
        if output.logprobs_tensors is not None:  # what is said was not sampled: it is certain
            ids, values, ranks = output.logprobs_tensors[:3]
            ids[:, 0] = torch.where(said.forced, said.ids.to(ids.dtype), ids[:, 0])
            values[:, 0] = torch.where(said.forced, 0, values[:, 0])
            ranks.masked_fill_(said.forced, 1)
        return output


@cache
def _state_class() -> type:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return type("LatentModelState", (LatentState, DefaultModelState), {})


@cache
def _model_class(name: str) -> type:
    from vllm.model_executor.models import ModelRegistry

    base = ModelRegistry.models[name].load_model_cls()
    return type(PREFIX + name, (LatentModel, base), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Return the class of an architecture, `Latent…`; vLLM looks it up here by its name."""
    if not name.startswith(PREFIX) or importlib.util.find_spec("vllm") is None:
        raise AttributeError(name)
    check_version()
    return _model_class(name.removeprefix(PREFIX))
