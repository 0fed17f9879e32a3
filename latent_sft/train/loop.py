"""The training loop of every stage, all of it: read `run`, then `_step`.

    for every optimizer step
        micro-batches -> prepared -> counts of the global batch
        forward, backward of each -> clip -> AdamW, at the learning rate of the step
        log, evaluate, write a checkpoint, stop where told to

Processes average gradients by torch's DistributedDataParallel or, with ZeRO, by DeepSpeed's engine.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce, send_to_device, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.utils import SAFE_WEIGHTS_NAME

from latent_sft.config.experiment import Config
from latent_sft.config.load import flat
from latent_sft.config.training import TrainConfig
from latent_sft.errors import Interrupted
from latent_sft.experiment.workspace import Workspace, processes
from latent_sft.inference.solve import Policy
from latent_sft.methods.base import Setup, Stage, TrainState
from latent_sft.models.sharding import held_parameters
from latent_sft.runs import Step, write_json
from latent_sft.train import interruption
from latent_sft.train.guards import check_terms, stop_unless_finite, with_ids
from latent_sft.train.interruption import MARKER, STATE_FILE, Signals, deleted_unless_written, mark_complete
from latent_sft.train.metrics import Meter, Metrics, MetricsLog, StageProgress
from latent_sft.train.sampler import StepSampler, shared_out
from latent_sft.train.validation import validation_metrics
from latent_sft.train.zero import limit_waiting, trained_parameters

# parameters that do not decay, by their names; those of a LayerNorm do not either
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")

log = logging.getLogger(__name__)


def learning_rate(step: int, total: int, train: TrainConfig) -> float:
    """Return the rate of an optimizer step (0-based): linear warm-up, then the schedule down to the last step."""
    warmup, share = warmup_steps(total, train), 1.0
    if step < warmup:
        share = step / warmup
    elif train.schedule == "linear":
        share = (total - step) / (total - warmup)
    elif train.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / (total - warmup))))
        share = share * (1 - train.min_lr_ratio) + train.min_lr_ratio
    return train.learning_rate * share


def warmup_steps(total: int, train: TrainConfig) -> int:
    """Return the optimizer steps of the warm-up out of `total`."""
    return math.ceil(total * train.warmup_ratio)


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters; biases and norms do not decay."""
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keeps = NO_DECAY.search(name.lower()) or f"{name.rpartition('.')[0]}." in norms
            groups[not keeps].append(parameter)
    decays = [{"params": found, "weight_decay": train.weight_decay if d else 0.0} for d, found in groups.items()]
    return torch.optim.AdamW(decays, lr=train.learning_rate, betas=(0.9, train.beta2), eps=1e-8, fused=True)


