"""LOTUS: blocks of latents take the place of CoT steps and are looped, all at once (arXiv 2606.31779).

    pass 0       prompt, E … E                 -> h_0                   E: one trained embedding, c = latents_per_block
    pass t       the latents, fed E + h_t-1    -> h_t    t = 1..R       the prompt is read once
    tail         reads the keys and values of pass R, so h_R itself feeds the step loss alone

    L = ce / n + step_weight step / n_S        step: token j of block b's step, through the LM head at place b c + j
                                               place 0 is the last token of <think>, place i is latent i

Each latent thus predicts the token behind its own place. A batch is cut where the passes are (`methods.common`); its
stage, which depends on the optimizer step alone, is the number of its blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latent_sft.config.training import TrainConfig, need
from latent_sft.data.collate import Batch, TokenRow, count_of
from latent_sft.data.lengths import Lengths, Number, count_tokens
from latent_sft.memory import Backbone, Weights, one_model
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
    think_at_once,
    use_thoughts,
)
from latent_sft.models.thoughts import Thoughts

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LotusConfig:
    """LOTUS: stage by stage one more CoT step gives way to a block of latents, which are looped all at once."""

    train: TrainConfig = field(default_factory=TrainConfig)
    init: Literal["base", "cot"] = "cot"
    """What it starts from: the base model, or the `cot` stage's checkpoint."""
    num_blocks: int = 6
    """K: the first K steps become a block of latents each; the last stage leaves further ones out."""
    latents_per_block: int = 25
    """c (published: c_thought), at least the tokens of a step: a longer one reaches into the next block's places."""
    iterations: int = 6
    """R, of the last stage; the thought takes R + 1 passes. Stage s has its share s / K of them, rounded up. 0: pause
    tokens."""
    first_stage: int = 0
    """0 begins with the whole CoT and no latents, which `init: cot` has learned already."""
    stage_share: float = 0.03
    """Of all training steps, spent at each stage; the last one takes the rest (published: an epoch of 30 or 100)."""
    step_weight: float = 0.05
    """Of the step loss; 0 computes none of it."""
    step_pass: Literal["last", "own", "every"] = "last"
    """Pass whose states the step loss scores: the last one; for block b the last pass of stage b (published for 1B:
    pass b, since R = K there); or every pass from the first loop on."""

    def __post_init__(self) -> None:
        need(self.num_blocks >= 1, "lotus.num_blocks", self.num_blocks, "an integer >= 1")
        need(self.latents_per_block >= 1, "lotus.latents_per_block", self.latents_per_block, "an integer >= 1")
        need(self.iterations >= 0, "lotus.iterations", self.iterations, "an integer >= 0")
        stages = f"0 to lotus.num_blocks={self.num_blocks}"
        need(0 <= self.first_stage <= self.num_blocks, "lotus.first_stage", self.first_stage, stages)
        before, share = self.num_blocks - self.first_stage, self.stage_share
        fits = share > 0 and share * before < 1
        need(fits, "lotus.stage_share", share, f"a share > 0, {before} of which sum to below 1")
        need(self.step_weight >= 0, "lotus.step_weight", self.step_weight, "a number >= 0")
        self.train.check("lotus.train")

    def thoughts_at(self, stage: int) -> ThoughtSpec:
        """Return how a stage thinks.

        >>> [LotusConfig(num_blocks=4, iterations=6).thoughts_at(s).iterations for s in range(5)]
        [0, 2, 3, 5, 6]
        """
        iterations = -(-self.iterations * stage // self.num_blocks)
        return ThoughtSpec(num_latents=self.latents_per_block * stage, iterations=iterations, added=True)


class LotusModel(nn.Module):
    """A causal LM with the objective above.

    Args:
        lm: causal LM; its attention is set to ours.
        thoughts: E, M and R of the last stage.
        settings: of the method.
    """

    def __init__(self, lm: nn.Module, thoughts: Thoughts, settings: LotusConfig) -> None:
        super().__init__()
        self.lm, self.thoughts, self.settings = lm, thoughts, settings
        use_thoughts(lm)

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return `ce`, the weighted sum over a batch of `lotus_batch`, and `step`, the sum over its step targets."""
        return self.losses(batch, *self.think(batch))

    def think(self, batch: dict[str, Tensor]) -> tuple[Prompt, Thought]:
        """Read the prompts and think."""
        check_length(self.lm, sum(batch[part].shape[1] for part in ("prompt_ids", "thought_mask", "tail_ids")))
        how = self.settings.thoughts_at(batch["thought_mask"].shape[1] // self.settings.latents_per_block)
        # without latents E is read all the same, zero times: a parameter that has no gradient stops a job of several
        prompt = read(self.lm, batch["prompt_ids"], batch["prompt_length"], self.thoughts, how)
        return prompt, think_at_once(self.lm, self.thoughts, prompt, how)

    def losses(self, batch: dict[str, Tensor], prompt: Prompt, thought: Thought) -> StepOutput:
        """Return the sums of `forward` after what `think` gave."""
        prefix = (prompt.piece, *thought.pieces)
        tail = read_on(self.lm, batch["tail_ids"], batch["tail_length"], thought.position, prefix)
        hidden = labelled(thought.last, tail, batch["target_index"])
        sums = {"ce": ce_total(self.lm, hidden, batch["targets"], batch["target_weights"])}
        if self.settings.step_weight:
            scored = thought.passes[-1:] if self.settings.step_pass == "last" else thought.passes
            places = torch.stack([torch.cat([prompt.last[:, None], states], dim=1) for states in scored])
            chosen, targets = places.flatten(0, 2)[batch["step_index"]], batch["step_targets"]
            sums["step"] = ce_total(self.lm, chosen, targets, torch.ones_like(targets, dtype=torch.float32))
        return StepOutput(sums, {})


def lotus_batch(rows: Sequence[TokenRow], spec: LatentSpec, config: LotusConfig, *, loss_reduction: str) -> Batch:
    """Batch for LOTUS (`LotusModel`): `P, blocks of latents, remaining steps, E, A`.

    Trained on what is written behind the latents but its first token, which no token that is read predicts; where no
    step remains, `</think>` always follows and is not trained on either.

    Args:
        rows: tokenised rows with `phase`, the stage: so many blocks, the same for all rows. Without one, the last.
        spec: settings.
        config: settings of LOTUS.
        loss_reduction: of the cross-entropy of the written part, see `TrainConfig`; `segment` is `sample` here.

    Returns:
        `prompt_ids` `[B, P]`, `tail_ids` `[B, S]`, each with `_length` `[B]`; `thought_mask` `[B, M]`; targets;
        `step_index` `[N]` into `[passes, B, 1 + M]` (see `step_targets`), `step_targets` `[N]`; `kind`
        `[B, P + M + S]`; `count_ce` and `count_step`.

    Raises:
        DataError: a stage above 0 and a row that does not say where its steps end.
    """
    stage = max(int(row.get("phase", config.num_blocks)) for row in rows)
    steps = [layout.split_cot(row["cot"], step_lengths(row)) if stage else [] for row in rows]
    laid = [_written(row, steps[i], stage, spec, config, loss_reduction) for i, row in enumerate(rows)]
    mask = torch.ones(len(rows), config.thoughts_at(stage).num_latents, dtype=torch.bool)
    starts = [len(row["prompt"]) for row in rows]
    batch = {
        **padded("prompt", [list(row["prompt"]) for row in rows], spec.pad_id),
        **padded("tail", [row.ids[n:] for row, n in zip(laid, starts, strict=True)], spec.pad_id),
        "thought_mask": mask,
    }
    scored = step_targets(steps, stage, config)
    return {
        **batch,
        **targets_of("", laid, starts, batch["tail_ids"].shape[1]),
        "step_index": torch.tensor([index for index, _ in scored], dtype=torch.long),
        "step_targets": torch.tensor([token for _, token in scored], dtype=torch.long),
        "kind": torch.cat([kind_of(batch, "prompt"), mask * int(Kind.LATENT), kind_of(batch, "tail")], dim=1),
        "count_ce": count_of(laid, loss_reduction),
        "count_step": torch.tensor(float(len(scored))),
    }


def _written(
    row: TokenRow, steps: list[list[int]], stage: int, spec: LatentSpec, config: LotusConfig, loss_reduction: str
) -> layout.Row:
    prompt, end = list(row["prompt"]), list(spec.end_think_ids)
    rest = [token for step in steps[stage:] for token in step]
    if not stage:
        return layout.explicit_row(prompt, row["cot"], end, row["answer"], loss_reduction)
    if not rest or stage == config.num_blocks:
        return layout.explicit_row([*prompt, *end], [], [], row["answer"], loss_reduction)
    return layout.explicit_row([*prompt, rest[0]], rest[1:], end, row["answer"], loss_reduction)


def step_targets(steps: Sequence[list[list[int]]], stage: int, config: LotusConfig) -> list[tuple[int, int]]:
    """Return what the step loss scores: places, counted through `[passes, B, 1 + M]`, and the token of each.

    Passes are all from that over the placeholders on, or with `step_pass=last` the last one alone. A step longer than
    its block goes on in the next block's places, which then have two targets; what reaches beyond the last latent is
    left out.

    >>> step_targets([[[10, 11, 12, 13], [20, 21, 22]]], 2, LotusConfig(num_blocks=2, latents_per_block=3))
    [(0, 10), (1, 11), (2, 12), (3, 13), (3, 20), (4, 21), (5, 22)]
    """
    how = config.thoughts_at(stage)
    found = []
    for b, blocks in enumerate(steps):
        for block, step in enumerate(blocks[:stage]):
            passes: Sequence[int] = (0,)
            if config.step_pass == "own":
                passes = (config.thoughts_at(block + 1).iterations,)
            elif config.step_pass == "every":
                passes = range(min(1, how.iterations), how.iterations + 1)
            for place, token in enumerate(step, start=block * config.latents_per_block):
                if place <= how.num_latents:
                    found += [((p * len(steps) + b) * (1 + how.num_latents) + place, token) for p in passes]
    return found


def lotus_lengths(data: Any, spec: LatentSpec, config: LotusConfig) -> Lengths:
    """Lengths of `[P]`, the passes over the latents of the last stage and `[C, E, A]` with the whole CoT: bounds."""
    prompt, cot, answer = (count_tokens(data, column) for column in ("prompt", "cot", "answer"))
    passes = (config.iterations + 1) * config.thoughts_at(config.num_blocks).num_latents
    parts = torch.stack([prompt, cot + len(spec.end_think_ids) + answer], dim=1)
    return Lengths(parts, lambda parts: parts.sum(-1) + passes)


def stage_at(step: int, total_steps: int, config: LotusConfig) -> int:
    """Return the stage of an optimizer step (0-based) out of `total_steps`: the number of blocks.

    >>> [stage_at(s, 10, LotusConfig(num_blocks=2, stage_share=0.2)) for s in range(10)]
    [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    """
    return min(config.first_stage + step // max(1, round(config.stage_share * total_steps)), config.num_blocks)


def numbered(rows: int, total_steps: int, seed: int, config: LotusConfig) -> Number:
    """Return the function (optimizer step, row) -> number of the example, for the sampler; nothing is drawn."""
    reached = stage_at(total_steps - 1, total_steps, config)
    if reached < config.num_blocks:
        log.warning("lotus: %d steps end in stage %d of %d; train longer", total_steps, reached, config.num_blocks)
    return lambda step, row: stage_at(step, total_steps, config) * rows + row


class ForgetBest(Callback):
    """Forgets the best checkpoint where a stage begins: scores of different stages are not compared.

    Published code does compare them, so that the model of stage 0, which writes its CoT, can win.
    """

    def __init__(self, config: LotusConfig) -> None:
        self.config = config

    def on_step(self, state: TrainState, optimizer: torch.optim.Optimizer) -> None:
        """Compare the stage of the coming step with the last one's."""
        before, now = (
            stage_at(step, state.max_steps, self.config) for step in (max(state.global_step - 1, 0), state.global_step)
        )
        if before != now:
            state.best_metric = state.best_global_step = None


def _model(setup: Setup) -> nn.Module:
    config: LotusConfig = setup.settings
    lm = load_lm(setup.single, setup.trained_model)
    thoughts = Thoughts(config.thoughts_at(config.num_blocks), start_of(lm, setup.spec))
    take_given(thoughts, setup)
    return LotusModel(trainable(lm, setup.model.lora), thoughts, config)


def _batch(setup: Setup) -> Collate:
    return partial(lotus_batch, spec=setup.spec, config=setup.settings, loss_reduction=setup.train.loss_reduction)


def _parameters(backbone: Backbone, setup: Setup) -> Weights:
    return one_model(backbone, setup.model, setup.trained_model, backbone.shape.hidden)  # E


METHOD = Method(
    title="LOTUS",
    arxiv="2606.31779",
    paper="Bridging the Gap Between Latent and Explicit Reasoning with Looped Transformers",
    settings="lotus",
    sections={"lotus": LotusConfig},
    stages=(
        Stage(
            name="lotus",
            section="lotus.train",
            meaning="step after step of the CoT gives way to a block of latents, looped all at once",
            thinker=thinker_of,
            source=lambda settings: "cot" if settings.init == "cot" else None,
            identity=own_settings,
            model=_model,
            batch=_batch,
            lengths=lambda data, setup: lotus_lengths(data, setup.spec, setup.settings),
            terms=lambda setup: {"ce": setup.train.ce_weight, "step": setup.settings.step_weight},
            callbacks=lambda model, setup: [ForgetBest(setup.settings)],
            curriculum=lambda setup: Curriculum(number=partial(numbered, config=setup.settings)),
            save=save_with_thoughts,
            parameters=_parameters,
            more_positions=lambda setup: (
                setup.settings.iterations * setup.settings.num_blocks * setup.settings.latents_per_block
            ),
        ),
    ),
    models=(
        Model(
            name="lotus",
            meaning="thinks in blocks of latents that are looped all at once",
            colour="#a8457a",
            role="latent",
            stages=("lotus",),
        ),
    ),
)
