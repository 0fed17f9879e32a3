"""Length-bucketed orders that depend on (seed, epoch) alone, so that a resumed run sees the same batches.

`LengthBucketSampler` deals out batches of a number of examples, `TokenBatchSampler` batches of a number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler

from latent_sft.data.lengths import Lengths, Number
from latent_sft.errors import ConfigError

POOL = 50  # batches sorted together: wide enough for little padding, narrow enough to stay random
SLICES = 50  # slices of a data set sorted by length; batches are drawn within one
BATCHES_PER_SLICE = 4  # at least, so that in a small data set, too, an example meets others than its neighbours


class LengthBucketSampler(Sampler[int]):
    """Yields example numbers so that consecutive `batch_size` of them have similar lengths, batches in random order.

    transformers' own length grouping draws from the global generator, which a resumed process does not have back in
    the state it had at the start of the epoch, and leaves batches sorted by length inside a pool.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a global batch.
        seed: of the experiment.

    Attributes:
        number: what is yielded instead of an example's number, for a curriculum.
        rows: epoch -> the row that every example is, where rows have weights (`data.mixing`).
    """

    def __init__(self, lengths: Sequence[int] | Tensor, batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.number: Number | None = None
        self.rows: Callable[[int], Tensor] | None = None
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded next."""
        self.epoch = epoch

    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of an epoch."""
        return -(-len(self) // self.batch_size)

    def examples_until(self, step: int) -> int:
        """Return how many examples the first `step` optimizer steps hold."""
        epochs, rest = divmod(step, self.steps_per_epoch())
        return epochs * len(self) + rest * self.batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        pools = order.split(self.batch_size * POOL)
        ordered = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools])
        batches = list(ordered.split(self.batch_size))
        # the short last batch stays last, so that every other batch is full
        full = len(batches) - (len(batches[-1]) < self.batch_size)
        shuffled = torch.randperm(full, generator=generator).tolist()
        first = self.epoch * self.steps_per_epoch()
        for step, number in enumerate([*shuffled, *range(full, len(batches))], first):
            yield from _numbered(_rows(batches[number], self.rows, self.epoch), step, self.number)


class TokenBatchSampler(Sampler[list[int]]):
    """Yields micro-batches of similar lengths whose padded size, rows x longest row, is at most `max_tokens`.

    `per_step` consecutive ones make an optimizer step, so the step depends on the budget of the whole job and not on
    how accumulation and processes share it out. The number of steps is the same in every epoch: the data set is sorted
    by length and sliced once, the cuts are made with the longest row of each slice, and chance only decides which
    examples of a slice meet, and when. Every example is seen once an epoch; only where the last step would lack
    micro-batches although each holds a single example already, fewer than `per_step` of them wait for another epoch.

    Args:
        lengths: of the examples.
        max_tokens: padded positions of a micro-batch.
        per_step: micro-batches of an optimizer step: accumulation x processes.
        seed: of the experiment.
        section: of the configuration these settings stand in, for errors.

    Attributes:
        number: what is yielded instead of an example's number, for a curriculum.
        rows: epoch -> the row that every example is, where rows have weights (`data.mixing`).

    Raises:
        ConfigError: an example is longer than `max_tokens`, or there are fewer examples than `per_step`.
    """

    def __init__(self, lengths: Lengths, max_tokens: int, per_step: int, seed: int, section: str) -> None:
        alone = lengths.width(lengths.parts)
        if alone.max() > max_tokens:
            raise ConfigError(
                f"{section}.max_tokens: got {max_tokens}, expected at least {int(alone.max())}: as long is training "
                f"example {int(alone.argmax())} in this stage ({int((alone > max_tokens).sum())} of {len(alone)} are "
                "longer than the budget). Raise it, or leave long examples out (data.max_cot_tokens, data.on_error)."
            )
        if len(alone) < per_step:
            raise ConfigError(
                f"{section}.gradient_accumulation_steps: a step takes {per_step} micro-batches (accumulation x "
                f"processes), but there are only {len(alone)} training examples; lower it."
            )
        self.per_step, self.seed, self.epoch = per_step, seed, 0
        self.number: Number | None = None
        self.rows: Callable[[int], Tensor] | None = None
        num_slices = max(1, min(SLICES, int(alone.sum()) // (BATCHES_PER_SLICE * max_tokens)))
        slices = alone.argsort(stable=True).tensor_split(num_slices)
        longest = torch.stack([lengths.parts[part].amax(0) for part in slices])
        self.slice_of = torch.empty(len(alone), dtype=torch.long)
        for number, part in enumerate(slices):
            self.slice_of[part] = number
        sizes = _cut([len(part) for part in slices], longest, lengths.width, max_tokens)
        self.sizes = _fill_up(sizes, per_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are yielded next."""
        self.epoch = epoch

    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of an epoch."""
        return len(self) // self.per_step

    def examples_until(self, step: int) -> int:
        """Return how many examples the first `step` optimizer steps hold."""
        epochs, rest = divmod(step, self.steps_per_epoch())
        in_epoch = [len(batch) for batch in islice(self._batches(epochs), rest * self.per_step)]
        return epochs * sum(len(batch) for batch in self._batches(0)) + sum(in_epoch)

    def __len__(self) -> int:
        return len(self.sizes) // self.per_step * self.per_step

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self.steps_per_epoch()
        for at, batch in enumerate(self._batches(self.epoch)):
            yield _numbered(batch, first + at // self.per_step, self.number)

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        generator = _generator(self.seed, epoch)
        order = torch.randperm(len(self.slice_of), generator=generator)
        order = order[self.slice_of[order].argsort(stable=True)]
        batches = order.split(self.sizes)
        for number in torch.randperm(len(batches), generator=generator)[: len(self)].tolist():
            yield _rows(batches[number], self.rows, epoch)


StepSampler = LengthBucketSampler | TokenBatchSampler


def shared_out(sampler: StepSampler, micro_batch_size: int, num_processes: int, process: int) -> list[list[int]]:
    """Return a process's micro-batches of the epoch that the sampler is set to, as many as the others have."""
    if isinstance(sampler, TokenBatchSampler):
        return list(sampler)[process::num_processes]
    # where rows do not come out even, those of the beginning are taken again
    batches = BatchSampler(sampler, micro_batch_size, drop_last=False)
    return list(BatchSamplerShard(batches, num_processes, process))