class TrainingLoop:
    """Trains a module that returns a `StepOutput`.

        loss = sum over terms of weight * sum / count

    Sums and counts run over the global batch: all processes and all accumulated micro-batches. So batch shape, padding
    and world size do not change the loss. The module is given these counts, in place of the `count_*` of its batch.

    Args:
        step: of the run: its folder.
        stage: what is trained.
        setup: its settings; `train` as this job shares them out.
        work: the opened experiment.
        config: its settings.
        model: of the stage, not wrapped.
        rows: training set.
        validation: rows that are solved to choose the best checkpoint.
        sampler: order of the training set.
        deepspeed: configuration of DeepSpeed; None without ZeRO.
        state: where training stands.
    """

    def __init__(
        self,
        step: Step,
        stage: Stage,
        setup: Setup,
        work: Workspace,
        config: Config,
        *,
        model: nn.Module,
        rows: Any,
        validation: list[dict[str, Any]],
        sampler: StepSampler,
        deepspeed: dict[str, Any] | None,
        state: TrainState,
    ) -> None:
        self.stage, self.setup, self.work, self.train, self.state = stage, setup, work, setup.train, state
        self.model, self.rows, self.validation, self.sampler = model, rows, validation, sampler
        self.job, self.folder, self.seed = processes(), step.directory, config.seed
        self.deepspeed, self.precision = deepspeed, config.precision(stage.name)
        self.timeout = timedelta(minutes=config.launch.timeout_minutes)
        self.collate, self.prepare, self.weights = stage.batch(setup), stage.prepare(setup), stage.terms(setup)
        self.callbacks, self.signals = [*stage.callbacks(model, setup)], Signals(self.timeout)
        self.meter, self.random_file = Meter(model), f"random-{self.job.process_index}.pt"
        self.metrics = MetricsLog(self.folder, config.report_to, f"{config.name} {stage.name}", flat(asdict(config)))

    def run(self, checkpoint: str | None) -> None:
        """Train to the last step, or to the accuracy asked for; `checkpoint` is where to go on.

        Raises:
            Interrupted: a signal came; a checkpoint is written.
            TrainingError: training cannot go on.
        """
        train, state, name = self.train, self.state, self.stage.name
        self._start(checkpoint)
        for callback in self.callbacks:
            callback.on_begin(state, self.rows)
        self.began = time.monotonic() - state.seconds
        self.meter.restart(state.global_step)
        with self.signals, self.metrics.opened(state), StageProgress(name, state) as progress:
            for batches in self._steps(checkpoint):
                norm = self._step(batches)
                progress.advance(state)
                step, last = state.global_step, state.global_step == state.max_steps
                stopping = self.signals.anyone() and not last
                if stopping:
                    log.info("%s: told to stop; finishing step %d", name, step)
                if step % train.log_every == 0:
                    progress.show(state, self._log(norm))
                at_end = last or step % self.sampler.steps_per_epoch() == 0
                evaluates = step % train.eval_every == 0 if train.eval_every else at_end
                best = evaluates and self._evaluate(progress)
                due = last or stopping or (train.save_every > 0 and step % train.save_every == 0)
                if due or best or (evaluates and not train.save_every):
                    self._save()
                if stopping:
                    raise Interrupted(f"{name}: stopped at step {step} of {state.max_steps}")
                if best and 0 < train.stop_at_accuracy <= state.best_metric:
                    return

    def _start(self, checkpoint: str | None) -> None:
        """Place the model, make the optimizer, and read both back from a checkpoint."""
        device = self.job.device
        self.engine: Any = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        if self.deepspeed is not None:
            import deepspeed

            optimizer = make_optimizer(self.model, self.train)
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=self.deepspeed
            )
            self.wrapped: nn.Module = self.engine
            limit_waiting(self.timeout)
            if checkpoint:  # which leaves frozen parameters out
                self.engine.load_checkpoint(checkpoint, load_module_strict=False)
        else:
            self.wrapped = self.model.to(device)
            self.optimizer = make_optimizer(self.model, self.train)
            if checkpoint:
                self.model.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME), strict=False)
                self.optimizer.load_state_dict(interruption.load_tensors(checkpoint, "optimizer.pt"))
                if self.scaler.is_enabled():
                    self.scaler.load_state_dict(interruption.load_tensors(checkpoint, "scaler.pt"))
            if self.job.num_processes > 1:
                ids = [device.index] if device.type == "cuda" else None
                self.wrapped = DistributedDataParallel(self.model, device_ids=ids, find_unused_parameters=True)
        if self.job.is_main_process:
            interruption.drop_after(self.folder / "metrics.jsonl", self.state.global_step)

    def _steps(self, checkpoint: str | None) -> Iterator[list[dict[str, Any]]]:
        """Yield the micro-batches of this process for every step that is left."""
        set_seed(self.seed + self.job.process_index)  # else every process draws the same noise
        size = self.train.gradient_accumulation_steps
        while self.state.global_step < self.state.max_steps:
            epoch, done = divmod(self.state.global_step, self.sampler.steps_per_epoch())
            if checkpoint and not done:
                self._load_random(checkpoint)
            batches = iter(self._loader(epoch, done * size))
            if checkpoint and done:
                self._load_random(checkpoint)  # an iterator draws from it when it begins
            checkpoint = None
            while taken := [
                send_to_device(batch, self.job.device, non_blocking=True) for batch in islice(batches, size)
            ]:
                yield taken
                if self.state.global_step == self.state.max_steps:
                    return

    def _loader(self, epoch: int, skipped: int) -> DataLoader:
        """Return the loader of this process's micro-batches of an epoch, without the first ones."""
        self.sampler.set_epoch(epoch)
        own = shared_out(self.sampler, self.train.micro_batch_size, self.job.num_processes, self.job.process_index)
        return DataLoader(
            self.rows,
            batch_sampler=own[skipped:],
            collate_fn=partial(with_ids, collate=self.collate),
            num_workers=self.train.num_workers,
            pin_memory=self.job.device.type == "cuda",
            worker_init_fn=interruption.ignore_signals,
        )

    def _step(self, batches: list[dict[str, Any]]) -> Tensor | float:
        """Make an optimizer step of micro-batches and return the norm of its gradient, before it was clipped."""
        for callback in self.callbacks:
            callback.on_step(self.state, self.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.state.global_step, self.state.max_steps, self.train)
        batches = self._prepared(batches)
        ids = [batch.pop("row_ids") for batch in batches]
        names = [name for name in batches[0] if name.startswith("count_")]
        counts = reduce({name: torch.stack([batch[name] for batch in batches]).sum(0) for name in names}, "sum")
        losses = [self._backward({**batch, **counts}, last=batch is batches[-1]) for batch in batches]
        self.state.global_step += 1
        if self.engine is not None:
            self.engine.step()  # clips
            norm = self.engine.get_global_grad_norm()
        else:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm or math.inf)
        if not self.scaler.is_enabled():  # it leaves such a step out and lowers its scale
            stop_unless_finite(self.state.global_step, norm, losses, ids, self.folder)
        if self.engine is None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return norm

    def _prepared(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.prepare is None:
            return batches
        self.model.eval()
        step, thinker = self.state.global_step, self.stage.thinker(self.model)
        policy = Policy(module=self.model, thinker=thinker, spec=self.setup.spec, seed=self.seed, step=step)
        with torch.no_grad(), held_parameters(self.model.parameters()):
            made = [self.prepare(batch, policy) for batch in batches]
        # decoding leaves tensors that autograd refuses to save
        return [{k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in b.items()} for b in made]

    def _backward(self, batch: dict[str, Tensor], *, last: bool) -> Tensor:
        """Add a micro-batch's share of the gradient and return its loss; processes exchange theirs at the last one."""
        self.wrapped.train()
        # DeepSpeed casts, and adds up gradients, by itself
        low = torch.float16 if self.precision == "fp16" else torch.bfloat16
        cast = torch.autocast(self.job.device.type, low, self.engine is None and self.precision != "no")
        alone = isinstance(self.wrapped, DistributedDataParallel) and not last
        with self.wrapped.no_sync() if alone else nullcontext():
            with cast:
                out = self.wrapped(**batch)
            check_terms(out.loss_sums, self.weights, batch)
            # a global batch may have nothing that a term is about; its sum is 0 then
            parts = {name: s.float() / batch[f"count_{name}"].clamp(min=1) for name, s in out.loss_sums.items()}
            loss = functools.reduce(operator.add, [self.weights[name] * part for name, part in parts.items()])
            scaled = loss * self.job.num_processes  # gradients are averaged
            if self.engine is None:
                self.scaler.scale(scaled).backward()
            else:
                self.engine.set_gradient_accumulation_boundary(last)
                self.engine.backward(scaled, scale_wrt_gas=False)
        self.meter.add(batch, {"loss": loss, **{f"loss_{name}": part for name, part in parts.items()}}, out.observed)
        return loss.detach()

    def _log(self, norm: Tensor | float) -> Metrics:
        """Write and return what was seen since the last time, over all processes."""
        rate = learning_rate(self.state.global_step - 1, self.state.max_steps, self.train)
        warm = self.state.global_step > warmup_steps(self.state.max_steps, self.train)
        logs = {"grad_norm": float(norm), "learning_rate": rate, **self.meter.read(self.state.global_step, warm)}
        self._write(logs)
        for callback in self.callbacks:
            callback.on_log(self.state, logs)
        return logs

    def _evaluate(self, progress: StageProgress) -> bool:
        """Decode answers on validation, and return whether the model is the best so far."""
        found = validation_metrics(self.model, self.stage, self.work, self.validation)
        self._write({f"eval_{name}": value for name, value in found.items()})
        progress.show(self.state, found)
        self.meter.since = time.monotonic()
        if self.state.best_metric is not None and found["accuracy"] <= self.state.best_metric:
            return False
        self.state.best_metric, self.state.best_global_step = found["accuracy"], self.state.global_step
        return True

    def _write(self, values: Metrics) -> None:
        self.state.seconds = time.monotonic() - self.began
        self.metrics.write(self.state, {**values, "epoch": self.state.global_step / self.sampler.steps_per_epoch()})

    def _save(self) -> None:
        """Write a checkpoint, mark it complete, then delete old ones.

        Raises:
            TrainingError: the disk is full.
        """
        step, main, self.state.seconds = self.state.global_step, self.job.is_main_process, time.monotonic() - self.began
        folder = self.folder / f"checkpoint-{step}"
        with deleted_unless_written(folder):
            (folder / MARKER).unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            # only what is trained: a frozen partner or base is on disk already, and tied weights appear once
            trained = trained_parameters(self.model)
            if self.engine is not None:
                self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
            elif main:
                torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
                torch.save(self.scaler.state_dict(), folder / "scaler.pt")
            cuda = {"cuda": torch.cuda.get_rng_state(self.job.device)} if self.job.device.type == "cuda" else {}
            torch.save({"cpu": torch.get_rng_state(), **cuda}, folder / self.random_file)
            if main:
                save_file(trained, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
                write_json(folder / STATE_FILE, asdict(self.state))
        self.signals.wait()
        if main:
            with deleted_unless_written(folder):
                accumulated = self.train.gradient_accumulation_steps
                mark_complete(folder, processes=self.job.num_processes, gradient_accumulation_steps=accumulated)
            interruption.rotate(self.folder, self.train.save_total_limit, {step, self.state.best_global_step})
            for callback in self.callbacks:
                callback.on_save(self.state)
        self.signals.wait()  # a process that ends here makes the launcher end the others

    def _load_random(self, checkpoint: str) -> None:
        if not (Path(checkpoint) / self.random_file).exists():
            # another number of processes: noise and dropout are drawn anew, the same at every such resumption
            set_seed(self.seed + 1_000_003 * self.state.global_step + self.job.process_index)
            return
        states = interruption.load_tensors(checkpoint, self.random_file)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.job.device)
