"""CoT2: latents that hold several chains of thought at once, supervised as distributions (arXiv 2505.23648).

A training row says for each latent step what mixture of tokens the step is (field `mixtures`): the shares of the places
that several traces have reached. The model learns each mixture as its next-token distribution, and reads it as the next
input; when it thinks by itself, it reads its own. The last step, which is the answer, is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latent_sft.config.training import TrainConfig, need
from latent_sft.data.collate import Batch, TokenRow, stage2_batch
from latent_sft.data.lengths import Lengths, count_tokens, single
from latent_sft.errors import DataError
from latent_sft.inference.solve import Thinker
from latent_sft.method.losses import StepOutput
from latent_sft.method.superposition import superpose
from latent_sft.method.types import LatentSpec, Mixtures, Superposition
from latent_sft.methods.base import Collate, Method, Model, Setup, Stage, save_plain
from latent_sft.methods.common import own_settings
from latent_sft.models.load import load_lm, trainable
from latent_sft.models.logits import head
from latent_sft.models.stage2 import Stage2Model


@dataclass(frozen=True, kw_only=True)
class Cot2Config:
    """CoT2: the model learns to think in mixtures that training rows give (field `mixtures`), over several traces."""

    init: Literal["base", "cot"] = "base"
    """What training starts from: the base model, or the `cot` stage's checkpoint."""
    num_latents: int = 3
    """Latents, always as many: each training row has a mixture for each."""
    inputs: Literal["hard_teacher", "soft_teacher"] = "hard_teacher"
    """What is fed at a latent while training: the row's mixture, or the model's own (one pass more per latent)."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        need(self.num_latents >= 1, "cot2.num_latents", self.num_latents, "an integer >= 1")

    @property
    def thinking(self) -> Mixtures:
        """How the model thinks."""
        return Mixtures(num_latents=self.num_latents)


class Cot2Model(Stage2Model):
    """A causal LM with the objective of stage 2, without noise; embeddings learn from being mixed.

    Args:
        lm: causal LM.
        spec: settings.
        thinking: how it thinks.
        own_inputs: it reads its own mixtures and not the labels. Gradient flows through them.
    """

    train_table = True

    def __init__(self, lm: nn.Module, spec: LatentSpec, thinking: Mixtures, own_inputs: bool) -> None:
        super().__init__(lm, dataclasses.replace(spec, noise_scale=0.0))
        self.thinking, self.own_inputs = thinking, own_inputs

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return `ce` and `kl`, weighted sums over a batch of `cot2_batch`."""
        if self.own_inputs:
            fed = self.own_mixtures(batch)
            batch = {**batch, "fed_ids": fed.ids, "fed_weights": fed.weights}
        return super().forward(**batch)

    def own_mixtures(self, batch: dict[str, Tensor]) -> Superposition:
        """Return what the model thinks, ids and weights `[B, N, V]`.

        Latent n depends on those before it alone, so that n passes make the first n right, whatever is fed at first.
        """
        fed = Superposition(batch["latent_ids"], batch["latent_weights"])
        size = fed.ids.shape[:2]
        for _ in range(self.thinking.num_latents):
            logits = head(self.lm)(self.states(batch, fed)[batch["kl_index"]])
            fed = Superposition(*(part.unflatten(0, size) for part in superpose(logits, self.spec.vocab_size)))
        return fed


def check_steps(row: TokenRow, num_latents: int) -> None:
    """Raise a DataError for a row without a mixture for each latent."""
    found = len(row["mixture_ids"])
    if found != num_latents:
        raise DataError(
            f"row {row['id']}: field 'mixtures': {found} steps; expected cot2.num_latents={num_latents}, in every row "
            "of train. Give the row as many, or change that number."
        )


