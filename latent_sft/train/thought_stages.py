"""What the rows of `coconut`, `codi`, `pccot` and `kava` in `train/stages.py` consist of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from latent_sft.config.schema import SECTIONS, Config, SelfDistillConfig, TrainConfig
from latent_sft.data.collate import Batch
from latent_sft.data.thought_batches import coconut_batch, distill_batch
from latent_sft.errors import ConfigError
from latent_sft.method.types import ThoughtSpec
from latent_sft.models.backbone import core, embed
from latent_sft.models.coconut import CoconutModel
from latent_sft.models.load import load_lm, merged, save_lm, trainable
from latent_sft.models.self_distill import SelfDistillModel
from latent_sft.models.sharding import whole
from latent_sft.models.thoughts import THOUGHTS_FILE, Thoughts, save_thoughts
from latent_sft.train.sampler import Lengths
from latent_sft.train.thought_lengths import distill_lengths
from latent_sft.workspace import Workspace

Collate = Callable[[list[dict[str, Any]]], Batch]


def build_distill(work: Workspace, *, name: str) -> nn.Module:
    """Return the model of `codi`, `pccot` or `kava`, ready to train."""
    settings: SelfDistillConfig = getattr(work.config, name)
    lm = load_lm(work.start_of(name), work.config.trained_model)
    thoughts = _thoughts(lm, work, _thought_spec(settings), dropout=settings.projection_dropout)
    _take_given(thoughts, work, name)
    return SelfDistillModel(trainable(lm, work.config.model.lora), thoughts, work.spec, settings)


def build_coconut(work: Workspace) -> nn.Module:
    """Return the model of `coconut`, ready to train."""
    count = work.config.coconut.num_latents
    lm = load_lm(work.start_of("coconut"), work.config.trained_model)
    thoughts = _thoughts(lm, work, ThoughtSpec(num_latents=count, iterations=count))
    _take_given(thoughts, work, "coconut")
    return CoconutModel(trainable(lm, work.config.model.lora), thoughts, work.spec)


def _take_given(thoughts: Thoughts, work: Workspace, name: str) -> None:
    # from a stage of this kind, what is between its thoughts goes on too
    path = Path(work.start_of(name)) / THOUGHTS_FILE
    if not work.config.stage(name).start_from or not path.exists():
        return
    try:
        thoughts.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ConfigError(
            f"{SECTIONS[name]}.start_from: {path} does not fit {name} as it is configured here (projection)."
        ) from error


def _thoughts(lm: nn.Module, work: Workspace, spec: ThoughtSpec, dropout: float = 0.0) -> Thoughts:
    table = core(lm).get_input_embeddings()
    with whole(table.parameters()):
        start = embed(lm, torch.tensor(work.spec.think_ids[-1], device=table.weight.device))
    return Thoughts(spec, start, dropout=dropout)


def collate_distill(work: Workspace, train: TrainConfig, *, name: str) -> Collate:
    """Return rows -> batch of `codi`, `pccot` or `kava`."""
    settings: SelfDistillConfig = getattr(work.config, name)
    return partial(
        distill_batch,
        spec=work.spec,
        thought_spec=_thought_spec(settings),
        normalisation=train.normalisation,
        drop_last_step=settings.drop_last_step,
        kv=settings.kv,
    )


def collate_coconut(work: Workspace, train: TrainConfig) -> Collate:
    """Return rows with their `stage` -> batch of `coconut`."""
    return partial(coconut_batch, spec=work.spec, config=work.config.coconut, normalisation=train.normalisation)


def lengths_of_distill(data: Any, work: Workspace, *, name: str) -> Lengths:
    """Return how long batches of `codi`, `pccot` or `kava` get."""
    settings: SelfDistillConfig = getattr(work.config, name)
    return distill_lengths(data, work.spec, _thought_spec(settings))


def _thought_spec(settings: SelfDistillConfig) -> ThoughtSpec:
    return ThoughtSpec(num_latents=settings.num_latents, iterations=settings.iterations, projection=settings.projection)


def weights_of_distill(config: Config, *, name: str) -> dict[str, float]:
    """Return the weights of their terms, in the order of `counts` of `data.thought_batches.distill_batch`."""
    settings: SelfDistillConfig = getattr(config, name)
    return {
        "ce": settings.train.ce_weight,
        "teacher_ce": settings.teacher_weight,
        "hidden": settings.hidden_weight,
        "kv": settings.kv.weight,
    }


def save_with_thoughts(model: Any, work: Workspace, folder: Path) -> None:
    """Write the model, what is between its thoughts, and how it thinks."""
    save_lm(merged(model.lm), folder, work.tokenizer)
    save_thoughts(model.thoughts, folder)
    spec = model.thoughts.spec
    work.save_spec(folder, *(("continuous", spec) if spec.num_latents else ("explicit",)))
