"""What vLLM's model runner keeps beside its requests: rows that think, and a sampler in whose place they speak.

The classes here become those of vLLM when they are asked for; without it they can be imported, and driven by another
runner.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_sft.errors import ConfigError
from latent_sft.inference.engine import THINKERS
from latent_sft.method.thinking import Thinking
from latent_sft.method.types import SPEC_FILE, THINKER_FILE, LatentSpec, Soft, ThoughtSpec
from latent_sft.models.load import read_thinker
from latent_sft.models.thoughts import THOUGHTS_FILE, load_thoughts
from latent_sft.runs import read_json
from latent_sft.serve.vllm.rows import Rows

MAX_COT_TOKENS = 512


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
            found = needed["mixture"].noise_scale
            raise ConfigError(f"additional_config.soft.noise_scale: got {found}, expected 0; nothing draws noise here.")
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
def state_class() -> type:
    """Return the class for vLLM: its usual state, with thoughts."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return type("LatentModelState", (LatentState, DefaultModelState), {})
