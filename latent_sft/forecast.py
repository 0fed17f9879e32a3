"""What an experiment will need on a cluster: memory per GPU at every ZeRO level, steps, tokens and time.

The formulas are in `memory.py`, what they are given in `sizes.py`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latent_sft.config.experiment import Config
from latent_sft.config.schema import LaunchConfig
from latent_sft.config.training import TrainConfig
from latent_sft.errors import ConfigError
from latent_sft.memory import (
    GIB,
    LEVELS,
    Backbone,
    Level,
    Numbers,
    Weights,
    activations,
    buffers,
    itemsize,
    logits,
    model_states,
)
from latent_sft.method.losses import CHUNK_BYTES_ACCELERATOR
from latent_sft.method.types import LatentSpec
from latent_sft.methods import STAGES
from latent_sft.sizes import Examples, Load, given_examples, load_of, measure, plan_setup, read_examples
from latent_sft.train.zero import BUCKET

# of the GPU's memory; the rest is left to the CUDA context, NCCL, fragmentation and validation
USABLE = 0.9


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
    stages = [stage for stage in STAGES if config.stage(stage).enabled]
    examples = given_examples(config, count, example_tokens) if count and example_tokens else read_examples(config)
    backbone = measure(config, examples.spec.vocab_size)
    adapters = f", {backbone.adapters / 1e6:,.1f} M in adapters" if backbone.adapters else ""
    lines = [
        "",
        f"# {_count(gpus, 'GPU')} of {gpu_memory:g} GiB; {backbone.size / 1e6:,.1f} M parameters in "
        f"{config.model.dtype}{adapters}; {examples.count:,} rows. GiB per GPU; * fits {USABLE:.0%} "
        "(docs/internals/plan.md)",
    ]
    fitting = list(_levels(config))
    for stage in stages:
        block, fits = _block(config, stage, backbone, examples, gpus, gpu_memory, tokens_per_second)
        lines += ["#", *block]
        fitting = [level for level in fitting if level in fits]
    return "\n".join([*lines, "#", f"# {_advice(fitting, config)}", ""])


def _block(
    config: Config,
    stage: str,
    backbone: Backbone,
    examples: Examples,
    gpus: int,
    gpu_memory: float,
    tokens_per_second: float | None,
) -> tuple[list[str], list[Level]]:
    """Return the lines of one stage and the levels that fit."""
    train, load = (
        config.stage(stage).shared(STAGES[stage].section, gpus),
        load_of(stage, plan_setup(config, stage, examples), examples),
    )
    levels = _levels(config)
    # what is trained as a whole is float32 without ZeRO, which else keeps such copies itself
    under = {zero: replace(config, launch=LaunchConfig(zero=zero)) for zero in {level.zero for level in levels}}
    setups = {zero: plan_setup(each, stage, examples) for zero, each in under.items()}
    weights = [STAGES[stage].parameters(backbone, setups[level.zero]) for level in levels]
    works = [
        _work(under[level.zero], stage, held, backbone, load, examples.spec)
        for held, level in zip(weights, levels, strict=True)
    ]
    states = [model_states(held, level, gpus) for held, level in zip(weights, levels, strict=True)]
    buffer = [buffers(held, level, BUCKET) for held, level in zip(weights, levels, strict=True)]
    totals = [s.gpu + extra + sum(work) for s, extra, work in zip(states, buffer, works, strict=True)]
    fits = [level for level, total in zip(levels, totals, strict=True) if total <= USABLE * gpu_memory * GIB]
    steps, tokens = _extent(train, load, examples.count, gpus)
    rate = tokens_per_second or _measured(Path(config.directory) / stage)
    clock = "time unknown (--tokens-per-second)" if rate is None else f"{_duration(tokens / rate)} at {rate:,.0f}/s"
    how = "gradient checkpointing" if train.gradient_checkpointing else "no gradient checkpointing"
    alike = weights[0] == weights[-1]
    lines = [
        f"# {stage}: {weights[0].trained / 1e6:,.1f} M trained, {weights[0].bytes / GIB:.2f} GiB of weights; {steps:,} "
        f"steps, {tokens:.3g} tokens, {clock}",
        f"#   micro-batch of {_count(load.rows, 'row')}, {load.positions:,} positions"
        + (f" and {load.encoder_positions:,} of the encoder" if load.encoder_positions else "")
        + f"; {how}, {under[0].precision(stage)} mixed precision",
        f"#   activations {works[0][0] / GIB:.2f}, loss and logits {works[0][1] / GIB:.2f}"
        + (", at every level" if alike else ""),
    ]
    if not alike:
        lines.append(
            f"#   with ZeRO in {config.model.dtype}: {weights[-1].bytes / GIB:.2f} GiB of weights, activations "
            f"{works[-1][0] / GIB:.2f}, loss and logits {works[-1][1] / GIB:.2f}"
        )
    lines.append("#   launch.zero  launch.offload  model states  buffers    total   host memory of a node")
    for level, state, extra, total in zip(levels, states, buffer, totals, strict=True):
        mark, host = "*" if level in fits else " ", f"{state.host / GIB:.2f}" if state.host else ""
        lines.append(
            f"#   {level.zero:>11}  {level.offload:<14}{state.gpu / GIB:>14.2f}{extra / GIB:>9.2f}"
            f"{total / GIB:>9.2f}{mark}{host:>24}".rstrip()
        )
    return lines, fits


def _levels(config: Config) -> Sequence[Level]:
    # as the configuration allows
    return LEVELS[:1] if any(config.precision(stage) == "fp16" for stage in STAGES) else LEVELS


def _work(
    config: Config, stage: str, held: Weights, backbone: Backbone, load: Load, spec: LatentSpec
) -> tuple[int, int]:
    """Return the bytes of activations, and of loss and logits, of a micro-batch."""
    train, lora, weight = config.stage(stage), config.model.lora, itemsize(config.trained_model)
    products = weight if config.precision(stage) == "no" else 2
    numbers = Numbers(weight, products, 4 if lora.rank else 0, bool(lora.rank and lora.dropout))
    kept = sum(
        activations(backbone.shape, numbers, positions, checkpointing=train.gradient_checkpointing)
        for positions in (load.positions, load.encoder_positions)
        if positions
    )
    # the K table rows of every latent that is a superposition, for the mixture and for the projection; where K is the
    # whole vocabulary no row but ids, logits and weights of it
    entry = backbone.shape.hidden * numbers.weight
    entry = entry if spec.top_k < spec.vocab_size else min(entry, 24)
    kept += load.superposed * spec.top_k * entry * (2 if load.encoder_positions else 1)
    return kept, logits(backbone.shape, numbers, load.labels, trained=held.trains_head, chunk=CHUNK_BYTES_ACCELERATOR)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _advice(fitting: list[Level], config: Config) -> str:
    if not fitting:
        return (
            "no level fits every stage: use gradient_checkpointing=true, a smaller batch_size with global_batch_size, "
            "adapters (model.lora.rank) on model.dtype=bfloat16, or more GPUs"
        )
    best = fitting[0]
    settings = f"launch.zero={best.zero}" + ("" if best.offload == "none" else f" launch.offload={best.offload}")
    chosen = Level(config.launch.zero, config.launch.offload)
    verdict = (
        "as configured"
        if chosen == best
        else f"configured: {chosen}, which {'fits' if chosen in fitting else 'does not fit'}"
    )
    return f"the smallest that fits every stage: {settings} ({verdict})"


def _extent(train: TrainConfig, load: Load, count: int, gpus: int) -> tuple[int, float]:
    """Return optimizer steps and decoder tokens of a stage."""
    a_step = load.rows * train.accumulation * gpus
    if train.max_tokens:  # batches of the average row are larger than those of the longest
        a_step = max(1, int(train.max_tokens / load.tokens)) * train.accumulation * gpus
    if train.max_steps:
        return train.max_steps, train.max_steps * a_step * load.tokens
    return math.ceil(train.epochs * count / a_step), train.epochs * count * load.tokens


def _measured(folder: Path) -> float | None:
    """Return the median `train/tokens_per_second` of a stage that has run, or None."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rates = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    return statistics.median(rates) if rates else None


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"
