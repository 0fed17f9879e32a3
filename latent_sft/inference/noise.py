"""Random draws of decoding: one generator per request, so that neither batch nor order changes what a request draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_sft.method.superposition import NOISE_DRAWS, gumbel


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampled answers (and explicit CoT) and noisy latents, reproducible per problem whatever the batch.

    Attributes:
        temperature: of the token distribution; 0 is greedy.
        top_p: nucleus mass, of the tokens that `top_k` leaves.
        top_k: the likeliest tokens; 0 is all of them.
        latent_noise: perturb latents with the spec's Gumbel noise (`noise_scale`).
        seed: together with a problem's number in the call it decides all its draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    latent_noise: bool = False
    seed: int = 0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never sampled."""
        return self.top_p < 1 or self.top_k > 0


class RowSampling(NamedTuple):
    """Settings of rows that differ, `[B, 1]` each: those of `Sampling`, and which rows are sampled, and cut, at all.

    Rows that are not have harmless values. `any_cuts` spares the sorting where no row needs it.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    sampled: Tensor
    cuts: Tensor
    any_cuts: bool


class Noise:
    """The generators of the requests in work.

    Attributes:
        sampling: of requests that have none of their own.
        width: entries of a latent that have noise; 0 none.
    """

    def __init__(self, sampling: Sampling | None, width: int, device: torch.device) -> None:
        self.sampling, self.width = sampling or Sampling(), width
        self._device = device
        self._own: dict[int, tuple[Sampling, int]] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._rows: tuple[list[int | None], Sampling | RowSampling | None] = [], None

    def own(self, request: int, sampling: Sampling, place: int) -> None:
        """Let a request be sampled in its own way, with the draws of the problem at a place of a call with its seed."""
        self._own[request] = sampling, place

    def settings(self, requests: Sequence[int | None]) -> Sampling | RowSampling | None:
        """Return how tokens of the requests (None: an idle slot) are sampled; None where none of them is."""
        if not self._own:
            return self.sampling if self.sampling.temperature > 0 else None
        if self._rows[0] != list(requests):
            own = [self._own.get(r, (self.sampling,))[0] if r is not None else Sampling() for r in requests]
            rows = None if not any(row.temperature > 0 for row in own) else self._columns(own)
            self._rows = list(requests), rows
        return self._rows[1]

    def _columns(self, own: list[Sampling]) -> RowSampling:
        def column(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=self._device)[:, None]

        return RowSampling(
            temperature=column([row.temperature or 1.0 for row in own]),
            top_p=column([row.top_p for row in own]),
            top_k=column([row.top_k for row in own]),
            sampled=column([row.temperature > 0 for row in own]),
            cuts=column([row.cuts for row in own]),
            any_cuts=any(row.cuts and row.temperature > 0 for row in own),
        )

    def draw(self, requests: Sequence[int | None]) -> tuple[Tensor | None, Tensor | None]:
        """Return the next draws of each request (None: an idle slot, which draws nothing).

        Returns:
            `[B]` uniform numbers for tokens and `[R, B, K]` Gumbel draws for latents, each None where it is not needed.
        """
        sampled = self.settings(requests) is not None
        if not sampled and not self.width:
            return None, None
        sizes = int(sampled), NOISE_DRAWS * self.width
        # from pinned memory a copy is only queued, and the host does not wait for the device
        drawn = torch.zeros(len(requests), sum(sizes), pin_memory=self._device.type == "cuda")
        for row, request in enumerate(requests):
            if request is None:
                continue
            sampling, place = self._own.get(request, (self.sampling, request))
            generator = self._generators.get(request)
            if generator is None:
                generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + place)
                self._generators[request] = generator
            if sampling.temperature > 0:
                drawn[row, :1] = torch.rand(1, generator=generator)
            if self.width:
                drawn[row, sizes[0] :] = gumbel((sizes[1],), generator, torch.device("cpu"))
        tokens, latents = drawn.to(self._device, non_blocking=True).split(sizes, dim=1)
        noisy = latents.view(len(requests), -1, self.width).transpose(0, 1) if self.width else None
        return tokens[:, 0] if sampled else None, noisy

    def forget(self, request: int) -> None:
        """Drop what is kept of a request that is done."""
        self._generators.pop(request, None)
        self._own.pop(request, None)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling | RowSampling) -> Tensor:
    """Return a sampled token per row, `[B]`: where the cumulative distribution of its nucleus passes a uniform number.

    A row's token depends on its own settings alone; -1 where a row is not sampled.

    One number per row, and not one for each entry of the vocabulary: for 64 rows of 152k those took 190 ms per step.

    Args:
        logits: `[B, V]`.
        uniform: `[B]` draws from [0, 1).
        sampling: settings, with a temperature > 0 where they are the same for all rows.
    """
    mass = (logits.float() / sampling.temperature).softmax(-1)
    if isinstance(sampling, RowSampling):
        whole = _whole(mass, uniform)
        if sampling.any_cuts:
            whole = torch.where(sampling.cuts, _nucleus(mass, uniform, sampling), whole)
        return torch.where(sampling.sampled, whole, -1)[:, 0]
    return (_nucleus(mass, uniform, sampling) if sampling.cuts else _whole(mass, uniform))[:, 0]


def _whole(mass: Tensor, uniform: Tensor) -> Tensor:
    reached = mass.cumsum(-1)
    return _passed(reached, uniform[:, None] * reached[:, -1:])


def _nucleus(mass: Tensor, uniform: Tensor, sampling: Sampling | RowSampling) -> Tensor:
    ordered, index = mass.sort(-1, descending=True)
    reached, vocab = ordered.cumsum(-1), mass.shape[-1]
    inside = reached - ordered < sampling.top_p  # the entry that crosses top_p stays
    if isinstance(sampling, RowSampling) or sampling.top_k:
        top_k = torch.as_tensor(sampling.top_k, device=mass.device).expand(len(mass), 1)
        top_k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
        # the mass that top_k leaves is all there is; where it leaves everything, exactly 1 as in a call without it
        left = torch.where(top_k < vocab, reached.gather(-1, top_k - 1), 1.0)
        inside = (reached - ordered < sampling.top_p * left) & (torch.arange(vocab, device=mass.device) < top_k)
    last = inside.sum(-1, keepdim=True) - 1
    return index.gather(-1, _passed(reached, uniform[:, None] * reached.gather(-1, last)))


def _passed(reached: Tensor, share: Tensor) -> Tensor:
    # an entry of no mass is never the first to pass; the cap is for rows of NaN
    return torch.searchsorted(reached, share, right=True).clamp(max=reached.shape[-1] - 1)
