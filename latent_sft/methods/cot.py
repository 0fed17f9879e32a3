"""Explicit CoT fine-tuning and No-CoT: the baselines, and what other methods start from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from latent_sft.config.training import TrainConfig
from latent_sft.data.collate import Batch, TokenRow, count_of, padded, targets_of
from latent_sft.data.lengths import Lengths, count_tokens, single
from latent_sft.inference.solve import Thinker
from latent_sft.method import layout
from latent_sft.method.losses import StepOutput
from latent_sft.method.types import LatentSpec
from latent_sft.methods.base import Collate, Method, Model, Setup, Stage, save_plain
from latent_sft.models.backbone import embed, hidden_states
from latent_sft.models.head import ce_total
from latent_sft.models.load import load_lm, trainable


class ExplicitModel(nn.Module):
    """A causal LM with cross-entropy on CoT, `</think>` and answer; see `explicit_batch`."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return `ce`, the weighted sum over labelled positions."""
        hidden = hidden_states(self.lm, embed(self.lm, batch["ids"])).flatten(0, 1)
        labelled = hidden[batch["target_index"]]
        return StepOutput({"ce": ce_total(self.lm, labelled, batch["targets"], batch["target_weights"])}, {})


def explicit_batch(
    rows: Sequence[TokenRow], spec: LatentSpec, *, with_cot: bool, loss_reduction: str, prompt_targets: bool = False
) -> Batch:
    """Batch for explicit CoT fine-tuning (`with_cot`) or No-CoT; `prompt_targets` labels the prompt as well."""
    laid = [
        layout.explicit_row(
            r["prompt"], r["cot"] if with_cot else [], spec.end_think_ids, r["answer"], loss_reduction, prompt_targets
        )
        for r in rows
    ]
    filled, place = padded(laid, spec.pad_id)
    return {**filled, **targets_of(laid, place), "count_ce": count_of(laid, loss_reduction)}


def explicit_lengths(data: Any, spec: LatentSpec, *, with_cot: bool) -> Lengths:
    """Lengths of `[P, C, E, A]`, without C for No-CoT."""
    cot = count_tokens(data, "cot") if with_cot else 0
    return single(count_tokens(data, "prompt") + cot + len(spec.end_think_ids) + count_tokens(data, "answer"))


def _model(setup: Setup) -> nn.Module:
    return ExplicitModel(trainable(load_lm(setup.single, setup.trained_model), setup.model.lora))


def _batch(setup: Setup, *, with_cot: bool) -> Collate:
    return partial(
        explicit_batch,
        spec=setup.spec,
        with_cot=with_cot,
        loss_reduction=setup.train.loss_reduction,
        prompt_targets=setup.train.prompt_targets,
    )


def _stage(name: str, meaning: str, *, with_cot: bool) -> Stage:
    thinker = "explicit" if with_cot else "none"
    return Stage(
        name=name,
        section=name.replace("-", "_"),
        meaning=meaning,
        thinker=lambda model: Thinker(thinker, model.lm),
        model=_model,
        batch=partial(_batch, with_cot=with_cot),
        lengths=lambda data, setup: explicit_lengths(data, setup.spec, with_cot=with_cot),
        save=partial(save_plain, thinker=thinker),
    )


METHOD = Method(
    title="CoT-SFT",
    sections={"no_cot": TrainConfig, "cot": TrainConfig},
    stages=(
        _stage("no-cot", "baseline that answers without reasoning", with_cot=False),
        _stage(
            "cot",
            "baseline that writes its reasoning; a starting point where a method's init is cot",
            with_cot=True,
        ),
    ),
    models=(
        Model(name="no-cot", meaning="answers without reasoning", colour="#7d8590", stages=("no-cot",), reasons=False),
        Model(name="cot", meaning="writes its reasoning", colour="#2f6fb0", role="baseline", stages=("cot",)),
    ),
)
