"""`generate` for plain `transformers`: the entry point of the decoding code inside exported checkpoints.

This module is bundled with what it imports into `custom_generate/generate.py` (see `export.bundle`); it is not used
inside the package. `transformers` calls it in place of `GenerationMixin.generate`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from latent_sft.inference.generate import Decoded, Sampling
from latent_sft.inference.generate import generate as decode
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.models.thoughts import THOUGHTS_FILE, Thoughts, load_thoughts

# the export writes the checkpoint's own values here; THOUGHTS stays None where latents are mixes of vocabulary entries
SPEC: LatentSpec = None  # type: ignore[assignment]
THOUGHTS: ThoughtSpec | None = None

# arguments that other code passes along and that have nothing to say here: padding and EOS are those of SPEC
IGNORED = {
    "custom_generate",
    "trust_remote_code",
    "tokenizer",
    "token_type_ids",
    "use_cache",
    "synced_gpus",
    "pad_token_id",
    "eos_token_id",
}


@dataclass
class LatentOutput(ModelOutput):
    """What `generate(..., return_latents=True)` returns; N is the most latents of a row.

    Attributes:
        sequences: `[B, L]` as returned without `return_latents`.
        latent_ids: `[B, N, K]` token ids of the latents, padded with the pad id.
        latent_weights: `[B, N, K]` their weights, padded with 0.
        num_latents: `[B]`.
        latent_embeds: `[B, N, D]` what was fed, where latents are hidden states; ids and weights are then what the LM
            head makes of them.
    """

    sequences: LongTensor | None = None
    latent_ids: LongTensor | None = None
    latent_weights: Tensor | None = None
    num_latents: LongTensor | None = None
    latent_embeds: Tensor | None = None


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    min_latents: int | None = None,
    max_latents: int | None = None,
    noise_scale: float | None = None,
    batch_size: int = 64,
    return_latents: bool = False,
    **others: Any,
) -> LongTensor | LatentOutput:
    """Think in latent tokens, then write the answer.

    A latent token is a weighted mix of vocabulary entries, or a hidden state that is fed back, and has no id of its
    own, so it does not appear in the returned ids; `return_latents=True` returns the latents too. Random draws follow
    `torch.manual_seed`.

    Args:
        inputs: same as `input_ids`; what `model.generate(ids)` arrives as.
        generation_config: `do_sample`, `temperature`, `top_p` and `max_new_tokens` are taken from it where they are not
            given; the model's own by default.
        model: the exported model.
        input_ids: `[B, P]` prompts, padded on either side. `<think>` is appended where a prompt does not end with it.
        attention_mask: `[B, P]`, 1 at real tokens; needed where there is padding.
        max_new_tokens: cap of the answer, EOS included; as trained by default.
        do_sample: sample the answer instead of taking the likeliest token.
        temperature: of the sampled answer.
        top_p: nucleus mass of the sampled answer.
        min_latents: thinking does not stop before; as trained by default. This and the next two are refused where
            latents are hidden states, of which there are always as many as in training.
        max_latents: thinking ends after; as trained by default.
        noise_scale: multiplier of Gumbel noise on the latents; no noise by default.
        batch_size: rows decoded together.
        return_latents: return a `LatentOutput`.
        **others: refused where set, but for those in IGNORED.

    Returns:
        `[B, L]`: `input_ids` as given, then `<think>` where it was missing, `</think>`, the answer and EOS, padded on
        the right. As with any `generate`, `output[:, input_ids.shape[1]:]` is what was written.

    Raises:
        ValueError: an argument that latent decoding does not have, no prompts, or a model of another vocabulary.
        OSError: the weights that turn hidden states into inputs are not beside the model's.
    """
    config = model.generation_config if generation_config is None else generation_config
    refused = {key for key, value in others.items() if value is not None and key not in IGNORED}
    refused |= {key for key in ("num_beams", "num_return_sequences") if (getattr(config, key, None) or 1) > 1}
    if THOUGHTS is not None:
        limits = {"min_latents": min_latents, "max_latents": max_latents, "noise_scale": noise_scale}
        refused |= {key for key, value in limits.items() if value is not None}
    if refused:
        raise ValueError(f"{', '.join(sorted(refused))}: not available in latent decoding.")
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != SPEC.vocab_size:
        raise ValueError(f"This decoding code belongs to a model of {SPEC.vocab_size} vocabulary entries, not {rows}.")
    ids = input_ids if input_ids is not None else inputs
    if ids is None or ids.dim() != 2:
        raise ValueError("input_ids: expected token ids of shape [batch, length].")

    def chosen(given: Any, key: str, otherwise: Any) -> Any:
        own = getattr(config, key, None)
        return given if given is not None else own if own is not None else otherwise

    changes = {
        "max_answer_tokens": chosen(max_new_tokens, "max_new_tokens", None),
        "min_latents": min_latents,
        "max_latents": max_latents,
        "noise_scale": noise_scale,
    }
    spec = dataclasses.replace(SPEC, **{key: value for key, value in changes.items() if value is not None})
    sampling = None
    if chosen(do_sample, "do_sample", False) or noise_scale:
        sampling = Sampling(
            temperature=chosen(temperature, "temperature", 1.0) if chosen(do_sample, "do_sample", False) else 0.0,
            top_p=chosen(top_p, "top_p", 1.0),
            latent_noise=bool(noise_scale),
            seed=int(torch.randint(2**31, ())),
        )
    real = torch.ones_like(ids) if attention_mask is None else attention_mask
    opened = [_open(row[keep.bool()].tolist(), spec) for row, keep in zip(ids, real, strict=True)]
    thoughts = None if THOUGHTS is None else _beside(model, THOUGHTS)
    decoded = decode(
        model,
        spec,
        [prompt for prompt, _ in opened],
        thinker="latent" if thoughts is None else "continuous",
        thoughts=thoughts,
        sampling=sampling,
        batch_size=batch_size,
    )
    written = [
        [*added, *spec.end_think_ids, *row.answer_ids, *([spec.eos_id] if row.finished else [])]
        for (_, added), row in zip(opened, decoded, strict=True)
    ]
    width = max((len(row) for row in written), default=0)
    tail = [row + [spec.pad_id] * (width - len(row)) for row in written]
    sequences = torch.cat([ids, torch.tensor(tail, dtype=ids.dtype, device=ids.device).view(len(ids), width)], dim=1)
    return _with_latents(sequences, decoded, spec) if return_latents else sequences


def _open(prompt: list[int], spec: LatentSpec) -> tuple[list[int], tuple[int, ...]]:
    """Return the prompt with `<think>` at its end, and what had to be added for that."""
    delimiter = spec.think_ids
    added = () if tuple(prompt[-len(delimiter) :]) == delimiter else delimiter
    return [*prompt, *added], added


def _beside(model: PreTrainedModel, spec: ThoughtSpec) -> Thoughts:
    """Return the weights from the folder, or the revision of the Hub repository, that the model was loaded from."""
    commit = getattr(model.config, "_commit_hash", None)
    try:
        path = cached_file(model.name_or_path, THOUGHTS_FILE, revision=commit)
    except OSError as error:
        raise OSError(
            f"{THOUGHTS_FILE}: not found beside the model, which was loaded from {model.name_or_path!r}; load it from "
            "the exported folder or its Hub repository."
        ) from error
    return load_thoughts(path, spec, model.get_input_embeddings().weight.device)


def _with_latents(sequences: Tensor, decoded: list[Decoded], spec: LatentSpec) -> LatentOutput:
    most = max((row.num_steps for row in decoded), default=0)
    ids = torch.full((len(decoded), most, spec.top_k), spec.pad_id)
    weights = torch.zeros(len(decoded), most, spec.top_k)
    for b, row in enumerate(decoded):
        ids[b, : row.num_steps] = row.latent_ids
        weights[b, : row.num_steps] = row.latent_weights
    embeds = [row.latent_embeds for row in decoded if row.latent_embeds is not None]  # all of them or none
    return LatentOutput(
        sequences=sequences,
        latent_ids=ids.to(sequences.device),
        latent_weights=weights.to(sequences.device),
        num_latents=torch.tensor([row.num_steps for row in decoded], device=sequences.device),
        latent_embeds=torch.stack(embeds).to(sequences.device) if embeds else None,
    )
