"""Solve tokenised problems by any thinker: none, explicit CoT, the model's own latents, an oracle's, and the others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from latent_sft.data.collate import TokenRow
from latent_sft.inference.engine import Engine
from latent_sft.inference.generate import Decoded, Sampling, generate
from latent_sft.method.types import LatentSpec, Mixing, Superposition
from latent_sft.models.thoughts import Thoughts


class Thinker(NamedTuple):
    """A model with how it thinks.

    Attributes:
        kind: a name of `inference.engine.THINKERS`.
        lm: causal LM.
        thoughts: for `continuous`.
        mixture: for `soft`, `spans` and `mixtures`.
        oracle: (rows, batch size) -> latents of every row, `[N, K]` each, made from its reference CoT; fed in place of
            its own.
        spans_of: for `spans`: row -> the spans of its reference CoT that its latents should stand for.
    """

    kind: str
    lm: nn.Module
    thoughts: Thoughts | None = None
    mixture: Mixing | None = None
    oracle: Callable[[Sequence[TokenRow], int], Iterable[Superposition]] | None = None
    spans_of: Callable[[TokenRow], list[list[int]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model under training as it stands before an optimizer step, for a stage that makes its batches with it.

    Attributes:
        module: of the stage, in eval mode; its parameters are whole on every process.
        thinker: how it solves problems.
        spec: settings.
        seed: of the experiment.
        step: optimizer steps made so far.
    """

    module: nn.Module
    thinker: Thinker
    spec: LatentSpec
    seed: int
    step: int

    def random(self, row_id: str) -> random.Random:
        """Return draws for a row that seed and step decide, and not its batch or where training was resumed."""
        return random.Random(f"{self.seed}/{self.step}/{row_id}")

    def decode(
        self,
        prompts: Mapping[str, Sequence[int]],
        *,
        max_cot_tokens: int = 512,
        sampling: Sampling | None = None,
        batch_size: int = 64,
    ) -> dict[str, Decoded]:
        """Decode every prompt; see `generate`.

        Args:
            prompts: row id -> token ids, each ending with the opening delimiter. For several samples of a row, give
                ids that add a number.
            max_cot_tokens: cap of explicit CoT, and of Soft Thinking.
            sampling: None is greedy; what a row draws is decided as in `random`.
            batch_size: rows decoded together.
        """
        numbers = {self.random(row_id).getrandbits(48): row_id for row_id in prompts}
        found: dict[str, Decoded] = {}
        how = self.thinker
        with Engine(
            how.lm,
            self.spec,
            thinker=how.kind,
            longest=max(map(len, prompts.values())),
            batch_size=min(batch_size, len(prompts)),
            sampling=sampling,
            max_cot_tokens=max_cot_tokens,
            thoughts=how.thoughts,
            mixture=how.mixture,
        ) as engine:
            for number, row_id in numbers.items():
                engine.add(prompts[row_id], number=number)
            while engine.busy():
                found |= {numbers[number]: decoded for number, decoded in engine.step(more=False).items()}
        return found


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
