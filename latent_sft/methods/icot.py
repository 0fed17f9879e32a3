"""iCoT: token after token of the CoT is left out of the training text until none is left (arXiv 2405.14838).

The model is a plain language model trained on `P, remaining CoT, E, A`, as the CoT stage is (`methods.cot`). How many
tokens are left out depends on (seed, optimizer step, row) alone: the sampler numbers an example `removed x rows + row`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from latent_sft.config.training import TrainConfig, need
from latent_sft.data.collate import Batch, TokenRow
from latent_sft.data.lengths import Number, count_tokens
from latent_sft.inference.solve import Thinker
from latent_sft.method.types import LatentSpec
from latent_sft.methods.base import Callback, Curriculum, Method, Model, Setup, Stage, TrainState, save_plain
from latent_sft.methods.common import own_settings
from latent_sft.methods.cot import ExplicitModel, explicit_batch, explicit_lengths
from latent_sft.models.load import load_lm, trainable

EVERYTHING = 1 << 20  # more tokens than any CoT has


@dataclass(frozen=True, kw_only=True)
class ICoTConfig:
    """iCoT: in training, token after token of the CoT is left out, until the model answers at once."""

    train: TrainConfig = field(default_factory=TrainConfig)
    init: Literal["base", "cot"] = "base"
    """What it starts from: the base model, or the `cot` stage's checkpoint."""
    remove_per_epoch: float = 8.0
    """CoT tokens that are left out more after every epoch, one at a time, evenly over its steps."""
    remove_all_from: int = 0
    """Once so many tokens are left out, all are (published: remove_all_when_remove_beyond). 0: never at once."""
    removal_smoothing_lambda: float = 4.0
    """Each example lacks o further tokens, drawn with P(o) = (1 - e^-lambda) e^(-lambda o). `.inf`: none."""
    removal_side: Literal["left", "right"] = "left"
    """End of the CoT that tokens are taken from."""
    reset_optimizer: bool = True
    """Forget the optimizer's moments whenever one token more is left out, while any is left."""

    def __post_init__(self) -> None:
        smoothing, stop = self.removal_smoothing_lambda, self.train.stop_at_accuracy
        need(self.remove_per_epoch > 0, "icot.remove_per_epoch", self.remove_per_epoch, "a number > 0")
        need(self.remove_all_from >= 0, "icot.remove_all_from", self.remove_all_from, "0 or a number of tokens")
        need(smoothing > 0, "icot.removal_smoothing_lambda", smoothing, "a number > 0, or .inf")
        need(stop == 0, "icot.train.stop_at_accuracy", stop, "0: accuracy is high while the CoT is still written")
        self.train.check("icot.train")


def removed_at(step: int, steps_per_epoch: int, config: ICoTConfig) -> int:
    """Return how many CoT tokens the schedule leaves out at an optimizer step (0-based).

    >>> [removed_at(s, 4, ICoTConfig(remove_per_epoch=2)) for s in range(8)]
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    removed = step // max(1, round(steps_per_epoch / config.remove_per_epoch))
    return EVERYTHING if 0 < config.remove_all_from <= removed else removed


def numbered(rows: int, total_steps: int, seed: int, *, steps_per_epoch: int, config: ICoTConfig) -> Number:
    """Return the function (optimizer step, row) -> number of the example, for the sampler.

    Args:
        rows: of the training set.
        total_steps: of the whole training; a longer one goes on with the same schedule.
        seed: of the experiment, for the tokens that an example lacks beyond the schedule.
        steps_per_epoch: optimizer steps.
        config: settings of iCoT.
    """

    def number(step: int, row: int) -> int:
        # the whole part of an exponential draw is geometric
        further = int(random.Random(f"{seed}/{step}/{row}").expovariate(config.removal_smoothing_lambda))
        return (removed_at(step, steps_per_epoch, config) + further) * rows + row

    return number


def icot_batch(rows: Sequence[TokenRow], spec: LatentSpec, config: ICoTConfig, *, loss_reduction: str) -> Batch:
    """Batch of `P, remaining CoT, E, A`, trained on all but P; see `explicit_batch`.

    Args:
        rows: tokenised rows with `phase`, the number of CoT tokens left out; without one, the CoT is whole.
        spec: settings.
        config: settings of iCoT.
        loss_reduction: of the cross-entropy, see `TrainConfig`; `segment` is `sample` here.
    """
    shown = []
    for row in rows:
        kept = max(0, len(row["cot"]) - row.get("phase", 0))
        start = len(row["cot"]) - kept if config.removal_side == "left" else 0
        shown.append({**row, "cot": row["cot"][start : start + kept]})
    return explicit_batch(shown, spec, with_cot=True, loss_reduction=loss_reduction)


class AtRemoval(Callback):
    """Where one token more is left out, forgets the best checkpoint and the optimizer's moments, while any is left.

    A model that still writes its CoT scores higher than one that has less of it to write, but is not what is wanted.
    """

    def __init__(self, steps_per_epoch: int, config: ICoTConfig) -> None:
        self.steps_per_epoch, self.config, self.longest = steps_per_epoch, config, 0

    def on_begin(self, state: TrainState, rows: Any) -> None:
        """Look up how long the longest CoT is."""
        self.longest = int(count_tokens(rows.rows, "cot").max())

    def on_step(self, state: TrainState, optimizer: torch.optim.Optimizer) -> None:
        """Compare the schedule of the coming step with the last one's."""
        at = state.global_step
        before, now = (removed_at(step, self.steps_per_epoch, self.config) for step in (max(at - 1, 0), at))
        if before == now or before >= self.longest:
            return
        state.best_metric = state.best_global_step = None
        if self.config.reset_optimizer:
            optimizer.state.clear()


def _model(setup: Setup) -> nn.Module:
    return ExplicitModel(trainable(load_lm(setup.single, setup.trained_model), setup.model.lora))


def _curriculum(setup: Setup) -> Curriculum:
    return Curriculum(number=partial(numbered, steps_per_epoch=setup.steps_per_epoch, config=setup.settings))


METHOD = Method(
    title="iCoT",
    arxiv="2405.14838",
    paper="From Explicit CoT to Implicit CoT: Learning to Internalize CoT Step by Step",
    settings="icot",
    sections={"icot": ICoTConfig},
    stages=(
        Stage(
            name="icot",
            section="icot.train",
            meaning="token after token of the CoT is left out, until the answer comes at once",
            # it ends its thought itself: at once where nothing is left to write, later where the schedule was cut short
            thinker=lambda model: Thinker("explicit", model.lm),
            source=lambda settings: "cot" if settings.init == "cot" else None,
            identity=own_settings,
            model=_model,
            batch=lambda setup: partial(
                icot_batch, spec=setup.spec, config=setup.settings, loss_reduction=setup.train.loss_reduction
            ),
            lengths=lambda data, setup: explicit_lengths(data, setup.spec, with_cot=True),
            callbacks=lambda model, setup: [AtRemoval(setup.steps_per_epoch, setup.settings)],
            curriculum=_curriculum,
            save=partial(save_plain, thinker="explicit"),
        ),
    ),
    models=(
        Model(
            name="icot",
            meaning="answers at once; its CoT was left out of the training text token by token",
            colour="#4d9a8f",
            stages=("icot",),
            reasons=False,
        ),
    ),
)
