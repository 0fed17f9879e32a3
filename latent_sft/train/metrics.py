"""Where logged numbers go: `metrics.jsonl`, TensorBoard, the trackers of `report_to`, and the progress bar.

Trackers are those of accelerate. Login, server and offline mode are set as their users know them, in the environment
(WANDB_MODE, MLFLOW_TRACKING_URI, ...), and never stand in a configuration.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from latent_sft.errors import ConfigError, TrainingError
from latent_sft.experiment.workspace import processes
from latent_sft.methods.base import TrainState
from latent_sft.train.flops import device_peak, step_flops

ALWAYS = "TensorBoard files and metrics.jsonl are written in any case."
Metrics = dict[str, float]
Observed = dict[str, tuple[Tensor, Tensor]]

# trackers that go on with the run of an interrupted stage, and where they say which one it is; others begin anew
RUN_ID = {"wandb": "id", "mlflow": "info.run_id", "trackio": "name"}

log = logging.getLogger(__name__)


def check_reporters(names: Sequence[str]) -> None:
    """Raise a ConfigError for a tracker of `report_to` whose package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to: {missing[0]} is not installed here. `pip install {missing[0]}`, or leave it out: {ALWAYS}"
        )


class Meter:
    """Adds up what the micro-batches of a process say, until it is read.

    Args:
        model: of the stage, not wrapped.

    Attributes:
        since: when the clock of the throughput began.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.peak, self.warned = model, device_peak(), False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def restart(self, step: int) -> None:
        """Begin anew at an optimizer step."""
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.slots = 0
        self.since, self.step = time.monotonic(), step

    def add(self, batch: dict[str, Tensor], losses: dict[str, Tensor], observed: Observed) -> None:
        """Add a micro-batch. Sums stay on the device, whose host would wait to read one or to send a number there.

        They are added up as one tensor of each type: a step has dozens, and a GPU is slow to begin anything.
        """
        kind = batch["kind"]
        self.slots += kind.numel()
        sums = {**losses, "tokens": (kind > 0).sum()}
        flops = None if self.peak is None else step_flops(self.model, batch)
        if flops is not None:
            sums["flops"] = flops
        for name, (total, count) in observed.items():
            sums[f"sum_{name}"], sums[f"count_{name}"] = total, count
        for dtype in dict.fromkeys(value.dtype for value in sums.values()):
            names = tuple(name for name, value in sums.items() if value.dtype == dtype)
            total = torch.stack([sums[name].detach() for name in names]).double()
            self.sums[names] = self.sums[names] + total if names in self.sums else total

    def read(self, step: int, warm: bool) -> Metrics:
        """Return what was added since the last time, over all processes, and restart.

        Args:
            step: optimizer steps made so far.
            warm: the warm-up is over, so that collapsed latents are warned of.

        Raises:
            TrainingError: the loss is no finite number.
        """
        every = torch.cat([*self.sums.values()])
        totals = reduce(torch.cat([every, every.new_tensor([self.slots])]), "sum").tolist()
        sums: dict[str, float] = {}
        for name, value in zip([*chain(*self.sums), "slots"], totals, strict=True):
            sums[name] = sums.get(name, 0.0) + value
        seconds = max(time.monotonic() - self.since, 1e-9)
        logs = {name: value / (step - self.step) for name, value in sums.items() if name.startswith("loss")}
        for name in sums:
            if name.startswith("sum_") and sums[f"count_{name[4:]}"]:
                logs[name[4:]] = sums[name] / sums[f"count_{name[4:]}"]
        logs["tokens_per_second"] = sums["tokens"] / seconds
        logs["padding_share"] = 1 - sums["tokens"] / sums["slots"]
        if self.peak is not None and "flops" in sums:
            logs["mfu"] = sums["flops"] / (seconds * self.peak * processes().num_processes)
        if torch.cuda.is_available():
            logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.restart(step)
        end_rate, spread = logs.get("end_token_rate", 0.0), logs.get("latent_entropy", 1.0)
        # once: a collapse that begins does not go away by itself, and the numbers are in the log
        if (end_rate > 0.5 or spread < 0.02) and warm and not self.warned:
            self.warned = True
            log.warning(
                "step %d: the latents are collapsing (%.0f %% have </think> as top-1, mean entropy %.3f nats). Raise "
                "latent.temperature, keep latent.exclude_end=true, start from the cot stage, or train both halves "
                "together (docs/pipeline.md).", step, 100 * end_rate, spread,
            )  # fmt: skip
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"step {step}: the loss is {logs['loss']}. Lower the learning rate, clip harder (max_grad_norm) or "
                "train in float32; the last checkpoint is intact."
            )
        return logs


class MetricsLog:
    """Appends what is logged to `metrics.jsonl`, TensorBoard and, with `report_to`, to a run of its own a stage.

    Args:
        folder: of the stage.
        report_to: trackers, by accelerate's names.
        title: of the run there.
        settings: dotted key -> value, stored with the run.
    """

    def __init__(self, folder: Path, report_to: Sequence[str], title: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.title, self.settings = folder, title, settings
        self.names = list(dict.fromkeys(["tensorboard", *report_to]))
        self.trackers: dict[str, GeneralTracker] = {}

    @contextmanager
    def opened(self, state: TrainState) -> Iterator[None]:
        """Open what is written to, on the first process; a tracker goes on with the run that `state` names.

        Raises:
            ConfigError: a tracker cannot begin (no login, no server).
        """
        if processes().is_main_process:
            for name in self.names:
                try:
                    self._begin(name, state)
                except Exception as error:  # each tracker has errors of its own
                    self._finish()
                    why = str(error).strip().partition("\n")[0] or type(error).__name__
                    raise ConfigError(
                        f"report_to: {name} could not begin a run ({why}). Log in, or choose its server or offline "
                        f"mode by its own environment variables, or leave it out: {ALWAYS}"
                    ) from error
        try:
            yield
        finally:
            self._finish()

    def _begin(self, name: str, state: TrainState) -> None:
        if name == "tensorboard":
            options = {"logging_dir": self.folder, "purge_step": state.global_step + 1}
            self.trackers[name] = LOGGER_TYPE_TO_CLASS[name](name, **options)
            self.trackers[name].start()
            return
        before, options = state.trackers.get(name), {}
        if name == "wandb":
            options = {"name": self.title, "id": before, "resume": "allow"}
        elif name == "mlflow":
            options = {"run_name": self.title, "run_id": before}
        elif name == "trackio":  # a run is known by its name
            options = {"name": before or f"{self.title} {os.urandom(3).hex()}", "resume": "allow"}
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
            options["logging_dir"] = self.folder
        project = os.environ.get(f"{name.upper()}_PROJECT", "latent_sft")
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
        tracker.start()
        self.trackers[name] = tracker
        if name in RUN_ID:
            state.trackers[name] = str(attrgetter(RUN_ID[name])(tracker.tracker))
        if before is None or name != "mlflow":  # there, settings of a run cannot be changed any more
            tracker.store_init_configuration({key: str(value) for key, value in self.settings.items()})

    def write(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Write one line and the scalars, `eval_<name>` as `eval/<name>` and the others as `train/<name>`."""
        if not processes().is_main_process:
            return
        tags = {k.replace("eval_", "eval/") if k.startswith("eval_") else f"train/{k}": v for k, v in values.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": state.global_step, "seconds": round(state.seconds, 1), **tags}) + "\n")
        for name in list(self.trackers):
            self._try(name, lambda tracker: tracker.log(tags, step=state.global_step))

    def _finish(self) -> None:
        for name in list(self.trackers):
            self._try(name, lambda tracker: tracker.finish())
        self.trackers = {}

    def _try(self, name: str, call: Callable[[GeneralTracker], None]) -> None:
        try:
            call(self.trackers[name])
        except Exception as error:  # a service that went away does not end training
            del self.trackers[name]
            log.warning("%s failed (%s) and gets nothing more until this stage is started again. %s",
                        name, type(error).__name__, ALWAYS)  # fmt: skip


class StageProgress:
    """A bar with the last loss and accuracy at its end, on the first process, in a `with` block.

    Lines instead of a bar where bars are off (TQDM_DISABLE), as for the ranks of a launched job.
    """

    def __init__(self, name: str, state: TrainState) -> None:
        self.name = name
        self.shown: dict[str, str] = {}
        self.bar: Any = None
        if processes().is_main_process:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=name, dynamic_ncols=True)

    def __enter__(self) -> StageProgress:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def advance(self, state: TrainState) -> None:
        """Move the bar to the step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def show(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Refresh the numbers at the end of the bar."""
        names = {"loss": "loss", "loss_kl": "kl", "accuracy": "val_acc"}
        self.shown |= {names[k]: f"{v:.3g}" for k, v in values.items() if k in names}
        if self.bar is None:
            return
        if self.bar.disable and self.shown:
            shown = " ".join(f"{k} {v}" for k, v in self.shown.items())
            log.info("%s: step %d of %d, %s", self.name, state.global_step, state.max_steps, shown)
        self.bar.set_postfix(self.shown, refresh=False)
