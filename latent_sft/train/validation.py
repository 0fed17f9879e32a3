"""What is measured on validation problems while a stage trains: decoded answers, and what the latents are like."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from latent_sft.evaluation.answers import answer_text, is_correct
from latent_sft.experiment.workspace import Workspace
from latent_sft.method.superposition import entropy
from latent_sft.method.types import Superposition
from latent_sft.methods.base import Stage
from latent_sft.train.share import gathered, solve_share


def validation_metrics(model: nn.Module, stage: Stage, work: Workspace, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return accuracy, mean reasoning steps and, where there are latents, their entropy and share of `</think>`.

    The processes of a job share the rows, and all of them return what one would.
    """
    settings = work.config.eval
    decoded = solve_share(
        stage.thinker(model), work.spec, rows, batch_size=settings.batch_size, max_cot_tokens=settings.max_cot_tokens
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
        metrics["end_token_rate"] = (flat.ids[:, 0] == work.spec.end_think_ids[0]).float().mean().item()
    return metrics
