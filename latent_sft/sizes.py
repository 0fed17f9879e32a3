"""How large the models of an experiment are and how much its stages compute, without loading or training anything.

The model is built on the `meta` device from its config.json; batches are made from a sample of the training set.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from latent_sft.config.schema import Config, ModelConfig, SelfDistillConfig
from latent_sft.data.collate import Batch, explicit_batch, stage1_batch, stage2_batch
from latent_sft.data.prompts import build_spec, fix_date, tokenize_record
from latent_sft.data.records import load_splits
from latent_sft.data.thought_batches import coconut_batch, distill_batch
from latent_sft.errors import ConfigError, LatentSFTError
from latent_sft.memory import Shape, Weights
from latent_sft.method.layout import Kind, fixed_segments
from latent_sft.method.types import LatentSpec, Superposition, ThoughtSpec
from latent_sft.models.backbone import core, head_table, input_table
from latent_sft.models.load import add_lora, load_config, load_tokenizer, tiny_hf_config
from latent_sft.models.tiny_tokenizer import build_tokenizer

SAMPLE = 256
SELF_DISTILLED = ("codi", "pccot", "kava")
WITHOUT_DATA = "To plan without reading data, give --rows N and --example-tokens PROMPT,COT,ANSWER."


class Backbone(NamedTuple):
    """One language model: its sizes, parameters, those of an untied head, its largest module, and LoRA's."""

    shape: Shape
    size: int
    head: int
    largest: int
    adapters: int


class Examples(NamedTuple):
    """The training set: rows, a random sample of them, the longest ones, and the spec they were tokenised with."""

    count: int
    sample: list[dict[str, Any]]
    longest: list[dict[str, Any]]
    spec: LatentSpec


class Load(NamedTuple):
    """What a stage computes: decoder tokens a row on average, and the sizes of its largest micro-batch."""

    tokens: float
    rows: int
    positions: int
    encoder_positions: int
    latents: int
    labels: int


def measure(config: Config, vocab_size: int) -> Backbone:
    """Return the sizes of the base model, built without memory; `vocab_size` counts for a tiny one only.

    Raises:
        ConfigError: there is no config.json to be had, or it is no causal decoder's.
    """
    hf_config = _hf_config(config, vocab_size)
    text = hf_config.get_text_config()
    with torch.device("meta"):
        try:
            lm = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, config.model.dtype))
        except ValueError as error:
            raise ConfigError(f"model.name_or_path: not a causal decoder ({str(error).splitlines()[0]}).") from error
        size, tied = _numel(lm), head_table(lm) is input_table(lm)
        largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in lm.modules())
        head = 0 if tied else head_table(lm).numel()
        adapters = 0
        if config.model.lora.rank:
            adapters = sum(p.numel() for p in add_lora(lm, config.model.lora).parameters() if p.requires_grad)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    shape = Shape(
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads * head_size,
        groups * head_size,
        inner,
        text.vocab_size,
    )
    return Backbone(shape, size, head, largest, adapters)


def weights_of(config: Config, stage: str, backbone: Backbone) -> Weights:
    """Return the parameters a stage holds: one model, or the encoder and decoder of stage 1 and the marker."""
    item, whole, adapters = itemsize(config.model), itemsize(config.trained_model), backbone.adapters
    if not stage.startswith("stage1"):
        extra = _thought_weights(config, stage, backbone.shape.hidden)
        if adapters:
            trained = adapters + extra
            return Weights(trained, 4 * trained, item * backbone.size, backbone.largest, item)
        return Weights(backbone.size + extra, whole * (backbone.size + extra), 0, backbone.largest, whole)
    encoder, decoder = stage != "stage1-decoder", stage != "stage1-encoder"
    marker = backbone.shape.hidden
    if adapters:  # in float32, as PEFT and the marker keep them
        held = (1 if config.stage1.share_backbone else 2) * item * backbone.size
        trained = adapters * (encoder + decoder) + marker * encoder
        idle = 4 * adapters * (2 - encoder - decoder) if config.stage1.share_backbone else 0
        return Weights(trained, 4 * trained, held + idle + 4 * marker * (not encoder), backbone.largest, item)
    held = backbone.size * ((whole if encoder else item) + (whole if decoder else item))
    # the encoder's own head is not part of the loss
    trained = (backbone.size - backbone.head) * encoder + backbone.size * decoder
    trained_bytes = whole * trained + 4 * marker * encoder
    frozen_bytes = held + 4 * marker - trained_bytes
    return Weights(trained + marker * encoder, trained_bytes, frozen_bytes, backbone.largest, whole)


def _thought_weights(config: Config, stage: str, hidden: int) -> int:
    """Return the parameters of `models.thoughts.Thoughts`: projection and placeholder."""
    if stage not in SELF_DISTILLED:
        return 0
    settings: SelfDistillConfig = getattr(config, stage)
    # two linear maps with biases, scale and shift of the norm
    projection = 2 * (hidden * hidden + hidden) + 2 * hidden if settings.projection else 0
    return projection + hidden * (settings.iterations < settings.num_latents)


