"""`generate` for plain `transformers`: the entry point of the decoding code inside exported checkpoints.

This module is bundled with what it imports into `custom_generate/generate.py` (see `export.bundle`); it is not used
inside the package. `transformers` calls it in place of `GenerationMixin.generate`.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
)
from transformers.utils import cached_file

from latent_sft.export.writer import Writer
from latent_sft.inference.generate import Decoded, Sampling
from latent_sft.inference.generate import generate as decode
from latent_sft.method.types import How, LatentSpec, SpanCode, ThoughtSpec
from latent_sft.models.thoughts import THOUGHTS_FILE, Thoughts, load_thoughts

# the export writes the checkpoint's own values here; HOW stays None where latents are mixes of the top-k
# vocabulary entries, as many as the model likes
SPEC: LatentSpec = None  # type: ignore[assignment]
HOW: How | None = None

# arguments of other callers that change nothing here
IGNORED = {"token_type_ids", "synced_gpus", "trust_remote_code"}
# settings that latent decoding does not have, and the values besides None that do not ask for them
NOT_AVAILABLE: dict[str, Any] = {
    "num_beams": 1,
    "guidance_scale": 1,
    "token_healing": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "penalty_alpha": 0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "constraints": None,
    "force_words_ids": None,
}
# processors that need no ids, by the ends of their names: they are called once for all rows
SCORES_ONLY = ("LogitsWarper", "LogitNormalization")


@dataclass
class LatentOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_latents` or `return_dict_in_generate`; N is the most latents of a row.

    Attributes:
        sequences: `[B, L]` as returned without.
        scores: for every token that was written `[B, V]`, if asked for; `</think>` is certain, what is after EOS is 0.
        logits: the same before any processing.
        latent_ids: `[B, N, K]` token ids of the latents, padded with the pad id.
        latent_weights: `[B, N, K]` their weights, padded with 0.
        num_latents: `[B]`.
        thoughts: `[B, L']` token ids of the reasoning, where latents stand for spans of it; padded with the pad id.
        latent_embeds: `[B, N, D]` what was fed, where latents are hidden states; ids and weights are then what the LM
            head makes of them.
    """

    latent_ids: LongTensor | None = None
    latent_weights: Tensor | None = None
    num_latents: LongTensor | None = None
    thoughts: LongTensor | None = None
    latent_embeds: Tensor | None = None


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    *,
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: Any = None,
    custom_generate: Any = None,
    min_latents: int | None = None,
    max_latents: int | None = None,
    noise_scale: float | None = None,
    snap: str | None = None,
    batch_size: int = 64,
    return_latents: bool = False,
    **settings: Any,
) -> LongTensor | LatentOutput:
    """Think in latent tokens, then write the answer.

    A latent token is a weighted mix of vocabulary entries, or a hidden state that is fed back, and has no id of its
    own, so the returned ids go from the prompt over `</think>` straight to the answer; the latents are in the output
    of `return_latents=True`. Rows do not influence each other. Sampling and noise follow the global seed of torch.

    Whatever else `generate` of `transformers` takes applies to the answer, and works as it does there: settings of a
    GenerationConfig, given in one or as arguments, logits processors, stopping criteria, stop strings, a streamer.
    What latent decoding does not have, such as beam search, is refused.

    Args:
        inputs: the same as `input_ids`; what `model.generate(ids)` arrives as.
        generation_config: settings; what it leaves open is taken from the model's own.
        logits_processor: called with one row at a time.
        stopping_criteria: called with all rows; what they see are ids, as returned.
        model: the exported model.
        input_ids: `[B, P]` prompts, padded on either side. `<think>` is appended where a prompt does not end with it.
        attention_mask: `[B, P]`, 1 at real tokens; where it is not given, pad ids are padding.
        streamer: is given the prompts, then token after token.
        tokenizer: needed for `stop_strings`.
        custom_generate: where the model comes from; other code is refused.
        min_latents: thinking does not stop before; as trained by default. This and the next two are refused where
            latents are hidden states, of which there are always as many as in training.
        max_latents: thinking ends after; as trained by default.
        noise_scale: multiplier of Gumbel noise on the latents; no noise by default.
        snap: what is fed back where latents stand for spans of tokens: `none` (the latent as predicted), or the code
            word that is `nearest` to it, `likeliest`, or found by `greedy` search; as trained by default.
        batch_size: rows decoded together.
        return_latents: return a `LatentOutput`.
        **settings: those of a GenerationConfig. `max_new_tokens` is the cap of the answer, EOS included, as trained by
            default; `max_length` that of prompt, delimiters and answer.

    Returns:
        `[B, L]`: `input_ids` as given, then `<think>` where it was missing, `</think>`, the answer and EOS, padded on
        the right. As with any `generate`, `output[:, input_ids.shape[1]:]` is what was written.

    Raises:
        ValueError: an argument that latent decoding does not have, no prompts, or a model of another vocabulary.
        OSError: the weights that turn hidden states into inputs are not beside the model's.
    """
    config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    unknown = config.update(**settings)

    def chosen(key: str) -> Any:
        own = getattr(config, key, None)
        return getattr(model.generation_config, key, None) if own is None else own

    refused = {key for key, value in unknown.items() if value is not None and key not in IGNORED}
    refused |= {key for key, neutral in NOT_AVAILABLE.items() if chosen(key) not in (None, neutral)}
    if custom_generate is not None and str(custom_generate) != str(model.name_or_path):
        refused.add("custom_generate")
    how = HOW
    if snap is not None and not isinstance(how, SpanCode):
        refused.add("snap")
    elif snap is not None:
        if snap not in ("none", "nearest", "likeliest", "greedy"):
            raise ValueError(f"snap: got {snap!r}, expected none, nearest, likeliest or greedy.")
        how = dataclasses.replace(how, snap=snap)
    if how is not None and not isinstance(how, SpanCode):  # always as many latents, without noise
        limits = {"min_latents": min_latents, "max_latents": max_latents, "noise_scale": noise_scale}
        refused |= {key for key, value in limits.items() if value is not None}
    if refused:
        raise ValueError(f"{', '.join(sorted(refused))}: not available in latent decoding.")
    size = model.get_input_embeddings().weight.shape[0]
    if size != SPEC.vocab_size:
        raise ValueError(f"This decoding code belongs to a model of {SPEC.vocab_size} vocabulary entries, not {size}.")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected an integer >= 1.")
    ids = input_ids if input_ids is not None else inputs
    if ids is None or ids.dim() != 2:
        raise ValueError("input_ids: expected token ids of shape [batch, length].")
    eos = chosen("eos_token_id")
    eos = list(eos) if isinstance(eos, (list, tuple)) else [SPEC.eos_id if eos is None else int(eos)]
    if not all(0 <= token < size for token in eos):
        raise ValueError(f"eos_token_id: got {eos}, expected ids below {size}.")
    pad = SPEC.pad_id if chosen("pad_token_id") is None else int(chosen("pad_token_id"))
    copies = chosen("num_return_sequences") or 1
    if copies > 1:
        if not chosen("do_sample"):
            raise ValueError(f"num_return_sequences={copies}: the answers to a prompt differ only with do_sample=True.")
        config.num_return_sequences = 1
    real = _real(ids, attention_mask, pad, eos).repeat_interleave(copies, 0)
    ids = ids.repeat_interleave(copies, 0)
    opened = [_open(row[keep].tolist(), SPEC) for row, keep in zip(ids, real, strict=True)]
    tails = [[*added, *SPEC.end_think_ids] for _, added in opened]
    prefixes = [[*prompt, *SPEC.end_think_ids] for prompt, _ in opened]

    limit = _limit(chosen("max_new_tokens"), chosen("max_length"), ids.shape[1] + max(len(tail) for tail in tails))
    changes = {"min_latents": min_latents, "max_latents": max_latents, "noise_scale": noise_scale}
    spec = _changed({key: value for key, value in changes.items() if value is not None})
    spec = dataclasses.replace(spec, max_answer_tokens=limit, eos_id=eos[0], pad_id=pad)
    config.max_new_tokens, config.max_length = limit, None
    sampled = bool(chosen("do_sample"))
    if sampled and chosen("top_k") is None:
        config.top_k = 0  # `transformers` would take 50, which these models were not evaluated with
    strings = config.stop_strings
    config.stop_strings = None

    def prepared(prompts: list[list[int]]) -> dict[str, Any]:
        """Return what `transformers` makes of the settings, for `</think>` as the end of the prompts."""
        width = max(len(prompt) for prompt in prompts)
        padded = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=ids.device)
        return GenerationMixin.generate(  # type: ignore[no-any-return]
            model,
            padded,
            generation_config=config,
            logits_processor=LogitsProcessorList(logits_processor or ()),
            stopping_criteria=StoppingCriteriaList(stopping_criteria or ()),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=ids.device),
            custom_generate=lambda model, input_ids, **made: made,
        )

    made = prepared(prefixes)
    shared, own = made["logits_processor"], []
    if not all(type(each).__name__.endswith(SCORES_ONLY) for each in shared):
        own = [prepared([prefix])["logits_processor"] for prefix in prefixes]
    # the engine itself keeps to the limit, and stops at the first EOS
    known = (MaxLengthCriteria, EosTokenCriteria) if len(eos) == 1 else MaxLengthCriteria
    given = list(stopping_criteria or ())
    criteria = StoppingCriteriaList(c for c in made["stopping_criteria"] if c in given or not isinstance(c, known))
    stops = None
    if strings:
        if tokenizer is None:
            raise ValueError("stop_strings: expected the tokenizer as well: generate(..., tokenizer=tokenizer).")
        texts = [strings] if isinstance(strings, str) else strings

        def stops(answer: list[int]) -> bool:
            text = tokenizer.decode(answer)
            return any(each in text for each in texts)

    as_object = return_latents or bool(chosen("return_dict_in_generate"))
    wanted = {key for key in ("scores", "logits") if as_object and chosen(f"output_{key}")}
    writer = None
    if sampled or shared or criteria or strings or streamer is not None or wanted:
        writer = Writer(spec, ids, tails, shared, own, prefixes, criteria, stops, streamer, bool(wanted))
    sampling = None
    if sampled or noise_scale:
        sampling = Sampling(
            temperature=float(sampled), latent_noise=bool(noise_scale), seed=int(torch.randint(2**31, ()))
        )
    if streamer is not None:
        streamer.put(ids.cpu())
    thoughts = _beside(model, how) if isinstance(how, ThoughtSpec) else None
    decoded = decode(
        model,
        spec,
        [prompt for prompt, _ in opened],
        thinker="latent" if how is None else how.thinker,
        thoughts=thoughts,
        mixture=None if isinstance(how, ThoughtSpec) else how,
        sampling=sampling,
        write=writer,
        batch_size=batch_size,
    )
    if streamer is not None:
        streamer.end()
    cuts = [None] * len(tails) if writer is None else writer.cut
    written = [
        [*tail, *row.answer_ids, *([spec.eos_id] if row.finished else [])][:cut]
        for tail, row, cut in zip(tails, decoded, cuts, strict=True)
    ]
    width = max(len(row) for row in written)
    padded = [row + [pad] * (width - len(row)) for row in written]
    sequences = torch.cat([ids, torch.tensor(padded, dtype=ids.dtype, device=ids.device)], dim=1)
    if not as_object:
        return sequences
    output = _with_latents(sequences, decoded, spec)
    for key in wanted:
        assert writer is not None
        output[key] = writer.stacked(getattr(writer, key), width)
    return output


