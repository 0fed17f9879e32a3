"""Solve tokenised problems by any thinker: none, explicit CoT, the model's own latents or gold ones, and the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latent_sft.data.collate import TokenRow, encoder_batch
from latent_sft.inference.generate import Decoded, Sampling, generate
from latent_sft.method.types import LatentSpec, Soft, Superposition
from latent_sft.models.sharding import whole
from latent_sft.models.stage1 import Stage1Model
from latent_sft.models.thoughts import Thoughts


def solve(
    thinker: str,
    model: nn.Module,
    spec: LatentSpec,
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    max_cot_tokens: int,
    thoughts: Thoughts | None = None,
    soft: Soft | None = None,
    latents: Sequence[Superposition | Tensor] | None = None,
    sampling: Sampling | None = None,
    progress: Callable[[int], object] | None = None,
    together: Callable[[bool], bool] | None = None,
) -> list[Decoded]:
    """Decode every row.

    Args:
        thinker: `none` (No-CoT), `explicit`, `latent`, `gold` (latents from the encoder, which sees the gold CoT),
            `continuous` (hidden states are fed back) or `soft` (Soft Thinking).
        model: causal LM; for `gold` a Stage1Model.
        spec: settings.
        rows: tokenised rows.
        batch_size: rows decoded together.
        max_cot_tokens: cap of explicit CoT, and of Soft Thinking.
        thoughts: for `continuous`.
        soft: for `soft`.
        latents: fed in place of any thinking, see `generate`; not for `gold`, which makes its own.
        sampling: None is greedy.
        progress: called with the number of rows just finished.
        together: of a job whose processes keep step, see `generate`.
    """
    prompts = [row["prompt"] for row in rows]
    options: dict[str, Any] = {"sampling": sampling, "batch_size": batch_size, "progress": progress}
    options["together"] = together
    if thinker == "gold":
        assert isinstance(model, Stage1Model)
        latents = list(gold_latents(model, rows, batch_size))
        return generate(model.decoder, spec, prompts, thinker="latent", latents=latents, **options)
    return generate(
        model,
        spec,
        prompts,
        thinker="explicit" if thinker == "none" else thinker,
        max_cot_tokens=0 if thinker == "none" else max_cot_tokens,
        thoughts=thoughts,
        soft=soft,
        latents=latents,
        **options,
    )


@torch.inference_mode()
def gold_latents(model: Stage1Model, rows: Sequence[TokenRow], batch_size: int) -> Iterable[Superposition]:
    """Yield the encoder's latents `[N, K]` of every row, on the CPU, in order."""
    was_training = model.training
    model.eval()
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        batch = {k: v.to(model.marker.device) for k, v in encoder_batch(chunk, model.spec).items()}
        with whole(model.parameters()):
            latent = model.encode(batch)
        ids, weights = latent.ids.cpu(), latent.weights.float().cpu()
        for b, count in enumerate(batch["latent_mask"].sum(1).tolist()):
            yield Superposition(ids[b, :count].clone(), weights[b, :count].clone())
    model.train(was_training)


def as_rows(dataset: Any, limit: int = 0) -> list[dict[str, Any]]:
    """Return the first `limit` rows (0: all) of a tokenised split as dictionaries."""
    count = len(dataset) if limit == 0 else min(limit, len(dataset))
    return list(dataset.select(range(count)))
