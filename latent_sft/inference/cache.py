"""Keys and values of rows that start and end at different times: one buffer per layer, one column for all rows.

Every row occupies a run of columns that ends at the shared one: a prompt of P tokens is written to the P columns before
it, and each step writes one more column for all rows at once. Where a row begins in the buffer does not matter to the
model, which is told positions explicitly and columns by a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from latent_sft.errors import ConfigError
from latent_sft.method.masks import to_additive


class Reading(NamedTuple):
    """A pass over several columns of some slots, which see themselves only.

    Attributes:
        slots: `[n]`.
        first: column in which the widest of the rows begins; the pass sees columns from here on.
        begin: column of the pass's first token; `first` unless others were read before.
    """

    slots: Tensor
    first: int
    begin: int


class SlotCache(Cache):
    """The cache that a model is called with; it only ever writes to, and reads from, preallocated buffers.

    Attributes:
        keys: `[S, heads, capacity, head_dim]` of each layer, made at its first call.
        values: likewise.
        capacity: columns of the buffers.
        column: the next one to be written.
        static: the model sees the whole buffer at every step (fixed shapes), not only the columns up to this one.
        reading: set while prompts are read, or several latents at once.
    """

    def __init__(self, slots: int, capacity: int, static: bool, device: torch.device) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.slots, self.capacity, self.static = slots, capacity, static
        self.column = 0
        self.reading: Reading | None = None
        self.column_index = torch.zeros(1, dtype=torch.long, device=device)  # a tensor: compiled code does not see ints

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what a layer computed, `[B, heads, T, head_dim]`, and return what it attends to."""
        if layer_idx == len(self.keys):
            self.keys.append(self._buffer(key_states))
            self.values.append(self._buffer(value_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.reading is not None:
            slots, first, begin = self.reading
            slots = slots.to(keys.device)  # layers may be spread over devices
            width = key_states.shape[2]
            keys.narrow(2, begin, width).index_copy_(0, slots, key_states)
            values.narrow(2, begin, width).index_copy_(0, slots, value_states)
            if begin == first:
                return key_states, value_states
            seen = begin + width - first
            return (
                keys.narrow(2, first, seen).index_select(0, slots),
                values.narrow(2, first, seen).index_select(0, slots),
            )
        if self.static:
            column = self.column_index.to(keys.device)
            keys.index_copy_(2, column, key_states)
            values.index_copy_(2, column, value_states)
            return keys, values
        keys.narrow(2, self.column, 1).copy_(key_states)
        values.narrow(2, self.column, 1).copy_(value_states)
        return keys.narrow(2, 0, self.column + 1), values.narrow(2, 0, self.column + 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns written."""
        return self.column

    def move_to(self, column: int) -> None:
        """Set the column of the next step."""
        self.column = column
        self.column_index.fill_(column)

    def repack(self, rows: Tensor | None, first: int, capacity: int) -> None:
        """Keep some slots (None: all); column `first` becomes the first one of buffers of `capacity` columns."""
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = repacked(buffer, 2, rows, first, self.column, capacity)
        self.slots = self.slots if rows is None else len(rows)
        self.capacity = capacity
        self.move_to(self.column - first)

    def num_bytes(self) -> int:
        """Return the size of all buffers in bytes."""
        return sum(b.numel() * b.element_size() for b in (*self.keys, *self.values))

    def _buffer(self, states: Tensor) -> Tensor:
        # zeros: a masked column has weight 0, and 0 times a NaN of uninitialised memory is NaN
        shape = (self.slots, states.shape[1], self.capacity, states.shape[3])
        buffer = torch.zeros(shape, dtype=states.dtype, device=states.device)
        if self.static:
            torch._dynamo.mark_static_address(buffer)  # or CUDA graphs refuse to write to it
        return buffer


def repacked(buffer: Tensor, dim: int, rows: Tensor | None, first: int, last: int, capacity: int) -> Tensor:
    """Return a buffer whose columns (of dimension `dim`) begin with `first..last` of this one, for some rows or all.

    A `first` below 0 leaves so many columns free in front. The same memory is used again where shapes allow it, so that
    compiled code finds it where it was.
    """
    begin, to = max(first, 0), max(-first, 0)
    kept = buffer.narrow(dim, begin, last - begin)
    rows = None if rows is None else rows.to(buffer.device)
    if rows is None and capacity == buffer.shape[dim]:
        if first:
            buffer.narrow(dim, to, last - begin).copy_(kept.clone())
        return buffer
    shape = list(buffer.shape)
    shape[dim] = capacity
    shape[0] = shape[0] if rows is None else len(rows)
    new = torch.zeros(shape, dtype=buffer.dtype, device=buffer.device)
    new.narrow(dim, to, last - begin).copy_(kept if rows is None else kept.index_select(0, rows))
    return new


class Windows:
    """Which layers of a model attend to a sliding window only, and the masks they need.

    Attributes:
        size: the window, 0 where no layer has one that `longest` tokens could exceed.
        mixed: some layers have one and others have none.
    """

    def __init__(self, lm: Any, longest: int) -> None:
        config = lm.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        other = kinds - {"full_attention", "sliding_attention"}
        if other or getattr(config, "attention_chunk_size", None):
            raise ConfigError(
                f"model: {type(lm).__name__} has {', '.join(sorted(other)) or 'chunked attention'} layers, which "
                "decoding does not know; expected layers of full or sliding-window attention. Use another model."
            )
        window = getattr(config, "sliding_window", None) or 0
        slides = "sliding_attention" in kinds or not kinds
        self.size = window if slides and longest > window else 0
        self.mixed = len(kinds) > 1

    def masks(self, mask: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        """Return what `attention_mask` has to be.

        Args:
            mask: additive `[B, 1, Q, T]` of full attention.
            distance: `[Q, T]` tokens from a key to a query.
        """
        if not self.size:
            return mask
        sliding = mask.masked_fill(distance >= self.size, torch.finfo(mask.dtype).min)
        return {"full_attention": mask, "sliding_attention": sliding} if self.mixed else sliding


def prompt_mask(real: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive causal mask `[B, 1, W, W]` of left-padded prompts, from `real` `[B, W]` bool."""
    width = real.shape[1]
    eye = torch.eye(width, dtype=torch.bool, device=real.device)  # padding sees itself: no softmax row is empty
    return to_additive((real[:, None] & torch.ones_like(eye).tril() | eye)[:, None], dtype)
