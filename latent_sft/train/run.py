"""Train one stage: read this first.

    workspace -> stage (a row of stages.py) -> LatentTrainer (trainer.py) -> <run>/<stage>/final

A stage that is finished is skipped; one that was interrupted, or is to train longer, goes on from its last complete
checkpoint; `finish_stage` ends one where it stands.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from latent_sft.config.experiment import Config
from latent_sft.config.training import TrainConfig
from latent_sft.errors import ArtefactError, Interrupted, TrainingError
from latent_sft.experiment.stores import store_latents
from latent_sft.experiment.workspace import Workspace, processes
from latent_sft.inference.solve import Policy, as_rows
from latent_sft.methods import STAGES
from latent_sft.methods.base import Setup, Stage
from latent_sft.models.backbone import unwrap_peft
from latent_sft.runs import Step, read_json
from latent_sft.train import zero
from latent_sft.train.callbacks import MetricsFile, StageProgress, StopAtAccuracy
from latent_sft.train.ending import check_length, departures, state_of, write_final
from latent_sft.train.guards import check_rows, said_if_alone, with_ids
from latent_sft.train.interruption import MARKER, Interruption, last_checkpoint, same_step
from latent_sft.train.reporting import EndOfReport, check_reporters
from latent_sft.train.sampler import LengthBucketSampler, Phased, TokenBatchSampler
from latent_sft.train.trainer import LatentTrainer
from latent_sft.train.validation import validation_metrics

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
        _checkpoint_activations(model)
    rows = as_rows(work.data["validation"], train.eval_examples)
    if stage.thinker(model).oracle is not None:
        rows = [r for r in rows if r["cot"]]
    if len(work.data["train"]) == 0 or not rows:
        raise TrainingError(f"{name}: no rows to train on or to validate with; check data.train and data.validation.")
    check_rows(len(work.data["train"]), train, stage.section, processes().num_processes)
    sampler = _sampler(stage, setup, work, train.gradient_accumulation_steps * processes().num_processes)
    setup = dataclasses.replace(setup, steps_per_epoch=sampler.steps_per_epoch())
    total = _total_steps(train, sampler)
    if checkpoint:
        check_length(step, state_of(checkpoint), total, stage.section)
    train_rows = work.data["train"] if sampler.number is None else Phased(work.data["train"])
    collate, prepare = partial(with_ids, collate=stage.batch(setup)), stage.prepare(setup)

    def prepared(batch: dict[str, Any], module: torch.nn.Module, at: int) -> dict[str, Any]:
        policy = Policy(module=module, thinker=stage.thinker(module), spec=work.spec, seed=config.seed, step=at)
        return prepare(batch, policy) if prepare else batch

    if processes().is_main_process:
        step.begin(config.seed, history)
    metrics = MetricsFile(step.directory, _seconds_before(checkpoint))
    callbacks: list[TrainerCallback] = [metrics, *stage.callbacks(model, setup)]
    if config.report_to:
        callbacks.append(EndOfReport())
    if train.stop_at_accuracy:
        callbacks.append(StopAtAccuracy(train.stop_at_accuracy))
    trainer = LatentTrainer(
        model=model,
        args=_arguments(train, step.directory, config, deepspeed, config.precision(name)),
        train_dataset=train_rows,
        eval_dataset=work.data["validation"],  # asked for by the Trainer; LatentTrainer.evaluate decodes instead
        data_collator=collate,
        callbacks=callbacks,
        weights=stage.terms(setup),
        evaluate_with=lambda module: validation_metrics(module, stage, work, rows),
        sampler=sampler,
        prepare=prepared if prepare else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StageProgress(name))
    interruption = Interruption(name, train.save_total_limit, train.save_every)
    trainer.add_callback(interruption)
    if checkpoint and _has_ended(checkpoint, train, total):
        trainer.state = state_of(checkpoint)  # only the final folder was still to be written
    else:
        log.info("%s: %s", name, f"goes on from {checkpoint}" if checkpoint else "starts")
        log.info("%s: %s", name, _step_size(train, processes().num_processes))
        try:
            with said_if_alone(config.launch.timeout_minutes):
                trainer.train(resume_from_checkpoint=checkpoint)
        except Interrupted:
            if interruption.stopping:  # else training had not begun
                trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
            raise
    zero.end(config.launch)
    if trainer.is_world_process_zero():
        write_final(trainer.state, sampler, stage, setup, step, metrics.elapsed(), len(work.data["train"]))
    trainer.accelerator.wait_for_everyone()
    if interruption.requested:
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
    state, seconds, rows = state_of(checkpoint), _seconds_before(checkpoint), len(work.data["train"])
    write_final(state, sampler, stage, setup, step, seconds, rows, ended_early=True)
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


def _total_steps(train: TrainConfig, sampler: LengthBucketSampler | TokenBatchSampler) -> int:
    return train.max_steps or math.ceil(train.epochs * sampler.steps_per_epoch())


def _has_ended(checkpoint: str, train: TrainConfig, total: int) -> bool:
    # the Trainer would train one step more than asked for when it resumes at the last one
    state = state_of(checkpoint)
    converged = 0 < train.stop_at_accuracy <= (state.best_metric or 0.0)
    return state.global_step >= total or converged


def _sampler(stage: Stage, setup: Setup, work: Workspace, per_step: int) -> LengthBucketSampler | TokenBatchSampler:
    # both cut by what an optimizer step takes (`per_step` micro-batches), which the processes only share out
    data, seed, train = work.data["train"], work.config.seed, setup.train
    sampler: LengthBucketSampler | TokenBatchSampler
    if train.max_tokens:
        lengths = stage.lengths(data, setup)
        sampler = TokenBatchSampler(lengths, train.max_tokens, per_step, seed, stage.section)
    else:
        sampler = LengthBucketSampler(list(data["length"]), train.micro_batch_size * per_step, seed)
    curriculum = stage.curriculum(dataclasses.replace(setup, steps_per_epoch=sampler.steps_per_epoch()))
    if curriculum is not None:
        sampler.number = curriculum.number(len(data), _total_steps(train, sampler), seed)
    return sampler


def _arguments(
    train: TrainConfig, folder: Path, config: Config, deepspeed: dict[str, Any] | None, precision: str
) -> TrainingArguments:
    by_steps = train.eval_every > 0
    schedule: dict[str, Any] = {"lr_scheduler_type": train.schedule}
    if train.schedule == "cosine" and train.min_lr_ratio > 0:
        schedule = {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": train.min_lr_ratio},
        }
    if train.schedule == "constant":
        schedule = {"lr_scheduler_type": "constant_with_warmup"}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.micro_batch_size,
        # accelerate can even out processes only where batches have one size; token batches are even as they come
        accelerator_config={"even_batches": not train.max_tokens},
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_steps=train.max_steps or -1,
        num_train_epochs=train.epochs,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_ratio,  # a number below 1 is a share of the steps
        weight_decay=train.weight_decay,
        adam_beta2=train.beta2,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,  # LatentTrainer.log stops on a non-finite loss; hiding it would go on
        eval_strategy="steps" if by_steps else "epoch",
        eval_steps=train.eval_every or None,
        save_strategy="best",  # when else to save, and what to keep, is up to Interruption
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        # with DeepSpeed the Trainer asks for what DeepSpeed is told already; its autocast is DeepSpeed's own
        bf16="bf16" in deepspeed if deepspeed else precision == "bf16",
        fp16=precision == "fp16",
        dataloader_num_workers=train.num_workers,
        remove_unused_columns=False,
        report_to=list(config.report_to),  # TensorBoard and metrics.jsonl are written by MetricsFile, for every run
        run_name=f"{config.name} {folder.name}",
        seed=config.seed,
        data_seed=config.seed,
        deepspeed=deepspeed,
        ddp_timeout=round(60 * config.launch.timeout_minutes),
        use_cpu=not torch.cuda.is_available(),
        **schedule,
    )


def _checkpoint_activations(model: torch.nn.Module) -> None:
    for name in ("lm", "encoder", "decoder"):
        if hasattr(model, name):
            lm = unwrap_peft(getattr(model, name))
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _seconds_before(checkpoint: str | None) -> float:
    if checkpoint is None:
        return 0.0
    try:
        return float(json.loads((Path(checkpoint) / "seconds.json").read_text()))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{checkpoint}/seconds.json: unreadable ({error}); delete that checkpoint.") from error
