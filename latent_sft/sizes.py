"""How large the models of an experiment are and how much its stages compute, without loading or training anything.

The model is built on the `meta` device from its config.json; batches are made from a sample of the training set.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from latent_sft.config.experiment import Config
from latent_sft.data.prompts import build_spec, fix_date, tokenize_record
from latent_sft.data.records import load_splits
from latent_sft.errors import ConfigError, LatentSFTError
from latent_sft.memory import Backbone, Shape
from latent_sft.method.layout import Kind, fixed_segments
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.methods import STAGES, method_of
from latent_sft.methods.base import Setup
from latent_sft.models.backbone import core, head_table, input_table
from latent_sft.models.load import add_lora, load_config, load_tokenizer, tiny_hf_config
from latent_sft.models.tiny_tokenizer import build_tokenizer

SAMPLE = 256
WITHOUT_DATA = "To plan without reading data, give --rows N and --example-tokens PROMPT,COT,ANSWER."


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
    superposed: int
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


def plan_setup(config: Config, stage: str, examples: Examples) -> Setup:
    """Return what the functions of a stage are given while nothing is there yet: no tokenizer, uniform latents."""
    spec, lengths = examples.spec, {r["id"]: len(r["segment_lengths"]) for r in (*examples.sample, *examples.longest)}

    def latents(row_id: str, _: str) -> Superposition:
        size = (lengths[row_id], spec.top_k)
        return Superposition(torch.zeros(size, dtype=torch.int64), torch.full(size, 1 / spec.top_k))

    return Setup(
        settings=config.settings(method_of(stage).settings),
        train=config.stage(stage),
        model=config.model,
        trained_model=config.trained_model,
        spec=spec,
        tokenizer=None,
        start="",
        source="",
        base="",
        root="",
        latents=latents if STAGES[stage].reads is not None else None,
    )


def load_of(stage: str, setup: Setup, examples: Examples) -> Load:
    """Return how much a stage computes, from batches made as training makes them."""
    collate, train = STAGES[stage].batch(setup), setup.train
    sample = collate(examples.sample)
    rows = train.batch_size
    if train.max_tokens:
        one = collate(examples.longest[:1])
        width = max(one[key].shape[1] for key in ("kind", "encoder_kind") if key in one)
        rows = max(1, train.max_tokens // width)
    batch = collate(list(itertools.islice(itertools.cycle(examples.longest), rows)))
    superposes = "encoder_kind" in batch or "latent_ids" in batch
    return Load(
        tokens=(sample["kind"] != Kind.PAD).sum().item() / len(examples.sample),
        rows=rows,
        positions=batch["kind"].numel() + rows * STAGES[stage].more_positions(setup),
        encoder_positions=batch["encoder_kind"].numel() if "encoder_kind" in batch else 0,
        superposed=int((batch["kind"] == Kind.LATENT).sum()) if superposes else 0,
        labels=sum(len(part) for key, part in batch.items() if key.endswith("targets") or key == "kl_index"),
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
    # two steps, so that a method that leaves the last one out still reads nearly all of it
    rows = [{**row, "segment_lengths": fixed_segments(cot, spec.rate), "step_lengths": [cot - 1, 1]}]
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
        spec = build_spec(tokenizer, config.prompt, config.latent, vocab_size)
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


def _numel(lm: torch.nn.Module) -> int:
    return sum(p.numel() for p in core(lm).parameters())