def _real(ids: Tensor, mask: Tensor | None, pad: int, eos: list[int]) -> Tensor:
    """Return which ids are not padding, `[B, P]`; without a mask by the pad id, as `transformers` does."""
    if mask is not None:
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask: got shape {list(mask.shape)}, expected {list(ids.shape)} as input_ids.")
        return mask.bool()
    if pad not in eos:
        return ids != pad
    if len(ids) > 1 and (ids[:, [0, -1]] == pad).any():
        raise ValueError(f"attention_mask: needed here, since the pad id {pad} is an end of sequence too.")
    return torch.ones_like(ids, dtype=torch.bool)


def _limit(new: int | None, total: int | None, before: int) -> int:
    limit = SPEC.max_answer_tokens if new is None else new
    limit = limit if total is None else min(limit, total - before)
    if limit < 1:
        raise ValueError(f"max_length: got {total}, expected more than the {before} ids of the prompt and </think>.")
    return limit


def _changed(limits: dict[str, Any]) -> LatentSpec:
    for key in ("min_latents", "max_latents"):
        least = SPEC.min_latents if key == "max_latents" and "min_latents" not in limits else 0
        if limits.get(key, least) < least:
            raise ValueError(f"{key}: got {limits[key]}, expected an integer >= {least}.")
    return dataclasses.replace(SPEC, **limits)


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
    kept = max((row.latent_ids.shape[-1] for row in decoded if row.latent_ids is not None), default=spec.top_k)
    ids = torch.full((len(decoded), most, kept), spec.pad_id)
    weights = torch.zeros(len(decoded), most, kept)
    said = torch.full((len(decoded), max((len(row.thought_ids) for row in decoded), default=0)), spec.pad_id)
    for b, row in enumerate(decoded):
        ids[b, : row.num_steps] = row.latent_ids
        weights[b, : row.num_steps] = row.latent_weights
        said[b, : len(row.thought_ids)] = torch.tensor(row.thought_ids, dtype=torch.long)
    embeds = [row.latent_embeds for row in decoded if row.latent_embeds is not None]  # all of them or none
    return LatentOutput(
        sequences=sequences,
        latent_ids=ids.to(sequences.device),
        latent_weights=weights.to(sequences.device),
        num_latents=torch.tensor([row.num_steps for row in decoded], device=sequences.device),
        thoughts=said.to(sequences.device) if isinstance(HOW, SpanCode) else None,
        latent_embeds=torch.stack(embeds).to(sequences.device) if embeds else None,
    )
