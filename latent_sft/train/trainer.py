"""The training loop is transformers' Trainer; ours are the loss, its denominators, what is saved and what is logged."""

from __future__ import annotations

import functools
import logging
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from latent_sft.errors import TrainingError
from latent_sft.method.losses import StepOutput
from latent_sft.models.sharding import held_parameters
from latent_sft.train.callbacks import EpochOrder
from latent_sft.train.flops import device_peak, step_flops
from latent_sft.train.guards import check_terms, stop_unless_finite
from latent_sft.train.interruption import ResumableTrainer
from latent_sft.train.sampler import LengthBucketSampler, TokenBatchSampler
from latent_sft.train.zero import limit_waiting, trained_parameters

Metrics = dict[str, float]

log = logging.getLogger(__name__)


class LatentTrainer(ResumableTrainer):
    """Trainer for modules that return a `StepOutput`.

        loss = sum over terms of weight * sum / count

    Sums and counts run over the global batch: all processes and all accumulated micro-batches. So batch shape, padding
    and world size do not change the loss. The module is given these counts, in place of the `count_*` of its batch.

    Args:
        weights: name -> weight of the terms; the module may leave out those of weight 0.
        evaluate_with: model -> metrics on validation (answers decoded), without prefix.
        sampler: order of the training set.
        prepare: batch, model, optimizer steps made -> the batch to train on; None takes it as it is.
    """

    def __init__(
        self,
        *args: Any,
        weights: dict[str, float],
        evaluate_with: Callable[[torch.nn.Module], Metrics],
        sampler: LengthBucketSampler | TokenBatchSampler,
        prepare: Callable[[dict[str, Any], torch.nn.Module, int], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss below is already divided by the global counts
        self.weights = weights
        self.evaluate_with, self.sampler, self.prepare = evaluate_with, sampler, prepare
        self.add_callback(EpochOrder(sampler))
        self.peak = device_peak()
        self._losses: list[Tensor] = []  # of this step's micro-batches, and the ids of their rows
        self._ids: list[list[str]] = []
        self._sums: dict[str, Tensor] = {}
        self._since, self._logged_step, self._warned = time.monotonic(), 0, False

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Return the `count_*` of the global batch, once all of it is prepared."""
        if self.prepare is not None:
            batch_samples[:] = self._prepared(batch_samples)
        self._losses, self._ids = [], [batch.pop("row_ids") for batch in batch_samples]
        if not batch_samples:
            return None
        names = [name for name in batch_samples[0] if name.startswith("count_")]
        counts = {name: torch.stack([batch[name] for batch in batch_samples]).sum(0).to(device) for name in names}
        return self.accelerator.reduce(counts, "sum")

    def _prepared(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert self.prepare is not None
        module = self.accelerator.unwrap_model(self.model)
        module.eval()
        with torch.no_grad(), held_parameters(module.parameters()):
            made = [self.prepare(self._prepare_inputs(b), module, self.state.global_step) for b in batches]
        module.train()
        # decoding leaves tensors that autograd refuses to save
        return [{k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in b.items()} for b in made]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this micro-batch's share of the global loss (times world size, since gradients are averaged)."""
        counts: dict[str, Tensor] = num_items_in_batch
        out = model(**{**inputs, **counts})  # a term may weigh its parts by what there is of each
        check_terms(out.loss_sums, self.weights, counts)
        # a global batch may have nothing that a term is about; its sum is 0 then
        parts = {name: out.loss_sums[name] / counts[f"count_{name}"].clamp(min=1) for name in out.loss_sums}
        loss = functools.reduce(operator.add, [self.weights[name] * part for name, part in parts.items()])
        self._observe(inputs, out, parts)
        self._losses.append(loss.detach())
        loss = loss * self.args.world_size
        return (loss, out) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the clock of the throughput starts here."""
        self._since = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this process's share of the micro-batches."""
        if isinstance(self.sampler, LengthBucketSampler):
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _observe(self, inputs: dict[str, Tensor], out: StepOutput, parts: dict[str, Tensor]) -> None:
        # sums stay tensors: reading them here would stop the device at every step
        real = (inputs["kind"] > 0).sum()
        sums = {
            **{f"loss_{name}": part.detach() for name, part in parts.items()},
            "tokens": real,
            "slots": torch.tensor(inputs["kind"].numel()),
        }
        flops = None if self.peak is None else step_flops(self.accelerator.unwrap_model(self.model), inputs)
        if flops is not None:
            sums["flops"] = flops
        for name, (total, count) in out.observed.items():
            sums[f"sum_{name}"], sums[f"count_{name}"] = total, count
        for name, value in sums.items():
            value = value.double().to(self.args.device)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss parts, collapse diagnostics, throughput and padding share to what the Trainer logs."""
        if "loss" in logs and self._sums:
            sums = {k: v.item() for k, v in self._sums.items()}
            if self.args.world_size > 1:
                stacked = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.args.device)
                sums = dict(zip(sums, self.accelerator.reduce(stacked, "sum").tolist(), strict=True))
            steps, now = self.state.global_step - self._logged_step, time.monotonic()
            for name in sums:
                if name.startswith("loss_"):
                    logs[name] = sums[name] / steps
                elif name.startswith("sum_") and sums[f"count_{name[4:]}"]:
                    logs[name[4:]] = sums[name] / sums[f"count_{name[4:]}"]
            seconds = max(now - self._since, 1e-9)
            logs["tokens_per_second"] = sums["tokens"] / seconds
            logs["padding_share"] = 1 - sums["tokens"] / sums["slots"]
            if self.peak is not None and "flops" in sums:
                logs["mfu"] = sums["flops"] / (seconds * self.peak * self.args.world_size)
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self._warn_of_collapse(logs)
            self._sums, self._since, self._logged_step = {}, now, self.state.global_step
            if not torch.isfinite(torch.tensor(logs["loss"])):
                raise TrainingError(
                    f"step {self.state.global_step}: the loss is {logs['loss']}. Lower the learning rate, clip harder "
                    "(max_grad_norm) or train in float32; the last checkpoint is intact."
                )
        super().log(logs, start_time)

    def _warn_of_collapse(self, logs: dict[str, float]) -> None:
        # once: a collapse that begins does not go away by itself, and the numbers are in the log
        past_warm_up = self.state.global_step > self.args.get_warmup_steps(self.state.max_steps)
        collapsed = logs.get("end_token_rate", 0.0) > 0.5 or logs.get("latent_entropy", 1.0) < 0.02
        if collapsed and past_warm_up and not self._warned:
            self._warned = True
            log.warning(
                "step %d: the latents are collapsing (%.0f %% have </think> as top-1, mean entropy %.3f nats). Raise "
                "latent.temperature, keep latent.exclude_end=true, start from the cot stage, or train both halves "
                "together (docs/pipeline.md).",
                self.state.global_step,
                100 * logs.get("end_token_rate", 0.0),
                logs.get("latent_entropy", 0.0),
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> Metrics:
        """Decode answers on validation and log accuracy; replaces the Trainer's loss-only evaluation."""
        metrics = {f"eval_{k}": v for k, v in self.evaluate_with(self.accelerator.unwrap_model(self.model)).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since = time.monotonic()
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        assert isinstance(self.sampler, LengthBucketSampler)
        return self.sampler

    def _prepare_input(self, data: Any) -> Any:
        """Move to the device; with DeepSpeed the Trainer would also round weights and counts to the model's type."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm, before the step is made (DeepSpeed has made it), or stop where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # its scaler leaves such a step out and lowers its scale
            folder = Path(self.args.output_dir)
            stop_unless_finite(self.state.global_step + 1, norm, self._losses, self._ids, folder)
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save only what is trained: a frozen partner or base is on disk already, and tied weights appear once."""
        trained = trained_parameters(self.model)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            save_file(trained, os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        limit_waiting(self.args.ddp_timeout_delta)
        if resume_from_checkpoint:
            # the Trainer would ask for the frozen parameters too, which our checkpoints leave out
            self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # with DeepSpeed, the schedule alone
        return prepared

    def _load_best_model(self) -> None:
        """Leave the model as it is: the final folder is made from the best checkpoint on disk (`train.run`)."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing: checkpoints hold the trained parameters only, so the others are always 'missing'."""
