"""A stage that makes its batches with the model under training: stage 2 with half of its latents the model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import latent_sft.train.run as run
from latent_sft.inference.solve import Policy
from latent_sft.method.layout import Kind
from latent_sft.methods import STAGES
from latent_sft.methods.base import Prepare, Setup

CALLS: list[tuple[int, list[str]]] = []


def own_latents(batch: dict[str, Any], policy: Policy) -> dict[str, Any]:
    """Return the batch with the latents that the model thinks, for about half of the rows."""
    CALLS.append((policy.step, batch["row_ids"]))
    assert not torch.is_grad_enabled() and not any(module.training for module in policy.module.modules())
    prompts = {}
    for row_id, ids, kind in zip(batch["row_ids"], batch["ids"], batch["kind"], strict=True):
        if policy.random(row_id).random() < 0.5:
            prompts[row_id] = ids[: int((kind == Kind.LATENT).nonzero()[0])].tolist()
    decoded = policy.decode(prompts) if prompts else {}
    ids, weights = batch["latent_ids"].clone(), batch["latent_weights"].clone()
    for b, row_id in enumerate(batch["row_ids"]):
        if row_id in decoded:
            found = decoded[row_id]
            count = min(found.num_steps, ids.shape[1])
            ids[b, :count] = found.latent_ids[:count]
            weights[b, :count] = found.latent_weights[:count]
    return {**batch, "latent_ids": ids, "latent_weights": weights}


@contextmanager
def with_own_latents() -> Iterator[None]:
    """Let stage 2 be such a stage while the context lasts."""

    def prepare(setup: Setup) -> Prepare:
        return own_latents

    CALLS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.STAGES, "stage2", dataclasses.replace(STAGES["stage2"], prepare=prepare))
        yield
