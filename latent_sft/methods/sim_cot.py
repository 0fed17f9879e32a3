"""SIM-CoT: a second language model learns to write each CoT step from the latents that stand for it (arXiv 2509.20317).

    L = L of the student + weight · mean over slots k of (sum of CE of [step_k, eos] after z(k)) / n_k

The decoder reads `z(k)` and then the tokens of the step through the table of the model that thinks, with nothing else
before them, so that a latent has to say by itself which step it is. It is left out when the model is saved.

    on CODI      z(k) = z_k, k = 1 .. M + 1: the last one follows the last latent and is read, never fed
                 n_k = tokens; positions from 0
    on Coconut   z(k) = the c latents of step k, k = 1 .. latents so far / c; n_k = rows; positions from 1
                 where a row has fewer steps than slots, the answer is written in their place

Steps that are more than the slots are written from the last one, all together. The mean is over slots with any step in
the global batch, whatever way it is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latent_sft.config.schema import ModelConfig
from latent_sft.config.training import need
from latent_sft.data.collate import Batch, TokenRow
from latent_sft.data.lengths import Lengths, count_tokens
from latent_sft.errors import ConfigError, TrainingError
from latent_sft.memory import Backbone, Weights, one_model
from latent_sft.method.layout import Kind
from latent_sft.method.losses import StepOutput
from latent_sft.methods import coconut, self_distill
from latent_sft.methods.base import Callback, Collate, Method, Model, Setup, Stage, TrainState
from latent_sft.methods.coconut import CoconutConfig, CoconutModel
from latent_sft.methods.common import padded, save_with_thoughts, step_lengths, thinker_of
from latent_sft.methods.self_distill import SelfDistillConfig, SelfDistillModel
from latent_sft.models.backbone import embed, hidden_states, unwrap_peft
from latent_sft.models.head import ce_total
from latent_sft.models.load import load_lm, trainable

# optimizer steps without any CoT step to read, after which a stage is ended
PATIENCE = 20


@dataclass(frozen=True, kw_only=True)
class SimCotConfig:
    """SIM-CoT: a decoder, dropped after training, learns to write each CoT step from its latents. `codi` and `coconut`
    are what it is added to, each a stage of its own, trained where its `train.enabled` says so."""

    weight: float = 1.0
    """Of the cross-entropy of the steps."""
    decoder: Literal["full", "lora"] = "full"
    """How the decoder, a copy of the base model, is trained: as a whole in float32 (published), or by adapters as in
    `model.lora`."""
    codi: SelfDistillConfig = field(default_factory=self_distill.codi)
    """`drop_last_step` leaves the last step out for the decoder too."""
    coconut: CoconutConfig = field(default_factory=partial(CoconutConfig, max_stage=5, stage_share=0.094))

    def check(self, model: ModelConfig, stages: Sequence[str]) -> None:
        """Raise a ConfigError for a value out of range, or one that does not fit the `model` section."""
        self.codi.check("sim_cot.codi")
        self.coconut.check("sim_cot.coconut")
        need(self.weight > 0, "sim_cot.weight", self.weight, "a number > 0; without the decoder it is another stage")
        asked = any(stage.name in stages for stage in METHOD.stages)
        fits = not asked or self.decoder == "full" or model.lora.rank > 0
        need(fits, "sim_cot.decoder", self.decoder, "full, or model.lora.rank > 0")
        need(self.codi.iterations >= 1, "sim_cot.codi.iterations", self.codi.iterations, "1 or more: latents to read")
        need(
            self.coconut.max_stage >= 1, "sim_cot.coconut.max_stage", self.coconut.max_stage, "1 or more: some latents"
        )


class SimCotModel(nn.Module):
    """A student and the decoder that writes steps from its latents.

    Args:
        student: thinks, and has losses of its own.
        decoder: causal LM of the same width and vocabulary.
        per_slot: latents of a slot; 0 is one of M + 1, the last of which follows the last latent.
    """

    def __init__(self, student: SelfDistillModel | CoconutModel, decoder: nn.Module, per_slot: int) -> None:
        super().__init__()
        self.student, self.decoder, self.per_slot = student, decoder, per_slot

    @property
    def lm(self) -> nn.Module:
        """The model that thinks."""
        return self.student.lm

    @property
    def thoughts(self) -> nn.Module:
        """What is between its thoughts."""
        return self.student.thoughts

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return the sums of the student, and `step`, over a batch of `with_steps`.

        `count_step` and `count_slots` are those of the global batch: labels of the decoder, n_k of each slot.
        """
        prompt, thought = self.student.think(batch)
        out = self.student.losses(batch, prompt, thought)
        latents = thought.inputs
        if not self.per_slot:
            latents = torch.cat([latents, self.thoughts(thought.last)[:, None]], dim=1)
        width = self.per_slot or 1
        columns = batch["step_slot"][:, None] * width + torch.arange(width, device=latents.device)
        # a batch without any latent still runs the decoder, as the other processes do
        latents = nn.functional.pad(latents, (0, 0, 0, width)) if not latents.shape[1] else latents
        read = torch.cat([latents[batch["step_row"][:, None], columns], embed(self.lm, batch["step_ids"][:, :-1])], 1)
        position = torch.arange(read.shape[1], device=read.device) + (1 if self.per_slot else 0)
        hidden = hidden_states(self.decoder, read.to(unwrap_peft(self.decoder).dtype), position.expand(len(read), -1))
        labelled = hidden[:, width - 1 :].flatten(0, 1)[batch["step_index"]]
        # the loop divides by all labels what has to be divided slot by slot
        sizes = batch["count_slots"]
        share = batch["count_step"] / sizes.clamp(min=1) / (sizes > 0).sum().clamp(min=1)
        weights = share[batch["step_slot"]][batch["step_index"] // batch["step_ids"].shape[1]]
        steps = ce_total(self.decoder, labelled, batch["step_targets"], weights)
        return StepOutput({**out.loss_sums, "step": steps}, out.observed)


def with_steps(rows: Sequence[TokenRow], collate: Collate, base: SelfDistillConfig | CoconutConfig, eos: int) -> Batch:
    """Batch for `SimCotModel`: that of the student, and what the decoder writes from each slot.

    Args:
        rows: tokenised rows; for Coconut with their `phase`.
        collate: of the student.
        base: settings of the student.
        eos: ends a step.

    Returns:
        The student's batch, and `step_ids` `[R, S]` (steps with their end, padded), of `step_row` and `step_slot`
        `[R]`; `step_index` of the labels in `[R, S]`, `step_targets`; `kind` gets the decoder's columns behind the
        student's; `count_step`, the number of labels, and `count_slots`, n_k of each slot.

    Raises:
        DataError: a row does not say where its steps end.
    """
    batch = collate([dict(row) for row in rows])
    written = [_written(row, base) for row in rows]
    found = [(b, k, [*ids, eos]) for b, steps in enumerate(written) for k, ids in enumerate(steps)]
    sizes = torch.zeros(slots_of(base))
    for _, k, ids in found:
        sizes[k] += 1 if isinstance(base, CoconutConfig) else len(ids)
    made = found or [(0, 0, [eos])]  # the decoder has to run on every process; this is no label
    width = max(len(ids) for _, _, ids in made)
    used = [sum(len(ids) + (_per_slot(base) or 1) for ids in steps) for steps in written]
    decoder = (torch.arange(max(used)) < torch.tensor(used)[:, None]) * int(Kind.TAIL)
    labels = [r * width + t for r, (_, _, ids) in enumerate(found) for t in range(len(ids))]
    step_ids = padded("step", [ids for _, _, ids in made], eos)["step_ids"]
    step_index = torch.tensor(labels, dtype=torch.long)
    return {
        **batch,
        "step_ids": step_ids,
        "step_row": torch.tensor([b for b, _, _ in made]),
        "step_slot": torch.tensor([k for _, k, _ in made]),
        "step_index": step_index,
        "step_targets": step_ids.flatten()[step_index],
        "kind": torch.cat([batch["kind"], decoder], dim=1),
        "count_step": torch.tensor(float(len(labels))),
        "count_slots": sizes,
    }


def slots_of(base: SelfDistillConfig | CoconutConfig) -> int:
    """Return the slots that a row can have."""
    return base.max_stage if isinstance(base, CoconutConfig) else base.num_latents + 1


def _per_slot(base: SelfDistillConfig | CoconutConfig) -> int:
    return base.latents_per_step if isinstance(base, CoconutConfig) else 0


def _written(row: TokenRow, base: SelfDistillConfig | CoconutConfig) -> list[list[int]]:
    """Return what is written from each slot of a row, without the ends."""
    ends = pairwise(accumulate(step_lengths(row), initial=0))
    steps = [list(row["cot"][start:end]) for start, end in ends]
    last, here = slots_of(base), slots_of(base)
    if isinstance(base, CoconutConfig):
        latents = coconut.num_latents(len(steps), int(row.get("phase", base.first_stage)), base)
        here = latents // base.latents_per_step
        steps += [list(row["answer"][:-1])] * (here - len(steps))
    elif base.drop_last_step:
        steps = steps[:-1]
    if len(steps) > last:
        steps = [*steps[: last - 1], [token for step in steps[last - 1 :] for token in step]]
    return steps[:here]


class StepsAreRead(Callback):
    """Ends a stage whose data have no step that the decoder could write: its loss would be 0 without a word."""

    def on_begin(self, state: TrainState, rows: Any) -> None:
        """Note where training begins."""
        self.begun, self.found = state.global_step, False

    def on_log(self, state: TrainState, logs: Mapping[str, float]) -> None:
        """Look at the loss, which is that of all processes."""
        self.found = self.found or logs["loss_step"] > 0
        if not self.found and state.global_step - self.begun >= PATIENCE:
            raise TrainingError(
                f"no CoT of the first {state.global_step - self.begun} optimizer steps has a step that the decoder "
                "could write: each is a single step, and the last one is left out. Give a CoT as a list of steps "
                "(data.fields.steps) or one step a line, or set sim_cot.codi.drop_last_step=false."
            )


def _on(student: Stage, key: str, meaning: str) -> Stage:
    """Return a stage with a decoder added; `key` is where the settings of the student stand in the section."""

    def inner(setup: Setup) -> Setup:
        return dataclasses.replace(setup, settings=getattr(setup.settings, key))

    def decoder_model(setup: Setup) -> ModelConfig:
        # beside adapters too, what is trained as a whole is float32
        whole = setup.settings.decoder == "full" and setup.model.lora.rank > 0
        return dataclasses.replace(setup.model, dtype="float32") if whole else setup.trained_model

    def model(setup: Setup) -> nn.Module:
        settings, base, how = setup.settings, getattr(setup.settings, key), decoder_model(setup)
        decoder: Any = load_lm(setup.base, how)
        if decoder.dtype != getattr(torch, how.dtype):
            raise ConfigError(
                f"sim_cot.decoder: got 'full', expected lora, launch.zero below 3 or model.dtype=float32: with ZeRO-3 "
                f"all weights are loaded in {setup.model.dtype}, but what is trained beside adapters is float32."
            )
        if settings.decoder == "lora":
            decoder = trainable(decoder, setup.model.lora)
        thinking: Any = student.model(inner(setup))
        return SimCotModel(thinking, decoder, _per_slot(base))

    def batch(setup: Setup) -> Collate:
        collate, base = student.batch(inner(setup)), getattr(setup.settings, key)
        return partial(with_steps, collate=collate, base=base, eos=setup.spec.eos_id)

    def lengths(data: Any, setup: Setup) -> Lengths:
        # all of the CoT, and in front of each step its latents
        base, (parts, width) = getattr(setup.settings, key), student.lengths(data, inner(setup))
        decoder = count_tokens(data, "cot") + slots_of(base) * (_per_slot(base) or 1)
        if isinstance(base, CoconutConfig):
            decoder += slots_of(base) * count_tokens(data, "answer")
        return Lengths(torch.cat([parts, decoder[:, None]], 1), lambda parts: width(parts[..., :-1]) + parts[..., -1])

    def identity(settings: SimCotConfig, latent: Any) -> dict[str, Any]:
        own = {"weight": settings.weight, "decoder": settings.decoder}
        return {**student.identity(getattr(settings, key), latent), "decoder": own}

    def parameters(backbone: Backbone, setup: Setup) -> Weights:
        thinks = student.parameters(backbone, inner(setup))
        alone = backbone if setup.settings.decoder == "lora" else backbone._replace(adapters=0)
        reads = one_model(alone, setup.model, decoder_model(setup))
        return Weights(
            thinks.trained + reads.trained,
            thinks.trained_bytes + reads.trained_bytes,
            thinks.frozen_bytes + reads.frozen_bytes,
            max(thinks.largest, reads.largest),
            max(thinks.width, reads.width),
            thinks.trains_head or reads.trains_head,
        )

    return Stage(
        name=f"simcot-{key}",
        section=f"sim_cot.{key}.train",
        meaning=meaning,
        thinker=thinker_of,
        source=lambda settings: student.source(getattr(settings, key)),
        identity=identity,
        model=model,
        batch=batch,
        lengths=lengths,
        # the decoder stays behind
        save=save_with_thoughts,
        terms=lambda setup: {**student.terms(inner(setup)), "step": setup.settings.weight},
        # a slot of Coconut is never empty
        callbacks=lambda model, setup: (
            [*student.callbacks(model, inner(setup)), *([StepsAreRead()] if key == "codi" else [])]
        ),
        curriculum=lambda setup: student.curriculum(inner(setup)),
        parameters=parameters,
        more_positions=lambda setup: student.more_positions(inner(setup)),
    )


def _model(key: str, colour: str, on: str) -> Model:
    return Model(
        name=f"simcot-{key}",
        meaning=f"as {on}; in training a decoder wrote each CoT step from its latents",
        colour=colour,
        role="latent",
        stages=(f"simcot-{key}",),
    )


METHOD = Method(
    title="SIM-CoT",
    arxiv="2509.20317",
    paper="SIM-CoT: Supervised Implicit Chain-of-Thought",
    settings="sim_cot",
    sections={"sim_cot": SimCotConfig},
    stages=(
        _on(self_distill.CODI.stages[0], "codi", "as codi, and a decoder writes each step of the CoT from its latent"),
        _on(coconut.METHOD.stages[0], "coconut", "as coconut, and a decoder writes each step from its latents"),
    ),
    models=(_model("codi", "#1f6f8b", "codi"), _model("coconut", "#b8860b", "coconut")),
    check=lambda settings, model, stages: settings.check(model, stages),
)
