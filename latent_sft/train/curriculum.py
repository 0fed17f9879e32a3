"""Coconut's curriculum: which stage an optimizer step trains, and how its examples learn of it.

The sampler numbers an example `stage x rows + row`, and `Staged` reads the stage back from the number. So the stage
depends on the optimizer step alone, whatever workers, accumulation, processes and resuming do to the order of work.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback

from latent_sft.config.methods import CoconutConfig


def stage_at(step: int, total_steps: int, config: CoconutConfig) -> int:
    """Return the stage of an optimizer step (0-based) out of `total_steps`.

    Stage k shows k steps as latents; `max_stage + 1` shows no written step any more.

    >>> [stage_at(s, 10, CoconutConfig(max_stage=2, stage_share=0.2)) for s in range(10)]
    [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    """
    last = config.max_stage + 1 if config.max_stage else 0
    each = max(1, round(config.stage_share * total_steps))
    return min(config.first_stage + step // each, last)


def numbered(rows: int, total_steps: int, config: CoconutConfig, seed: int) -> Callable[[int, int], int]:
    """Return the function (optimizer step, row) -> number of the example, for the sampler.

    Args:
        rows: of the training set.
        total_steps: optimizer steps of the whole training.
        config: settings of Coconut.
        seed: of the experiment, for examples that are shown at another stage (`uniform_prob`).
    """

    def number(step: int, row: int) -> int:
        stage = stage_at(step, total_steps, config)
        if config.uniform_prob:
            draw = random.Random(f"{seed}/{step}/{row}")
            if draw.random() < config.uniform_prob:
                stage = draw.randint(0, config.max_stage)
        return stage * rows + row

    return number


class Staged(Dataset):
    """Rows with the stage at which they are shown, as `stage`; see the top of the file."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        stage, row = divmod(number, len(self.rows))
        return {**self.rows[row], "stage": stage}


class ForgetMoments(TrainerCallback):
    """Empties the optimizer's state where a stage begins, as the published code does (a new optimizer)."""

    def __init__(self, config: CoconutConfig) -> None:
        self.config = config

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the stage of the coming step with the last one's."""
        step = state.global_step
        stages = [stage_at(at, state.max_steps, self.config) for at in (max(step - 1, 0), step)]
        if stages[0] != stages[1]:
            kwargs["optimizer"].state.clear()
