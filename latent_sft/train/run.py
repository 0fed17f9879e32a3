"""Train one stage: read this first.

    workspace -> stage (of a method) -> TrainingLoop (loop.py) -> <run>/<stage>/final

A stage that is finished is skipped; one that was interrupted, or is to train longer, goes on from its last complete
checkpoint; `finish_stage` ends one where it stands.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import set_seed

from latent_sft.config.experiment import Config
from latent_sft.config.training import TrainConfig
from latent_sft.data.mixing import Slots
from latent_sft.errors import ArtefactError, Interrupted, TrainingError
from latent_sft.experiment.stores import store_latents
from latent_sft.experiment.workspace import Workspace, processes
from latent_sft.inference.solve import as_rows
from latent_sft.methods import STAGES
from latent_sft.methods.base import Setup, Stage, TrainState
from latent_sft.models.backbone import unwrap_peft
from latent_sft.runs import Step, read_json
from latent_sft.train import hub, zero
from latent_sft.train.ending import check_length, departures, write_final
from latent_sft.train.guards import check_rows, said_if_alone
from latent_sft.train.interruption import MARKER, last_checkpoint, same_step, state_of
from latent_sft.train.loop import TrainingLoop
from latent_sft.train.metrics import check_reporters
from latent_sft.train.sampler import LengthBucketSampler, Phased, StepSampler, TokenBatchSampler

log = logging.getLogger(__name__)


def train_stage(config: Config, name: str, work: Workspace | None = None) -> Step:
    """Train a stage of an experiment, or return at once where it is finished.

    Args:
        config: the experiment.
        name: a stage of `latent_sft.methods.STAGES`.
        work: the opened experiment, where the caller has it.

    Returns:
        The finished step; its `final` folder holds the model.

    Raises:
        ConfigError: there is no such stage.
        ArtefactError: an earlier stage is missing, or the folder belongs to another experiment.
        TrainingError: training cannot go on.
        Interrupted: the process was told to stop; a checkpoint is written (see `train/interruption.py`).
    """
    train, stage = config.stage(name), STAGES[name]
    work = work or Workspace(config)
    with processes().main_process_first():  # it may read a whole model to know it
        if config.hub.repo and processes().is_main_process:
            hub.restore(work, name)
        step = work.step(name)
    if step.is_finished():
        log.info("%s: finished already, skipped (%s)", name, step.directory)
        return step
    check_reporters(config.report_to)
    source = work.source_of(name)
    if source is not None:
        source.results()
        log.info("%s: starts from %s", name, source.final)
    with processes().main_process_first():
        checkpoint = last_checkpoint(step.directory)
    history = departures(step, checkpoint, stage.section)
    train = same_step(train, stage.section, checkpoint, processes().num_processes)
    if checkpoint:
        zero.check_checkpoint(checkpoint, config.launch)
    deepspeed = zero.settings(config, train)
    if stage.reads is not None and not stage.reads.name:
        store_latents(work, name)
    elif stage.reads is not None:
        work.store_step(stage.reads).results()
    setup = dataclasses.replace(work.setup(name), train=train)
    set_seed(config.seed)
    zero.begin(config.launch)
    with zero.loading(config):
        model = stage.model(setup)
    zero.one_dtype(model, deepspeed)
    if train.gradient_checkpointing:
        checkpoint_activations(model)
    rows = as_rows(work.data["validation"], train.eval_examples)
    if stage.thinker(model).oracle is not None:
        rows = [r for r in rows if r["cot"]]
    if len(work.data["train"]) == 0 or not rows:
        raise TrainingError(f"{name}: no rows to train on or to validate with; check data.train and data.validation.")
    sampler = _sampler(stage, setup, work, train.gradient_accumulation_steps * processes().num_processes)
    check_rows(len(sampler), train, stage.section, processes().num_processes)
    setup = dataclasses.replace(setup, steps_per_epoch=sampler.steps_per_epoch())
    total = _total_steps(train, sampler)
    if checkpoint:
        check_length(step, state_of(checkpoint), total, stage.section)
    if processes().is_main_process:
        step.begin(config.seed, history)
    state = state_of(checkpoint) if checkpoint else TrainState(max_steps=total)
    state.max_steps = total
    ended = state.global_step == total or 0 < train.stop_at_accuracy <= (state.best_metric or 0.0)
    loop = TrainingLoop(
        step,
        stage,
        setup,
        work,
        config,
        model=model,
        rows=work.data["train"] if sampler.number is None else Phased(work.data["train"]),
        validation=rows,
        sampler=sampler,
        deepspeed=deepspeed,
        state=state,
    )
    uploads = hub.Uploads(config, step, state) if config.hub.repo and processes().is_main_process else None
    loop.callbacks += [uploads] if uploads else []
    with uploads or nullcontext():
        if not ended:  # else only the final folder was still to be written
            log.info("%s: %s", name, f"goes on from {checkpoint}" if checkpoint else "starts")
            log.info("%s: %s", name, _step_size(train, processes().num_processes))
            with said_if_alone(config.launch.timeout_minutes):
                loop.run(checkpoint)
        if processes().is_main_process:
            write_final(state, sampler, stage, setup, step, len(work.data["train"]))
    processes().wait_for_everyone()
    if loop.signals.requested:
        raise Interrupted(f"{name}: finished, and then stopped")
    return step


def finish_stage(config: Config, name: str, work: Workspace | None = None) -> Step:
    """End an interrupted stage where it stands: its best checkpoint becomes `final`, as if training had ended there.

    Args:
        config: the experiment.
        name: a stage of `latent_sft.methods.STAGES`; nothing may be training it.
        work: the opened experiment, where the caller has it.

    Returns:
        The finished step; its results say `ended_early`, and what is made from it has a fingerprint of its own.

    Raises:
        ArtefactError: there is no complete checkpoint, or the folder belongs to another experiment.
    """
    work = work or Workspace(config)
    step, stage = work.step(name), STAGES[name]
    if step.is_finished():
        log.info("%s: finished already (%s)", name, step.directory)
        return step
    checkpoint = last_checkpoint(step.directory)
    if checkpoint is None:
        raise ArtefactError(
            f"{step.directory}: no complete checkpoint, so there is nothing to finish with. `latent-sft train {name}` "
            f"writes one at every evaluation, or every {stage.section}.save_every steps, and when it is told to stop."
        )
    facts = read_json(Path(checkpoint) / MARKER)
    setup = work.setup(name)
    sampler = _sampler(stage, setup, work, facts["gradient_accumulation_steps"] * facts["processes"])
    step.begin(config.seed, departures(step, checkpoint, stage.section, ends=True))
    write_final(state_of(checkpoint), sampler, stage, setup, step, len(work.data["train"]), ended_early=True)
    return step


def _step_size(train: TrainConfig, num_processes: int) -> str:
    # a learning rate belongs to a batch, and fewer processes make it smaller where only their share is configured
    size = train.max_tokens or train.micro_batch_size
    unit = "positions at most" if train.max_tokens else "examples"
    return (
        f"a step takes {size * train.gradient_accumulation_steps * num_processes} {unit} ({size} a micro-batch x "
        f"accumulation {train.gradient_accumulation_steps} "
        f"x {num_processes} process{'es' if num_processes > 1 else ''})"
    )


def _total_steps(train: TrainConfig, sampler: StepSampler) -> int:
    return train.max_steps or math.ceil(train.epochs * sampler.steps_per_epoch())


def _sampler(stage: Stage, setup: Setup, work: Workspace, per_step: int) -> StepSampler:
    # both cut by what an optimizer step takes (`per_step` micro-batches), which the processes only share out
    data, seed, train = work.data["train"], work.config.seed, setup.train
    sampler: StepSampler
    tokens = torch.tensor(data["length"][:])
    slots = Slots.of(torch.tensor(data["weight"][:]), tokens, seed) if "weight" in data.column_names else None
    if train.max_tokens:
        lengths = stage.lengths(data, setup)
        lengths = lengths if slots is None else lengths._replace(parts=slots.longest(lengths.parts))
        sampler = TokenBatchSampler(lengths, train.max_tokens, per_step, seed, stage.section)
    else:
        tokens = tokens if slots is None else slots.longest(tokens)
        sampler = LengthBucketSampler(tokens, train.micro_batch_size * per_step, seed)
    sampler.rows = None if slots is None else slots.rows
    curriculum = stage.curriculum(dataclasses.replace(setup, steps_per_epoch=sampler.steps_per_epoch()))
    if curriculum is not None:
        sampler.number = curriculum.number(len(data), _total_steps(train, sampler), seed)
    return sampler


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Let the language models of a stage keep the inputs of their layers only."""
    for name in ("lm", "encoder", "decoder"):
        if hasattr(model, name):
            lm = unwrap_peft(getattr(model, name))
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
