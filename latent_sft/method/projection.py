"""The encoder's superpositions straight from hidden states, without logits over the vocabulary in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_sft.method.superposition import largest, largest_but, superpose, weighted
from latent_sft.method.types import Superposition

# Rows projected at once; more only take memory (256 rows of 150k logits are 150 MB).
ROWS = 256


def superpose_states(
    hidden: Tensor, table: Tensor, top_k: int, temperature: float = 1.0, exclude: int | None = None
) -> Superposition:
    """Return `superpose(hidden @ table.T)` with all logits of a few rows at a time, and none of them kept.

    Which entries a latent keeps is found without gradient; the kept logits are then computed once more with it. The
    same values and gradient of `hidden`, since a softmax over kept logits has no gradient in the others. Where all are
    kept, it is `superpose` itself. The table is not trained through latents (docs/internals/method.md).

    Args:
        hidden: `[..., D]`.
        table: `[V, D]`.
        top_k: number of kept entries, 1..V.
        temperature: > 0.
        exclude: id that must not be part of the superposition, or None.

    Returns:
        Superposition of ids `[..., K]`, largest first, and weights `[..., K]`.
    """
    table = table.detach()
    if top_k == len(table):
        return superpose(torch.nn.functional.linear(hidden, table), top_k, temperature, exclude)
    with torch.no_grad():
        chunks = []
        for rows in hidden.flatten(0, -2).split(ROWS):
            logits = torch.nn.functional.linear(rows, table)
            found = largest(logits, top_k) if exclude is None else largest_but(logits, top_k, exclude)
            chunks.append(found[1])
        ids = torch.cat(chunks).unflatten(0, hidden.shape[:-1])
    kept = torch.einsum("...d,...kd->...k", hidden, torch.nn.functional.embedding(ids, table))
    return weighted(kept, ids, temperature)
