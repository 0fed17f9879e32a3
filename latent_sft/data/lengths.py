"""How long the examples of a data set are, and how long batches of them get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow.compute as pc
import torch
from torch import Tensor

Number = Callable[[int, int], int]
"""(optimizer step, example) -> what the sampler yields for it."""


class Lengths(NamedTuple):
    """How long the examples of a data set are, and how long a batch of them gets by padding.

    Attributes:
        parts: `[E, C]` integers, the counts that are padded each on its own.
        width: the largest parts of a batch `[..., C]` -> its padded length `[...]`; grows with every part.
    """

    parts: Tensor
    width: Callable[[Tensor], Tensor]


def single(lengths: Tensor) -> Lengths:
    """Return the lengths of examples that are padded as a whole, `[E]`."""
    return Lengths(lengths[:, None], lambda parts: parts[..., 0])


def count_tokens(data: Any, column: str) -> Tensor:
    """Return `[E]`: how many tokens every example has in a column of lists."""
    # counted in Arrow: a large data set is never turned into Python lists here
    lists = data.with_format("arrow")[:][column]
    return torch.from_numpy(pc.list_value_length(lists).to_numpy().copy()).long()
