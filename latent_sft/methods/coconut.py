"""Coconut: CoT steps give way to hidden states fed back as inputs, stage by stage (arXiv 2412.06769).

A batch is cut where the passes are (`methods.common`): `P, latents, remaining steps, E, A`, trained on the latter.
The phase of an example depends on the optimizer step alone, whatever workers, accumulation, processes and resuming do
to the order of work: the sampler numbers it `phase x rows + row`, and its row is given the phase back from the number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latent_sft.config.training import TrainConfig, need
from latent_sft.data.collate import Batch, TokenRow
from latent_sft.data.lengths import Lengths, Number, count_tokens
from latent_sft.method import layout
from latent_sft.method.layout import Kind
from latent_sft.method.losses import StepOutput
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.methods.base import Callback, Collate, Curriculum, Method, Model, Setup, Stage, TrainState
from latent_sft.methods.common import (
    kind_of,
    own_settings,
    padded,
    save_with_thoughts,
    start_of,
    step_lengths,
    take_given,
    targets_of,
    thinker_of,
)
from latent_sft.models.head import ce_total
from latent_sft.models.load import load_lm, trainable
from latent_sft.models.thought_passes import (
    Prompt,
    Thought,
    check_length,
    labelled,
    read,
    read_on,
    think_in_turn,
    use_thoughts,
)
from latent_sft.models.thoughts import Thoughts


@dataclass(frozen=True, kw_only=True)
class CoconutConfig:
    """Coconut: stage by stage one more CoT step gives way to latents, which are hidden states fed back as they are."""

    train: TrainConfig = field(default_factory=TrainConfig)
    init: Literal["base", "cot"] = "cot"
    """What it starts from: the base model, or the `cot` stage's checkpoint."""
    latents_per_step: int = 2
    """Latents that take the place of a step (paper: c)."""
    first_stage: int = 1
    """0 begins with the whole CoT, which `init: cot` has learned already."""
    max_stage: int = 3
    """Stage k has the first k steps replaced; after this one all remaining steps are left out, with as many latents. 0:
    nothing is ever replaced, which is CoT fine-tuning."""
    stage_share: float = 0.15
    """Of all training steps, spent at each stage; the last one, without any written step, takes the rest."""
    uniform_prob: float = 0.0
    """Chance of an example to be shown at a stage drawn uniformly instead of the current one."""
    pad_latents: bool = True
    """An example with fewer steps than the stage still gets the stage's number of latents."""
    reset_optimizer: bool = True
    """Forget the optimizer's moments whenever a stage begins."""

    def check(self, section: str) -> None:
        """Raise a ConfigError for a value out of range; `section` is where these settings stand."""
        need(self.latents_per_step >= 1, f"{section}.latents_per_step", self.latents_per_step, "an integer >= 1")
        need(self.max_stage >= 0, f"{section}.max_stage", self.max_stage, "an integer >= 0")
        last = self.max_stage + 1 if self.max_stage else 0
        need(0 <= self.first_stage <= max(last, 1), f"{section}.first_stage", self.first_stage, f"0 to {max(last, 1)}")
        share, each = self.stage_share * max(0, last - self.first_stage), self.stage_share
        need(each > 0 and share < 1, f"{section}.stage_share", each, "shares that sum to below 1")
        need(0 <= self.uniform_prob <= 1, f"{section}.uniform_prob", self.uniform_prob, "0 to 1")

    @property
    def num_latents(self) -> int:
        """Latents of the finished model."""
        return self.latents_per_step * self.max_stage