def labels_of(rows: Sequence[TokenRow], num_latents: int) -> dict[str, Superposition]:
    """Return the mixtures of rows by id, ids and weights `[N, K]`; K is that of the widest step, filled with weight 0.

    Raises:
        DataError: a row without a mixture for each latent.
    """
    for row in rows:
        check_steps(row, num_latents)
    width = max(len(step) for row in rows for step in row["mixture_ids"])
    return {
        row["id"]: Superposition(
            torch.tensor([[*ids, *[ids[0]] * (width - len(ids))] for ids in row["mixture_ids"]]),
            torch.tensor([[*masses, *[0.0] * (width - len(masses))] for masses in row["mixture_weights"]]),
        )
        for row in rows
    }


def cot2_batch(rows: Sequence[TokenRow], spec: LatentSpec, num_latents: int, *, loss_reduction: str) -> Batch:
    """Batch of stage 2 (see `data.collate.stage2_batch`) on the rows' mixtures; all that is predicted counts alike.

    With one trace, whose mixtures are single tokens, `ce + kl` is the loss of CoT fine-tuning on it.

    Args:
        rows: tokenised rows with `mixture_ids`, `mixture_weights`.
        spec: settings.
        num_latents: N.
        loss_reduction: of both terms. token: mean over the batch's latents and tokens of `</think>` and answer;
            segment, sample: over those of a row, then over rows.

    Raises:
        DataError: a row without N mixtures.
    """
    labels = labels_of(rows, num_latents)
    batch = stage2_batch(rows, spec, label_of=lambda row, _: labels[row], loss_reduction="token")
    predicted = torch.tensor([num_latents + len(spec.end_think_ids) + len(row["answer"]) for row in rows])
    by_token = loss_reduction == "token"
    each = torch.ones(len(rows)) if by_token else 1.0 / predicted
    count = (predicted.sum() if by_token else torch.tensor(len(rows))).float()
    return {
        **batch,
        "target_weights": each[batch["target_index"] // batch["ids"].shape[1]],
        "kl_weights": each.repeat_interleave(num_latents),
        "count_ce": count,
        "count_kl": count,
    }


def cot2_lengths(data: Any, spec: LatentSpec, num_latents: int) -> Lengths:
    """Lengths of `[P, z_1..z_N, E, A]`.

    Raises:
        DataError: a row without N mixtures.
    """
    for row in data.select_columns(["id", "mixture_ids"]):
        check_steps(row, num_latents)
    return single(count_tokens(data, "prompt") + num_latents + len(spec.end_think_ids) + count_tokens(data, "answer"))


def _model(setup: Setup) -> nn.Module:
    lm, config = load_lm(setup.single, setup.trained_model), setup.settings
    own_inputs = config.inputs == "soft_teacher"
    return Cot2Model(trainable(lm, setup.model.lora), setup.spec, config.thinking, own_inputs)


def _batch(setup: Setup) -> Collate:
    reduction = setup.train.loss_reduction
    return partial(cot2_batch, spec=setup.spec, num_latents=setup.settings.num_latents, loss_reduction=reduction)


METHOD = Method(
    title="CoT2",
    arxiv="2505.23648",
    paper="Continuous Chain of Thought Enables Parallel Exploration and Reasoning",
    story="Each token it thinks in is a distribution over where several chains of thought have come to.",
    settings="cot2",
    sections={"cot2": Cot2Config},
    stages=(
        Stage(
            name="cot2",
            section="cot2.train",
            meaning="the model learns to think in mixtures over several traces, which training rows give",
            thinker=lambda model: Thinker("mixtures", model.lm, mixture=model.thinking),
            source=lambda settings: "cot" if settings.init == "cot" else None,
            identity=own_settings,
            model=_model,
            batch=_batch,
            lengths=lambda data, setup: cot2_lengths(data, setup.spec, setup.settings.num_latents),
            terms=lambda setup: {"ce": setup.train.ce_weight, "kl": setup.train.kl_weight},
            save=lambda model, setup, folder: save_plain(
                model, setup, folder, thinker="mixtures", settings=model.thinking
            ),
        ),
    ),
    models=(
        Model(
            name="cot2",
            meaning="thinks in its own next-token distributions, trained to hold several traces at once",
            colour="#1b7f79",
            role="latent",
            stages=("cot2",),
        ),
    ),
)
