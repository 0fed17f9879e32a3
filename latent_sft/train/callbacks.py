"""What listens to the Trainer: the epoch's order, the metrics file, convergence, late noise and the progress bar."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import rewrite_logs
from transformers.trainer_callback import ProgressCallback

from latent_sft.train.sampler import LengthBucketSampler, TokenBatchSampler

log = logging.getLogger(__name__)


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

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.global_step + 1)

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


class StageProgress(ProgressCallback):
    """The Trainer's bar with the last loss and accuracy at its end instead of a printed dictionary a log.

    Lines instead of a bar where bars are off (TQDM_DISABLE), as for the ranks of a launched job.
    """

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
        if self.training_bar is None:
            return
        if self.training_bar.disable and self.shown:
            shown = " ".join(f"{k} {v}" for k, v in self.shown.items())
            log.info("%s: step %d of %d, %s", self.name, state.global_step, state.max_steps, shown)
        self.training_bar.set_postfix(self.shown, refresh=False)