class CoconutModel(nn.Module):
    """A causal LM with cross-entropy on the written steps, `</think>` and the answer after latents.

    Args:
        lm: causal LM; its attention is set to ours.
        thoughts: from a hidden state to the next input; Coconut's is the identity.
        spec: settings.
    """

    def __init__(self, lm: nn.Module, thoughts: Thoughts, spec: LatentSpec) -> None:
        super().__init__()
        self.lm, self.thoughts, self.spec = lm, thoughts, spec
        use_thoughts(lm)

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return `ce`, the weighted sum over a batch of `coconut_batch`."""
        return self.losses(batch, *self.think(batch))

    def think(self, batch: dict[str, Tensor]) -> tuple[Prompt, Thought]:
        """Read the prompts and think."""
        check_length(self.lm, sum(batch[part].shape[1] for part in ("prompt_ids", "thought_mask", "tail_ids")))
        prompt = read(self.lm, batch["prompt_ids"], batch["prompt_length"])
        return prompt, think_in_turn(self.lm, self.thoughts, prompt, batch["thought_mask"])

    def losses(self, batch: dict[str, Tensor], prompt: Prompt, thought: Thought) -> StepOutput:
        """Return the sums of `forward` after what `think` gave."""
        result = read_on(
            self.lm, batch["tail_ids"], batch["tail_length"], thought.position, (prompt.piece, *thought.pieces)
        )
        hidden = labelled(thought.last, result, batch["target_index"])
        return StepOutput({"ce": ce_total(self.lm, hidden, batch["targets"], batch["target_weights"])}, {})


def coconut_batch(rows: Sequence[TokenRow], spec: LatentSpec, config: CoconutConfig, *, loss_reduction: str) -> Batch:
    """Batch for Coconut (`CoconutModel`): `P, latents, remaining steps, E, A`, trained on the latter.

    Args:
        rows: tokenised rows with `phase`, the curriculum's stage: the first so many steps are latents,
            `latents_per_step` each; beyond `max_stage` no step is written any more. Without steps in the CoT, only
            stage 0 is possible. A row without a phase is at the first stage.
        spec: settings.
        config: settings of Coconut.
        loss_reduction: of the cross-entropy, see `TrainConfig`; `segment` is `sample` here.

    Returns:
        `prompt_ids` `[B, P]`, `tail_ids` `[B, S]`, each with `_length` `[B]`; `thought_mask` `[B, N]`, the latents of
        each row out of the N passes that are made (as many in every batch of a stage, on every process); targets;
        `kind` `[B, P + N + S]`; `count_ce`.

    Raises:
        DataError: a stage above 0 and a row that does not say where its steps end.
    """
    stages = [int(row.get("phase", config.first_stage)) for row in rows]
    end = list(spec.end_think_ids)
    laid = [
        layout.explicit_row(row["prompt"], _remaining(row, stage, config), end, row["answer"], loss_reduction)
        for row, stage in zip(rows, stages, strict=True)
    ]
    # a row can be drawn at any stage, and processes must agree on the number of passes
    widest = config.max_stage if config.uniform_prob else min(max(stages), config.max_stage)
    latents = torch.tensor([_num_latents(row, stage, config) for row, stage in zip(rows, stages, strict=True)])
    mask = torch.arange(config.latents_per_step * widest) < latents[:, None]
    starts = [len(row["prompt"]) for row in rows]
    batch = {
        **padded("prompt", [list(row["prompt"]) for row in rows], spec.pad_id),
        **padded("tail", [row.ids[n:] for row, n in zip(laid, starts, strict=True)], spec.pad_id),
        "thought_mask": mask,
    }
    count = sum(layout.loss_count(row, loss_reduction) for row in laid)
    return {
        **batch,
        **targets_of("", laid, starts, batch["tail_ids"].shape[1]),
        "kind": torch.cat([kind_of(batch, "prompt"), mask * int(Kind.LATENT), kind_of(batch, "tail")], dim=1),
        "count_ce": torch.tensor(float(count)),
    }


def num_latents(steps: int, stage: int, config: CoconutConfig) -> int:
    """Return the latents of an example with so many steps at a stage of Coconut.

    >>> num_latents(2, 4, CoconutConfig(latents_per_step=2, max_stage=3))
    6
    >>> num_latents(2, 4, CoconutConfig(latents_per_step=2, max_stage=3, pad_latents=False))
    4
    """
    replaced = min(stage, config.max_stage)
    return config.latents_per_step * (replaced if config.pad_latents else min(replaced, steps))


def _num_latents(row: TokenRow, stage: int, config: CoconutConfig) -> int:
    return num_latents(len(step_lengths(row)) if stage else 0, stage, config)


def _remaining(row: TokenRow, stage: int, config: CoconutConfig) -> list[int]:
    if stage == 0:
        return list(row["cot"])
    lengths = step_lengths(row)
    return [] if stage > config.max_stage else list(row["cot"][sum(lengths[:stage]) :])


def coconut_lengths(data: Any, spec: LatentSpec, config: CoconutConfig) -> Lengths:
    """Lengths of `[P]`, the latents and `[C, E, A]`, with all latents and the whole CoT as an upper bound."""
    prompt, cot, answer = (count_tokens(data, column) for column in ("prompt", "cot", "answer"))
    parts = torch.stack([prompt, cot + len(spec.end_think_ids) + answer], dim=1)

    def width(parts: Tensor) -> Tensor:
        return parts.sum(-1) + config.num_latents

    return Lengths(parts, width)


def stage_at(step: int, total_steps: int, config: CoconutConfig) -> int:
    """Return the stage of an optimizer step (0-based) out of `total_steps`.

    Stage k shows k steps as latents; `max_stage + 1` shows no written step any more.

    >>> [stage_at(s, 10, CoconutConfig(max_stage=2, stage_share=0.2)) for s in range(10)]
    [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    """
    last = config.max_stage + 1 if config.max_stage else 0
    each = max(1, round(config.stage_share * total_steps))
    return min(config.first_stage + step // each, last)


def numbered(rows: int, total_steps: int, seed: int, config: CoconutConfig) -> Number:
    """Return the function (optimizer step, row) -> number of the example, for the sampler.

    Args:
        rows: of the training set.
        total_steps: optimizer steps of the whole training.
        seed: of the experiment, for examples that are shown at another stage (`uniform_prob`).
        config: settings of Coconut.
    """

    def number(step: int, row: int) -> int:
        stage = stage_at(step, total_steps, config)
        if config.uniform_prob:
            draw = random.Random(f"{seed}/{step}/{row}")
            if draw.random() < config.uniform_prob:
                stage = draw.randint(0, config.max_stage)
        return stage * rows + row

    return number


class ForgetMoments(Callback):
    """Empties the optimizer's state where a stage begins, as the published code does (a new optimizer)."""

    def __init__(self, config: CoconutConfig) -> None:
        self.config = config

    def on_step(self, state: TrainState, optimizer: torch.optim.Optimizer) -> None:
        """Compare the stage of the coming step with the last one's."""
        step = state.global_step
        stages = [stage_at(at, state.max_steps, self.config) for at in (max(step - 1, 0), step)]
        if stages[0] != stages[1]:
            optimizer.state.clear()


def _model(setup: Setup) -> nn.Module:
    count = setup.settings.num_latents
    lm = load_lm(setup.single, setup.trained_model)
    thoughts = Thoughts(ThoughtSpec(num_latents=count, iterations=count), start_of(lm, setup.spec))
    take_given(thoughts, setup)
    return CoconutModel(trainable(lm, setup.model.lora), thoughts, setup.spec)


def _batch(setup: Setup) -> Collate:
    return partial(coconut_batch, spec=setup.spec, config=setup.settings, loss_reduction=setup.train.loss_reduction)


def _callbacks(model: nn.Module, setup: Setup) -> list[Callback]:
    return [ForgetMoments(setup.settings)] if setup.settings.reset_optimizer else []


METHOD = Method(
    title="Coconut",
    arxiv="2412.06769",
    paper="Training Large Language Models to Reason in a Continuous Latent Space",
    settings="coconut",
    sections={"coconut": CoconutConfig},
    stages=(
        Stage(
            name="coconut",
            section="coconut.train",
            meaning="step after step of the CoT gives way to hidden states that are fed back",
            thinker=thinker_of,
            source=lambda settings: "cot" if settings.init == "cot" else None,
            identity=own_settings,
            model=_model,
            batch=_batch,
            lengths=lambda data, setup: coconut_lengths(data, setup.spec, setup.settings),
            callbacks=_callbacks,
            curriculum=lambda setup: Curriculum(number=partial(numbered, config=setup.settings)),
            save=save_with_thoughts,
        ),
    ),
    check=lambda settings, model, stages: settings.check("coconut"),
    models=(
        Model(
            name="coconut",
            meaning="thinks in hidden states that replaced the CoT step by step",
            colour="#8c6d46",
            role="latent",
            stages=("coconut",),
        ),
    ),
)
