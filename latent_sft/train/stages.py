"""The table of training stages: how each builds its model, its batches, its validation metrics and its final folder.

Read `train/run.py` first; a row here is everything in which one stage differs from another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from latent_sft.config.schema import Config, TrainConfig
from latent_sft.data.collate import Batch, explicit_batch, stage1_batch, stage2_batch
from latent_sft.data.labels import LabelStore
from latent_sft.evaluation.answers import answer_text, is_correct
from latent_sft.inference.encode import ADAPTERS_FILE, MARKER_FILE, load_stage1, phase_start, shared_start
from latent_sft.method.superposition import entropy
from latent_sft.method.types import Superposition
from latent_sft.models.backbone import head_table, input_table
from latent_sft.models.explicit import ExplicitModel
from latent_sft.models.load import load_lm, merged, save_lm, trainable
from latent_sft.models.stage1 import Stage1Model
from latent_sft.models.stage2 import Stage2Model
from latent_sft.train.lengths import explicit_lengths, stage1_lengths, stage2_lengths
from latent_sft.train.sampler import Lengths
from latent_sft.train.share import gathered, solve_share
from latent_sft.train.thought_lengths import coconut_lengths
from latent_sft.train.thought_stages import (
    build_coconut,
    build_distill,
    collate_coconut,
    collate_distill,
    lengths_of_distill,
    save_with_thoughts,
    weights_of_distill,
)
from latent_sft.workspace import Workspace

__all__ = ["STAGES", "Stage", "load_stage1", "validation_metrics"]

Collate = Callable[[list[dict[str, Any]]], Batch]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One row of the table.

    Attributes:
        thinker: how validation problems are solved (see `inference.solve`).
        build: workspace -> module whose forward returns loss sums, ready to train.
        collate: workspace, settings -> rows to batch.
        lengths: training set, workspace -> padded lengths, for batches of a number of tokens.
        lm: module -> what `solve` takes.
        weights: configuration -> weight of each loss term, in the order of the batch's `counts`.
        save: writes the final folder(s).
    """

    thinker: str
    build: Callable[[Workspace], nn.Module]
    collate: Callable[[Workspace, TrainConfig], Collate]
    lengths: Callable[[Any, Workspace], Lengths]
    lm: Callable[[Any], nn.Module]
    save: Callable[[Any, Workspace, Path], None]
    weights: Callable[[Config], dict[str, float]]


def _frozen(lm: nn.Module) -> nn.Module:
    return lm.requires_grad_(False)


def _build_explicit(work: Workspace, *, name: str) -> nn.Module:
    return ExplicitModel(trainable(load_lm(work.start_of(name), work.config.trained_model), work.config.model.lora))


def _collate_explicit(work: Workspace, train: TrainConfig, *, with_cot: bool) -> Collate:
    return partial(
        explicit_batch,
        spec=work.spec,
        with_cot=with_cot,
        normalisation=train.normalisation,
        prompt_targets=train.prompt_targets,
    )


def _build_stage1(work: Workspace, *, phase: str) -> nn.Module:
    trains_encoder, trains_decoder = phase != "stage1-decoder", phase != "stage1-encoder"
    if work.config.stage1.share_backbone:
        model, adapted = shared_start(work, phase), lambda lm, lora: lm
    else:
        model, adapted = phase_start(work, phase), trainable
    model.encoder = adapted(model.encoder, work.config.model.lora) if trains_encoder else _frozen(model.encoder)
    model.decoder = adapted(model.decoder, work.config.model.lora) if trains_decoder else _frozen(model.decoder)
    model.marker.requires_grad_(trains_encoder)
    _freeze_unused_head(model.encoder)
    return model


def _freeze_unused_head(encoder: nn.Module) -> None:
    # the encoder's head is not part of the loss; an untied one would be a parameter without gradient
    if head_table(encoder) is not input_table(encoder):
        head_table(encoder).requires_grad_(False)


def _collate_stage1(work: Workspace, train: TrainConfig) -> Collate:
    return partial(stage1_batch, spec=work.spec, normalisation=train.normalisation)


def _collate_decoder(work: Workspace, train: TrainConfig) -> Collate:
    # the encoder is frozen: its latents were stored before the phase began
    step = work.labels_step("stage1-decoder")
    store = LabelStore(step.directory / "store", expect=work.labels_made_from("stage1-decoder"))
    return partial(stage1_batch, spec=work.spec, normalisation=train.normalisation, label_of=store.get)


def _save_stage1(model: Stage1Model, work: Workspace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    marker = {"marker": model.marker.detach().cpu().contiguous()}
    encoder = model.encoder
    if work.config.stage1.share_backbone:
        adapters = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if ".lora_" in n}
        save_file({**adapters, **marker}, folder / ADAPTERS_FILE)
        encoder = copy.deepcopy(encoder)  # merged in place, its adapters would be in the decoder's weights too
    for name, lm in (("encoder", encoder), ("decoder", model.decoder)):
        save_lm(merged(lm), folder / name, work.tokenizer)
        work.save_spec(folder / name, "gold")
    save_file(marker, folder / MARKER_FILE)


