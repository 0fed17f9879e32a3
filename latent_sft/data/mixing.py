"""Sources with weights: which row every example of an epoch is. The same for any batch size and number of processes."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Slots(NamedTuple):
    """The examples of an epoch where rows have weights; as many in every epoch.

    A row of weight 2 has two slots. Rows of weight 1/2 share one in pairs of similar length and take turns, so that two
    epochs show each of them once; likewise for the part of any weight behind the point.

    Attributes:
        members: `[M]` rows, those of a slot beside each other.
        start: `[S]` where the rows of a slot begin.
        size: `[S]` how many rows it has.
    """

    members: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, weights: Tensor, lengths: Tensor, seed: int) -> Self:
        """Lay out the slots.

        Args:
            weights: `[E]` > 0, how often an epoch shows a row.
            lengths: `[E]` tokens of the rows.
            seed: decides which rows share a slot, and who begins.
        """
        generator = torch.Generator().manual_seed(seed)
        members, sizes = list[Tensor](), list[Tensor]()
        for weight in weights.unique().tolist():
            rows = (weights == weight).nonzero()[:, 0]
            whole = int(weight + 1e-6)
            members.append(rows.repeat(whole))
            sizes.append(torch.ones(len(members[-1]), dtype=torch.long))
            shared = round(len(rows) * (weight - whole))
            if not whole:
                shared = max(1, shared)  # a source that is listed is seen
            if shared > 0:
                rows = rows[torch.randperm(len(rows), generator=generator)]
                parts = rows[lengths[rows].argsort(stable=True)].tensor_split(shared)
                first = torch.rand(shared, generator=generator)
                members += [p.roll(int(f * len(p))) for p, f in zip(parts, first.tolist(), strict=True)]
                sizes.append(torch.tensor([len(part) for part in parts]))
        size = torch.cat(sizes)
        return cls(torch.cat(members), size.cumsum(0) - size, size)

    def rows(self, epoch: int) -> Tensor:
        """Return `[S]`: the row of every slot in an epoch."""
        return self.members[self.start + epoch % self.size]

    def longest(self, lengths: Tensor) -> Tensor:
        """Return `[S, ...]`: the largest lengths `[E, ...]` that a slot has in any epoch."""
        slot = torch.arange(len(self.size)).repeat_interleave(self.size)
        values = lengths[self.members]
        index = slot.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
        return values.new_zeros(len(self.size), *values.shape[1:]).scatter_reduce(0, index, values, "amax")