def load_of(config: Config, stage: str, examples: Examples) -> Load:
    """Return how much a stage computes, from batches made as training makes them."""
    train = config.stage(stage)
    sample = _batch(config, stage, examples.sample, examples.spec)
    rows = train.batch_size
    if train.max_tokens:
        one = _batch(config, stage, examples.longest[:1], examples.spec)
        width = max(one[key].shape[1] for key in ("kind", "encoder_kind") if key in one)
        rows = max(1, train.max_tokens // width)
    batch = _batch(config, stage, list(itertools.islice(itertools.cycle(examples.longest), rows)), examples.spec)
    again = 0  # latents of the iterations after the first
    if stage in SELF_DISTILLED:
        settings: SelfDistillConfig = getattr(config, stage)
        passes = settings.iterations + 1 if settings.iterations < settings.num_latents else 1
        again = rows * settings.num_latents * (passes - 1)
    # the decoder phase reads stored latents
    encodes = "encoder_kind" in batch and stage != "stage1-decoder"
    return Load(
        tokens=(sample["kind"] != Kind.PAD).sum().item() / len(examples.sample),
        rows=rows,
        positions=batch["kind"].numel() + again,
        encoder_positions=batch["encoder_kind"].numel() if encodes else 0,
        latents=int((batch["kind"] == Kind.LATENT).sum()),
        labels=len(batch["targets"]) + len(batch.get("teacher_targets", ())) + len(batch.get("kl_index", ())),
    )


def _batch(config: Config, stage: str, rows: list[dict[str, Any]], spec: LatentSpec) -> Batch:
    train = config.stage(stage)
    if stage in SELF_DISTILLED:
        settings: SelfDistillConfig = getattr(config, stage)
        thoughts = ThoughtSpec(num_latents=settings.num_latents, iterations=settings.iterations)
        # the last step stays: how many tokens it has, made-up rows do not say
        return distill_batch(rows, spec, thoughts, normalisation=train.normalisation, drop_last_step=False)
    if stage == "coconut":  # the first stage is the longest
        first = [{**row, "stage": 0} for row in rows]
        return coconut_batch(first, spec, config.coconut, normalisation=train.normalisation)
    if stage.startswith("stage1"):
        return stage1_batch(rows, spec, normalisation=train.normalisation)
    if stage == "stage2":

        def label(row_id: str, _: str) -> Superposition:
            size = (latents[row_id], spec.top_k)
            return Superposition(torch.zeros(size, dtype=torch.int64), torch.full(size, 1 / spec.top_k))

        latents = {row["id"]: len(row["segment_lengths"]) for row in rows}
        return stage2_batch(rows, spec, label_of=label, normalisation=train.normalisation)
    return explicit_batch(
        rows,
        spec,
        with_cot=stage == "cot",
        normalisation=train.normalisation,
        prompt_targets=train.prompt_targets,
    )


def given_examples(config: Config, count: int, tokens: tuple[int, int, int]) -> Examples:
    """Return a training set of `count` equal rows of `tokens` (prompt, CoT, answer); no tokenizer is needed."""
    prompt, cot, answer = tokens
    if min(count, *tokens) < 1:
        raise ConfigError(f"plan: got --rows {count} --example-tokens {tokens}, expected numbers of 1 or more.")
    vocab_size = config.model.tiny.vocab_size
    if config.model.name_or_path:
        vocab_size = _hf_config(config, 0).get_text_config().vocab_size
    # three tokens of </think>, as most tokenizers write it
    spec = LatentSpec(
        think_ids=(0,),
        end_think_ids=(0, 0, 0),
        eos_id=0,
        pad_id=0,
        vocab_size=vocab_size,
        rate=config.latent.rate,
        top_k=config.latent.top_k or vocab_size,
    )
    row = {"id": "0", "hash": "", "prompt": [0] * prompt, "cot": [0] * cot, "answer": [0] * answer}
    rows = [{**row, "segment_lengths": fixed_segments(cot, spec.rate)}]
    return Examples(count, rows, rows, spec)


def read_examples(config: Config) -> Examples:
    """Tokenise a sample of the training set, and its longest rows by characters."""
    model = config.model
    try:
        train = load_splits(config.data).train
        if model.name_or_path:
            vocab_size = _hf_config(config, 0).get_text_config().vocab_size
            tokenizer = load_tokenizer(model.name_or_path, model)
            fix_date(tokenizer, config.prompt.date)
        else:
            texts = (text for r in train for text in (r.problem, r.cot, r.cot_answer))
            tokenizer = build_tokenizer(texts, model.tiny, config.prompt)
            vocab_size = len(tokenizer)
        spec = build_spec(tokenizer, config, vocab_size)
        chosen = random.Random(0).sample(train, min(SAMPLE, len(train)))
        longest = sorted(train, key=lambda r: len(r.problem) + len(r.cot) + len(r.answer))[-SAMPLE:]
        sample, long = ([tokenize_record(tokenizer, spec, r) for r in part] for part in (chosen, longest))
    except LatentSFTError as error:
        raise type(error)(f"{error} {WITHOUT_DATA}") from error
    return Examples(len(train), sample, sorted(long, key=lambda row: -row["length"]), spec)


def _hf_config(config: Config, vocab_size: int) -> Any:
    model, tiny = config.model, config.model.tiny
    try:
        if model.name_or_path:
            return load_config(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        return tiny_hf_config(tiny, vocab_size=vocab_size, pad_token_id=None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name_or_path: no config.json of {model.name_or_path or tiny.model_type!r} here or on the Hub "
            f"({str(error).splitlines()[0]}). A plan needs no weights: put the model's config.json into a folder and "
            "give model.name_or_path=FOLDER."
        ) from error


def itemsize(model: ModelConfig) -> int:
    """Return the bytes of one weight."""
    return getattr(torch, model.dtype).itemsize


def _numel(lm: torch.nn.Module) -> int:
    return sum(p.numel() for p in core(lm).parameters())
