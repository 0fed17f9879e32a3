"""The training loop is transformers' Trainer; ours are the loss, its denominators, what is saved and what is logged."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import rewrite_logs
from transformers.trainer_callback import ProgressCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from latent_sft.errors import TrainingError
from latent_sft.method.superposition import entropy
from latent_sft.method.types import Superposition
from latent_sft.models.stage1 import Stage1Model
from latent_sft.train.flops import device_peak, step_flops
from latent_sft.train.sampler import LengthBucketSampler, TokenBatchSampler

Metrics = dict[str, float]

log = logging.getLogger(__name__)


class LatentTrainer(Trainer):
    """Trainer for modules that return `ce_total` and, in stage 2, `kl_total`.

        loss = ce_weight * sum(ce) / count_ce + kl_weight * sum(kl) / count_kl

    Both sums and both counts run over the global batch: all processes and all accumulated micro-batches. So batch
    shape, padding and world size do not change the loss.

    Args:
        ce_weight: weight of the cross-entropy.
        kl_weight: weight of the KL.
        end_id: first token of `</think>`, for the collapse diagnostics.
        evaluate_with: model -> metrics on validation (answers decoded), without prefix.
        sampler: order of the training set.
    """

    def __init__(
        self,
        *args: Any,
        ce_weight: float,
        kl_weight: float,
        end_id: int,
        evaluate_with: Callable[[torch.nn.Module], Metrics],
        sampler: LengthBucketSampler | TokenBatchSampler,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss below is already divided by the global counts
        self.ce_weight, self.kl_weight, self.end_id = ce_weight, kl_weight, end_id
        self.evaluate_with, self.sampler = evaluate_with, sampler
        self.add_callback(EpochOrder(sampler))
        self.peak = device_peak()
        self._sums: dict[str, Tensor] = {}
        self._since, self._logged_step, self._warned = time.monotonic(), 0, False

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Tensor]], device: torch.device) -> Tensor | None:
        """Return `[2]`: denominators of cross-entropy and KL over the global batch."""
        if not batch_samples:
            return None
        counts = torch.stack([batch["counts"] for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return this micro-batch's share of the global loss (times world size, since gradients are averaged)."""
        counts = inputs["counts"] if num_items_in_batch is None else num_items_in_batch
        out = model(**inputs)
        parts = {"loss_ce": out["ce_total"] / counts[0]}
        loss = self.ce_weight * parts["loss_ce"]
        if "kl_total" in out:
            parts["loss_kl"] = out["kl_total"] / counts[1]
            loss = loss + self.kl_weight * parts["loss_kl"]
        self._observe(inputs, out, parts)
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

    def _observe(self, inputs: dict[str, Tensor], out: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
        # sums stay tensors: reading them here would stop the device at every step
        real = (inputs["kind"] > 0).sum()
        sums = {
            **{k: v.detach() for k, v in parts.items()},
            "tokens": real,
            "slots": torch.tensor(inputs["kind"].numel()),
        }
        if self.peak is not None:
            sums["flops"] = step_flops(self.accelerator.unwrap_model(self.model), inputs)
        if "latent_ids" in out:
            mask = inputs["latent_mask"]
            latent = Superposition(out["latent_ids"], out["latent_weights"])
            sums["latents"] = mask.sum()
            sums["latent_entropy"] = (entropy(latent) * mask).sum()
            sums["end_share"] = ((latent.ids[..., 0] == self.end_id) & mask).sum()
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
            for name in ("loss_ce", "loss_kl"):
                if name in sums:
                    logs[name] = sums[name] / steps
            seconds = max(now - self._since, 1e-9)
            logs["tokens_per_second"] = sums["tokens"] / seconds
            logs["padding_share"] = 1 - sums["tokens"] / sums["slots"]
            if self.peak is not None:
                logs["mfu"] = sums["flops"] / (seconds * self.peak * self.args.world_size)
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if "latents" in sums:
                logs["latent_entropy"] = sums["latent_entropy"] / sums["latents"]
                logs["end_share"] = sums["end_share"] / sums["latents"]
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
        collapsed = logs.get("end_share", 0.0) > 0.5 or logs.get("latent_entropy", 1.0) < 0.02
        if collapsed and past_warm_up and not self._warned:
            self._warned = True
            log.warning(
                "step %d: the latents are collapsing (%.0f %% have </think> as top-1, mean entropy %.3f nats). Raise "
                "latent.temperature, keep latent.exclude_end=true, start from the cot stage, or train both halves "
                "together (docs/pipeline.md).",
                self.state.global_step,
                100 * logs.get("end_share", 0.0),
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save only what is trained: a frozen partner or base is on disk already, and tied weights appear once."""
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            trained = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing: checkpoints hold the trained parameters only, so the others are always 'missing'."""


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch, from the step count.

    accelerate does not find a sampler behind the wrappers of a run that is resumed, or that takes whole batches, on
    several processes.
    """

    def __init__(self, sampler: LengthBucketSampler | TokenBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the order of the epoch that the coming step is in."""
        steps_per_epoch = -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)
        self.sampler.set_epoch(state.global_step // steps_per_epoch)


class MetricsFile(TrainerCallback):
    """Appends every logged value to `metrics.jsonl` and TensorBoard, and keeps the training clock across resumes."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds, self.began = folder, seconds, time.monotonic()
        self.board: Any = None

    def elapsed(self) -> float:
        """Seconds of training so far, earlier processes included."""
        return self.seconds + time.monotonic() - self.began

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the TensorBoard file, on the first process."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line and the scalars."""
        if self.board is None or "train_runtime" in (logs or {}):  # the Trainer's closing summary is no curve
            return
        scalars = {k: v for k, v in rewrite_logs(dict(logs or {})).items() if isinstance(v, int | float)}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": state.global_step, "seconds": round(self.elapsed(), 1), **scalars}) + "\n")
        for tag, value in scalars.items():
            self.board.add_scalar(tag, value, state.global_step)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the clock beside the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / "seconds.json").write_text(json.dumps(self.elapsed()))

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the TensorBoard file."""
        if self.board is not None:
            self.board.close()


class StopAtAccuracy(TrainerCallback):
    """Ends a stage once validation accuracy is reached: a convergence check instead of a step count."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Stop when the threshold is met."""
        if metrics and metrics.get("eval_accuracy", 0.0) >= self.accuracy:
            control.should_training_stop = True


class LateNoise(TrainerCallback):
    """Turns the noise of stage 1 on after a share of the phase."""

    def __init__(self, model: Stage1Model, scale: float, start: float) -> None:
        self.model, self.scale, self.start = model, scale, start

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the scale of the coming step; a resumed run finds it by its step."""
        self.model.noise_scale = self.scale if state.global_step >= self.start * state.max_steps else 0.0


class StageProgress(ProgressCallback):
    """The Trainer's bar with the last loss and accuracy at its end instead of a printed dictionary a log."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.shown = name, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the bar after the stage."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Refresh the numbers at the end of the bar."""
        names = {"loss": "loss", "loss_kl": "kl", "eval_accuracy": "val_acc"}
        self.shown |= {names[k]: f"{v:.3g}" for k, v in (logs or {}).items() if k in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown, refresh=False)