def _build_stage2(work: Workspace) -> nn.Module:
    source = work.source_of("stage2")
    assert source is not None  # source_of raises where there is no stage-1 phase
    source.results()
    lm = load_lm(work.start_of("stage2"), work.config.trained_model)
    return Stage2Model(trainable(lm, work.config.model.lora), work.spec)


def _collate_stage2(work: Workspace, train: TrainConfig) -> Collate:
    labels = work.labels_step()
    labels.results()
    store = LabelStore(labels.directory / "store", expect=work.labels_made_from())
    return partial(stage2_batch, spec=work.spec, label_of=store.get, normalisation=train.normalisation)


def _ce_and_kl(config: Config, *, name: str) -> dict[str, float]:
    train = config.stage(name)
    return {"ce": train.ce_weight, "kl": train.kl_weight}


def _save_lm(model: Any, work: Workspace, folder: Path, *, thinker: str) -> None:
    save_lm(merged(model.lm), folder, work.tokenizer)
    work.save_spec(folder, thinker)


def _inner_lm(model: Any) -> nn.Module:
    return model.lm


STAGES: dict[str, Stage] = {
    "no-cot": Stage(
        thinker="none",
        build=partial(_build_explicit, name="no-cot"),
        collate=partial(_collate_explicit, with_cot=False),
        lengths=lambda data, work: explicit_lengths(data, work.spec, with_cot=False),
        lm=_inner_lm,
        save=partial(_save_lm, thinker="none"),
        weights=partial(_ce_and_kl, name="no-cot"),
    ),
    "cot": Stage(
        thinker="explicit",
        build=partial(_build_explicit, name="cot"),
        collate=partial(_collate_explicit, with_cot=True),
        lengths=lambda data, work: explicit_lengths(data, work.spec, with_cot=True),
        lm=_inner_lm,
        save=partial(_save_lm, thinker="explicit"),
        weights=partial(_ce_and_kl, name="cot"),
    ),
    **{
        phase: Stage(
            thinker="gold",
            build=partial(_build_stage1, phase=phase),
            collate=_collate_decoder if phase == "stage1-decoder" else _collate_stage1,
            lengths=lambda data, work: stage1_lengths(data, work.spec),
            lm=lambda model: model,
            save=_save_stage1,
            weights=partial(_ce_and_kl, name=phase),
        )
        for phase in ("stage1-encoder", "stage1-decoder", "stage1-union")
    },
    "stage2": Stage(
        thinker="latent",
        build=_build_stage2,
        collate=_collate_stage2,
        lengths=lambda data, work: stage2_lengths(data, work.spec),
        lm=_inner_lm,
        save=partial(_save_lm, thinker="latent"),
        weights=partial(_ce_and_kl, name="stage2"),
    ),
    "coconut": Stage(
        thinker="continuous",
        build=build_coconut,
        collate=collate_coconut,
        lengths=lambda data, work: coconut_lengths(data, work.spec, work.config.coconut),
        lm=_inner_lm,
        save=save_with_thoughts,
        weights=lambda config: {"ce": config.coconut.train.ce_weight},
    ),
    **{
        name: Stage(
            thinker="continuous",
            build=partial(build_distill, name=name),
            collate=partial(collate_distill, name=name),
            lengths=partial(lengths_of_distill, name=name),
            lm=_inner_lm,
            save=save_with_thoughts,
            weights=partial(weights_of_distill, name=name),
        )
        for name in ("codi", "pccot", "kava")
    },
}


def validation_metrics(model: nn.Module, stage: Stage, work: Workspace, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return accuracy, mean reasoning steps and, where there are latents, their entropy and share of `</think>`.

    The processes of a job share the rows, and all of them return what one would.
    """
    settings = work.config.eval
    thoughts = getattr(model, "thoughts", None)
    decoded = solve_share(
        "explicit" if thoughts is not None and not thoughts.spec.num_latents else stage.thinker,
        stage.lm(model),
        work.spec,
        rows,
        batch_size=settings.batch_size,
        max_cot_tokens=settings.max_cot_tokens,
        thoughts=thoughts,
    )
    found = {
        i: (
            is_correct(answer_text(work.tokenizer, d.answer_ids), rows[i]["reference"], settings.grader),
            d.num_steps,
            None if d.latent_ids is None else Superposition(d.latent_ids, d.latent_weights),
        )
        for i, d in decoded.items()
    }
    right, num_steps, latents = zip(*gathered(found), strict=True)
    metrics = {"accuracy": sum(right) / len(rows), "reasoning_steps": sum(num_steps) / len(rows)}
    latents = [s for s in latents if s is not None and len(s.ids)]
    if latents:
        flat = Superposition(*(torch.cat(parts) for parts in zip(*latents, strict=True)))
        metrics["latent_entropy"] = entropy(flat).mean().item()
        metrics["end_share"] = (flat.ids[:, 0] == work.spec.end_think_ids[0]).float().mean().item()
    return metrics
