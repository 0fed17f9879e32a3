"""Reporting beside TensorBoard and metrics.jsonl, which every run writes: Weights & Biases through the Trainer.

Project, entity and offline mode are set as its users know them, by WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from latent_sft.errors import ConfigError


def check_reporters(names: Sequence[str]) -> None:
    """Raise a ConfigError for a service of `report_to` whose package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to: {missing[0]} is not installed here. `pip install {missing[0]}`, or leave it out: TensorBoard "
            "files and metrics.jsonl are written in any case."
        )


class EndOfReport(TrainerCallback):
    """Closes the report of a stage, so that the next stage of the same process gets one of its own."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the open run, on the process that has one."""
        import wandb

        if wandb.run is not None:
            wandb.finish()