def _rows(examples: Tensor, rows: Callable[[int], Tensor] | None, epoch: int) -> list[int]:
    return (examples if rows is None else rows(epoch)[examples]).tolist()


def _numbered(examples: list[int], step: int, number: Number | None) -> list[int]:
    return examples if number is None else [number(step, example) for example in examples]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _cut(counts: list[int], longest: Tensor, width: Callable[[Tensor], Tensor], max_tokens: int) -> list[int]:
    """Return the sizes of micro-batches over slices of `counts` examples, none longer than `longest` of its slice."""
    sizes: list[int] = []
    rows, parts = 0, torch.zeros_like(longest[0])
    for count, slice_parts in zip(counts, longest, strict=True):
        while count:
            padded = torch.maximum(parts, slice_parts)
            # one example fits always, also where the longest parts of its slice do not fit together
            room = max(max_tokens // int(width(padded)), 1) - rows
            if room <= 0:
                sizes.append(rows)
                rows, parts = 0, torch.zeros_like(parts)
                continue
            taken = min(room, count)
            rows, count, parts = rows + taken, count - taken, padded
    return [*sizes, rows] if rows else sizes


def _fill_up(sizes: list[int], per_step: int) -> list[int]:
    """Halve the largest micro-batches until they fill the last step, or until nothing is left to halve."""
    sizes = list(sizes)
    while len(sizes) % per_step and max(sizes) > 1:
        at = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[at : at + 1] = [sizes[at] - sizes[at] // 2, sizes[at] // 2]
    return sizes


class Phased(Dataset):
    """Rows with the phase of a curriculum at which they are shown, as `phase`; an example is `phase x rows + row`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        phase, row = divmod(number, len(self.rows))
        return {**self.rows[row], "phase": phase}
