"""A padded batch of plain causal rows -> the same batch without padding, all rows one behind another.

Embeddings, projections, MLPs, norms and head then run on real tokens only; attention, which must not cross from one row
into the next, finds the rows again (`latent_sft.models.packing`). Nothing else changes: same losses, same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from latent_sft.data.collate import Batch, TokenRow
from latent_sft.method.layout import Kind


def packed(batch: Batch) -> Batch:
    """Return a batch of `explicit_batch` or `stage2_batch` as one row of its S real tokens.

    `ids, kind, branch, position` become `[1, S]` (positions start anew with every row) and `latent_ids, latent_weights`
    `[1, B*N, K]`; indices are moved along. New are `row_slots` `[B, T]`, the place in the packed row of every token of
    the padded batch (-1 for padding), and `row_place` `[S]`, the way back into the flat `[B*T]`.
    """
    real = batch["kind"] != Kind.PAD
    place = real.flatten().nonzero()[:, 0]
    slots = torch.where(real.flatten(), real.flatten().cumsum(0) - 1, -1)
    out = {**batch, "row_slots": slots.view_as(real), "row_place": place}
    for name in ("ids", "kind", "position"):
        out[name] = batch[name].flatten()[place][None]
    for name in ("target_index", "kl_index"):
        if name in batch:
            out[name] = slots[batch[name]]
    branch = batch["branch"]
    if "latent_ids" in batch:
        width = batch["latent_ids"].shape[1]
        first = torch.arange(len(branch))[:, None] * width
        branch = torch.where(branch >= 0, branch + first, branch)
        for name in ("latent_ids", "latent_weights"):
            out[name] = batch[name].flatten(0, 1)[None]
    out["branch"] = branch.flatten()[place][None]
    return out


def packed_rows(rows: Sequence[TokenRow], collate: Callable[[Sequence[TokenRow]], Batch]) -> Batch:
    """Collate rows and pack the result; a function of the module, so that worker processes can be given it."""
    return packed(collate(rows))
