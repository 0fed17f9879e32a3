"""Solve tokenised problems by any thinker: none, explicit CoT, the model's own latents, an oracle's, and the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from latent_sft.data.collate import TokenRow
from latent_sft.inference.generate import Decoded, Sampling, generate
from latent_sft.method.types import LatentSpec, Soft, SpanCode, Superposition
from latent_sft.models.thoughts import Thoughts


class Thinker(NamedTuple):
    """A model with how it thinks.

    Attributes:
        kind: a name of `inference.engine.THINKERS`.
        lm: causal LM.
        thoughts: for `continuous`.
        mixture: for `soft` and `spans`.
        oracle: (rows, batch size) -> latents of every row, `[N, K]` each, made from its reference CoT; fed in place of
            its own.
        spans_of: for `spans`: row -> the spans of its reference CoT that its latents should stand for.
    """

    kind: str
    lm: nn.Module
    thoughts: Thoughts | None = None
    mixture: Soft | SpanCode | None = None
    oracle: Callable[[Sequence[TokenRow], int], Iterable[Superposition]] | None = None
    spans_of: Callable[[TokenRow], list[list[int]]] | None = None


def solve(
    thinker: Thinker,
    spec: LatentSpec,
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    max_cot_tokens: int,
    latents: Sequence[Superposition | Tensor] | None = None,
    sampling: Sampling | None = None,
    progress: Callable[[int], object] | None = None,
    together: Callable[[bool], bool] | None = None,
) -> list[Decoded]:
    """Decode every row.

    Args:
        thinker: the model and how it thinks.
        spec: settings.
        rows: tokenised rows.
        batch_size: rows decoded together.
        max_cot_tokens: cap of explicit CoT, and of Soft Thinking.
        latents: fed in place of any thinking, see `generate`.
        sampling: None is greedy.
        progress: called with the number of rows just finished.
        together: of a job whose processes keep step, see `generate`.
    """
    if latents is None and thinker.oracle is not None:
        latents = list(thinker.oracle(rows, batch_size))
    return generate(
        thinker.lm,
        spec,
        [row["prompt"] for row in rows],
        thinker=thinker.kind,
        max_cot_tokens=max_cot_tokens,
        latents=latents,
        sampling=sampling,
        batch_size=batch_size,
        progress=progress,
        thoughts=thinker.thoughts,
        mixture=thinker.mixture,
        together=together,
    )


def as_rows(dataset: Any, limit: int = 0) -> list[dict[str, Any]]:
    """Return the first `limit` rows (0: all) of a tokenised split as dictionaries."""
    count = len(dataset) if limit == 0 else min(limit, len(dataset))
    return list(dataset.select(range(count)))
