"""What an experiment will need on a cluster: memory per GPU at every ZeRO level, steps, tokens and time.

Nothing is loaded or trained: the model is built on the `meta` device from its config.json, and batches are made from a
sample of the training set by the code that makes them in training. The formulas are in `memory.py`.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from latent_sft import memory
from latent_sft.config.experiment import Config
from latent_sft.config.schema import LaunchConfig
from latent_sft.config.training import TrainConfig
from latent_sft.data.prompts import build_spec, fix_date, tokenize_record
from latent_sft.data.records import Splits, load_splits
from latent_sft.errors import ConfigError, LatentSFTError
from latent_sft.memory import GIB, LEVELS, Backbone, Level, Shape
from latent_sft.method.layout import Kind, fixed_segments
from latent_sft.method.losses import CHUNK_BYTES_ACCELERATOR
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.methods import STAGES, method_of
from latent_sft.methods.base import Setup
from latent_sft.models.backbone import head_table, input_table, unwrap_peft
from latent_sft.models.load import add_lora, load_config, load_tokenizer, tiny_hf_config
from latent_sft.models.tiny_tokenizer import build_tokenizer
from latent_sft.train.zero import BUCKET

# of the GPU's memory; the rest is left to the CUDA context, NCCL, fragmentation and validation
USABLE = 0.9
SAMPLE = 256
WITHOUT_DATA = "To plan without reading data, give --rows N and --example-tokens PROMPT,COT,ANSWER."


class Examples(NamedTuple):
    """The training set: rows, a random sample of them, the longest ones, and the spec they were tokenised with."""

    count: int
    sample: list[dict[str, Any]]
    longest: list[dict[str, Any]]
    spec: LatentSpec


class Load(NamedTuple):
    """What a stage computes: decoder tokens per row on average, and the sizes of its largest micro-batch."""

    tokens: float
    rows: int
    positions: int
    encoder_positions: int
    superposed: int
    labels: int


class Need(NamedTuple):
    """What a stage needs at a level: parameters, and bytes on a GPU."""

    level: Level
    weights: memory.Weights
    states: memory.States
    buffers: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return self.states.gpu + self.buffers + self.activations + self.logits


def forecast(
    config: Config,
    gpus: int,
    gpu_memory: float,
    *,
    tokens_per_second: float | None = None,
    count: int | None = None,
    example_tokens: tuple[int, int, int] | None = None,
) -> str:
    """Return the plan of a cluster job as comment lines of a shell script.

    Args:
        config: the experiment.
        gpus: N, all nodes together.
        gpu_memory: of one GPU, GiB.
        tokens_per_second: as `train/tokens_per_second` counts them, all GPUs; None takes what finished stages of this
            run directory measured.
        count: rows of the training set; None counts them.
        example_tokens: prompt, CoT and answer of a row; None tokenises a sample.

    Raises:
        ConfigError: no model sizes or no data to be had, and what to give instead.
    """
    if gpus < 1 or gpu_memory <= 0:
        raise ConfigError(f"plan: got --gpus {gpus} --gpu-memory {gpu_memory:g}, expected numbers > 0.")
    if (count is None) != (example_tokens is None):
        raise ConfigError("plan: --rows and --example-tokens belong together; give both or neither.")
    examples = given_examples(config, count, example_tokens) if count and example_tokens else read_examples(config)
    backbone = measure(config, examples.spec.vocab_size)
    adapters = f", {backbone.adapters / 1e6:,.1f} M in adapters" if backbone.adapters else ""
    lines = [
        "",
        f"# {_count(gpus, 'GPU')} of {gpu_memory:g} GiB; {backbone.size / 1e6:,.1f} M parameters in "
        f"{config.model.dtype}{adapters}; {examples.count:,} rows. GiB per GPU; * fits {USABLE:.0%} "
        "(docs/internals/plan.md)",
    ]
    # ZeRO takes no float16
    fitting = list(LEVELS[:1] if any(config.precision(stage) == "fp16" for stage in STAGES) else LEVELS)
    levels = tuple(fitting)
    for stage in STAGES:
        if not config.stage(stage).enabled:
            continue
        load = load_of(stage, plan_setup(config, stage, examples), examples)
        needs = [need_of(config, stage, level, gpus, backbone, examples, load) for level in levels]
        fits = [need.level for need in needs if need.total <= USABLE * gpu_memory * GIB]
        fitting = [level for level in fitting if level in fits]
        train = config.stage(stage).shared(STAGES[stage].section, gpus)
        steps, tokens = _extent(train, load, examples.count, gpus)
        rate = tokens_per_second or _measured(Path(config.directory) / stage)
        clock = "time unknown (--tokens-per-second)" if rate is None else f"{_duration(tokens / rate)} at {rate:,.0f}/s"
        first, last = needs[0], needs[-1]
        alike = first.weights == last.weights
        work = "activations {:.2f}, loss and logits {:.2f}".format
        lines += [
            "#",
            f"# {stage}: {first.weights.trained / 1e6:,.1f} M trained, {first.weights.bytes / GIB:.2f} GiB of weights; "
            f"{steps:,} steps, {tokens:.3g} tokens, {clock}",
            f"#   micro-batch of {_count(load.rows, 'row')}, {load.positions:,} positions"
            + (f" and {load.encoder_positions:,} of the encoder" if load.encoder_positions else "")
            + f"; {'' if train.gradient_checkpointing else 'no '}gradient checkpointing, "
            f"{replace(config, launch=LaunchConfig()).precision(stage)} mixed precision",
            f"#   {work(first.activations / GIB, first.logits / GIB)}" + (", at every level" if alike else ""),
        ]
        if not alike:
            lines.append(
                f"#   with ZeRO in {config.model.dtype}: {last.weights.bytes / GIB:.2f} GiB of weights, "
                + work(last.activations / GIB, last.logits / GIB)
            )
        lines.append("#   launch.zero  launch.offload  model states  buffers    total   host memory of a node")
        for need in needs:
            mark, host = "*" if need.level in fits else " ", need.states.host
            lines.append(
                f"#   {need.level.zero:>11}  {need.level.offload:<14}{need.states.gpu / GIB:>14.2f}"
                f"{need.buffers / GIB:>9.2f}{need.total / GIB:>9.2f}{mark}"
                f"{f'{host / GIB:.2f}' if host else '':>24}".rstrip()
            )
    return "\n".join([*lines, "#", f"# {_advice(fitting, config)}", ""])


def measure(config: Config, vocab_size: int) -> Backbone:
    """Return the sizes of the base model, built without memory; `vocab_size` counts for a tiny one only.

    Raises:
        ConfigError: there is no config.json to be had, or it is no causal decoder's.
    """
    hf_config = _hf_config(config, vocab_size)
    with torch.device("meta"):
        try:
            lm = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, config.model.dtype))
        except ValueError as error:
            raise ConfigError(f"model.name_or_path: not a causal decoder ({str(error).splitlines()[0]}).") from error
        size = sum(p.numel() for p in unwrap_peft(lm).parameters())
        head = 0 if head_table(lm) is input_table(lm) else head_table(lm).numel()
        largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in lm.modules())
        adapters = 0
        if config.model.lora.rank:
            adapters = sum(p.numel() for p in add_lora(lm, config.model.lora).parameters() if p.requires_grad)
    text = hf_config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    head_size = getattr(text, "head_dim", None) or hidden // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    shape = Shape(text.num_hidden_layers, hidden, heads * head_size, groups * head_size, inner, text.vocab_size)
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
    rows = train.micro_batch_size
    if train.max_tokens:
        one = collate(examples.longest[:1])
        rows = max(1, train.max_tokens // max(one[key].shape[1] for key in ("kind", "encoder_kind") if key in one))
    batch = collate(list(itertools.islice(itertools.cycle(examples.longest), rows)))
    superposes = "encoder_kind" in batch or "latent_ids" in batch
    return Load(
        tokens=(sample["kind"] != Kind.PAD).sum().item() / len(examples.sample),
        rows=rows,
        positions=batch["kind"].numel() + rows * STAGES[stage].more_positions(setup),
        encoder_positions=batch["encoder_kind"].numel() if "encoder_kind" in batch else 0,
        superposed=int((batch["kind"] == Kind.LATENT).sum()) if superposes else 0,
        labels=sum(
            len(part) for key, part in batch.items() if key.endswith("targets") or key in ("kl_index", "span_index")
        ),
    )


def given_examples(config: Config, count: int, tokens: tuple[int, int, int]) -> Examples:
    """Return a training set of `count` equal rows of `tokens` (prompt, CoT, answer); no tokenizer is needed."""
    prompt, cot, answer = tokens
    if min(count, *tokens) < 1:
        raise ConfigError(f"plan: got --rows {count} --example-tokens {tokens}, expected numbers of 1 or more.")
    tiny = config.model.tiny.vocab_size
    vocab_size = _hf_config(config, 0).get_text_config().vocab_size if config.model.name_or_path else tiny
    latent = {"rate": config.latent.rate, "top_k": config.latent.top_k or vocab_size}
    # three tokens of </think>, as most tokenizers write it
    spec = LatentSpec(think_ids=(0,), end_think_ids=(0, 0, 0), eos_id=0, pad_id=0, vocab_size=vocab_size, **latent)
    row = {"id": "0", "hash": "", "prompt": [0] * prompt, "cot": [0] * cot, "answer": [0] * answer}
    # two steps, so that a method that leaves the last one out still reads nearly all of it
    rows = [{**row, "segment_lengths": fixed_segments(cot, spec.rate), "step_lengths": [cot - 1, 1]}]
    return Examples(count, rows, rows, spec)


def read_examples(config: Config) -> Examples:
    """Tokenise a sample of the training set, and its longest rows by characters."""
    try:
        train = (splits := load_splits(config.data)).train
        tokenizer, spec, _ = tokenizer_of(config, splits)
        chosen = random.Random(0).sample(train, min(SAMPLE, len(train)))
        longest = sorted(train, key=lambda r: len(r.problem) + len(r.cot) + len(r.answer))[-SAMPLE:]
        sample, long = ([tokenize_record(tokenizer, spec, r) for r in part] for part in (chosen, longest))
    except LatentSFTError as error:
        raise type(error)(f"{error} {WITHOUT_DATA}") from error
    shown = round(sum(splits.weights[record.source] for record in train))
    return Examples(shown, sample, sorted(long, key=lambda row: -row["length"]), spec)


def tokenizer_of(config: Config, splits: Splits) -> tuple[PreTrainedTokenizerBase, LatentSpec, int | None]:
    """Return tokenizer, spec and most positions of an experiment's model, without any weights."""
    model = config.model
    if model.name_or_path:
        sizes = _hf_config(config, 0).get_text_config()
        vocab_size, positions = sizes.vocab_size, getattr(sizes, "max_position_embeddings", None)
        tokenizer = load_tokenizer(model.name_or_path, model)
        fix_date(tokenizer, config.prompt.date)
    else:
        texts = (text for r in splits.train for text in (r.problem, r.cot, r.cot_answer))
        tokenizer = build_tokenizer(itertools.chain(texts, splits.words), model.tiny, config.prompt)
        vocab_size, positions = len(tokenizer), model.tiny.max_positions
    return tokenizer, build_spec(tokenizer, config.prompt, config.latent, vocab_size), positions


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


