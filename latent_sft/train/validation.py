"""What is measured on validation problems while a stage trains: decoded answers, and what the latents are like."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from latent_sft.evaluation.answers import is_correct
from latent_sft.inference.solve import solve
from latent_sft.method.superposition import entropy
from latent_sft.method.types import Superposition
from latent_sft.methods.base import Stage
from latent_sft.workspace import Workspace


def validation_metrics(model: nn.Module, stage: Stage, work: Workspace, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return accuracy, mean reasoning steps and, where there are latents, their entropy and share of `</think>`."""
    settings = work.config.eval
    decoded = solve(
        stage.thinker(model), work.spec, rows, batch_size=settings.batch_size, max_cot_tokens=settings.max_cot_tokens
    )
    right = [
        is_correct(work.tokenizer.decode(d.answer_ids, skip_special_tokens=True), row["reference"], settings.grader)
        for d, row in zip(decoded, rows, strict=True)
    ]
    metrics = {
        "accuracy": sum(right) / len(rows),
        "reasoning_steps": sum(d.num_steps for d in decoded) / len(rows),
    }
    latents = [Superposition(d.latent_ids, d.latent_weights) for d in decoded if d.latent_ids is not None]
    latents = [s for s in latents if len(s.ids)]
    if latents:
        flat = Superposition(*(torch.cat(parts) for parts in zip(*latents, strict=True)))
        metrics["latent_entropy"] = entropy(flat).mean().item()
        metrics["end_share"] = (flat.ids[:, 0] == work.spec.end_think_ids[0]).float().mean().item()
    return metrics
