"""Length-bucketed order that depends on (seed, epoch) alone, so that a resumed run sees the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50  # batches sorted together: wide enough for little padding, narrow enough to stay random


class LengthBucketSampler(Sampler[int]):
    """Yields example numbers so that consecutive `batch_size` of them have similar lengths, batches in random order.

    transformers' own length grouping draws from the global generator, which a resumed process does not have back in
    the state it had at the start of the epoch, and leaves batches sorted by length inside a pool.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a global batch.
        seed: of the experiment.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded next; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        pools = order.split(self.batch_size * POOL)
        ordered = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools])
        batches = list(ordered.split(self.batch_size))
        # the short last batch stays last, so that every other batch is full
        full = len(batches) - (len(batches[-1]) < self.batch_size)
        shuffled = torch.randperm(full, generator=generator).tolist()
        for number in [*shuffled, *range(full, len(batches))]:
            yield from batches[number].tolist()