def need_of(
    config: Config, stage: str, level: Level, gpus: int, backbone: Backbone, examples: Examples, load: Load
) -> Need:
    """Return what a stage needs at a level; `load` is what `load_of` returns."""
    # what is trained as a whole is float32 without ZeRO, which else keeps such copies itself
    config = replace(config, launch=LaunchConfig(zero=level.zero))
    spec, lora, item = examples.spec, config.model.lora, memory.itemsize(config.trained_model)
    weights = STAGES[stage].parameters(backbone, plan_setup(config, stage, examples))
    products = item if config.precision(stage) == "no" else 2
    numbers = memory.Numbers(item, products, 4 if lora.rank else 0, bool(lora.rank and lora.dropout))
    checkpointing = config.stage(stage).gradient_checkpointing
    kept = sum(
        memory.activations(backbone.shape, numbers, positions, checkpointing=checkpointing)
        for positions in (load.positions, load.encoder_positions)
        if positions
    )
    # the K table rows of every latent that is a superposition, for the mixture and for the projection; where K is the
    # whole vocabulary no row but ids, logits and weights of it
    entry = backbone.shape.hidden * item
    entry = entry if spec.top_k < spec.vocab_size else min(entry, 24)
    return Need(
        level,
        weights,
        memory.model_states(weights, level, gpus),
        memory.buffers(weights, level, BUCKET),
        kept + load.superposed * spec.top_k * entry * (2 if load.encoder_positions else 1),
        memory.logits(backbone.shape, numbers, load.labels, trained=weights.trains_head, chunk=CHUNK_BYTES_ACCELERATOR),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _advice(fitting: Sequence[Level], config: Config) -> str:
    if not fitting:
        return (
            "no level fits every stage: use gradient_checkpointing=true, a smaller batch_size with global_batch_size, "
            "adapters (model.lora.rank) on model.dtype=bfloat16, or more GPUs"
        )
    best, chosen = fitting[0], Level(config.launch.zero, config.launch.offload)
    settings = f"launch.zero={best.zero}" + ("" if best.offload == "none" else f" launch.offload={best.offload}")
    verdict = f"configured: {chosen}, which {'fits' if chosen in fitting else 'does not fit'}"
    return f"the smallest that fits every stage: {settings} ({'as configured' if chosen == best else verdict})"


def _extent(train: TrainConfig, load: Load, count: int, gpus: int) -> tuple[int, float]:
    """Return optimizer steps and decoder tokens of a stage."""
    # token batches of the average row hold more rows than those of the longest
    rows = max(1, int(train.max_tokens / load.tokens)) if train.max_tokens else load.rows
    a_step = rows * train.gradient_accumulation_steps * gpus
    if train.max_steps:
        return train.max_steps, train.max_steps * a_step * load.tokens
    return math.ceil(train.epochs * count / a_step), train.epochs * count * load.tokens


def _measured(folder: Path) -> float | None:
    """Return the median `train/tokens_per_second` of a stage that has run, or None."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    rates = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    return statistics.median(rates) if rates else None


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"
