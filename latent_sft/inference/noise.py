"""Random draws of decoding: one generator a request, so that neither batch nor order changes what a request draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_sft.method.superposition import NOISE_DRAWS, gumbel


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampled answers (and explicit CoT) and noisy latents, reproducible per problem whatever the batch.

    Attributes:
        temperature: of the token distribution; 0 is greedy.
        top_p: nucleus mass.
        latent_noise: perturb latents with the spec's Gumbel noise (`noise_scale`).
        seed: together with a problem's number in the call it decides all its draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    latent_noise: bool = False
    seed: int = 0


class Noise:
    """The generators of the requests in work.

    Attributes:
        tokens: whether tokens are sampled.
        width: entries of a latent that have noise; 0 none.
    """

    def __init__(self, sampling: Sampling | None, width: int, device: torch.device) -> None:
        self.tokens, self.width = sampling is not None and sampling.temperature > 0, width
        self._seed = 0 if sampling is None else sampling.seed
        self._device = device
        self._generators: dict[int, torch.Generator] = {}

    def draw(self, requests: Sequence[int | None]) -> tuple[Tensor | None, Tensor | None]:
        """Return the next draws of each request (None: an idle slot, which draws nothing).

        Returns:
            `[B]` uniform numbers for tokens and `[R, B, K]` Gumbel draws for latents, each None where it is not needed.
        """
        if not self.tokens and not self.width:
            return None, None
        sizes = int(self.tokens), NOISE_DRAWS * self.width
        # from pinned memory a copy is only queued, and the host does not wait for the device
        drawn = torch.zeros(len(requests), sum(sizes), pin_memory=self._device.type == "cuda")
        for row, request in enumerate(requests):
            if request is not None:
                generator = self._generators.get(request)
                if generator is None:
                    generator = torch.Generator().manual_seed(self._seed * 1_000_003 + request)
                    self._generators[request] = generator
                drawn[row, : sizes[0]] = torch.rand(sizes[0], generator=generator)
                drawn[row, sizes[0] :] = gumbel((sizes[1],), generator, torch.device("cpu"))
        tokens, latents = drawn.to(self._device, non_blocking=True).split(sizes, dim=1)
        noisy = latents.view(len(requests), -1, self.width).transpose(0, 1) if self.width else None
        return tokens[:, 0] if self.tokens else None, noisy

    def forget(self, request: int) -> None:
        """Drop the generator of a request that is done."""
        self._generators.pop(request, None)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Return a sampled token a row, `[B]`: where the cumulative distribution of its nucleus passes a uniform number.

    One number a row, and not one for each entry of the vocabulary: for 64 rows of 152k those took 190 ms a step.

    Args:
        logits: `[B, V]`.
        uniform: `[B]` draws from [0, 1).
        sampling: temperature (> 0) and top_p.
    """
    mass = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p == 1:
        reached = mass.cumsum(-1)
        return _passed(reached, uniform[:, None] * reached[:, -1:])[:, 0]
    ordered, index = mass.sort(-1, descending=True)
    reached = ordered.cumsum(-1)
    last = (reached - ordered < sampling.top_p).sum(-1, keepdim=True) - 1  # the entry that crosses top_p stays
    place = _passed(reached, uniform[:, None] * reached.gather(-1, last))
    return index.gather(-1, place)[:, 0]


def _passed(reached: Tensor, share: Tensor) -> Tensor:
    # an entry of no mass is never the first to pass; the cap is for rows of NaN
    return torch.searchsorted(reached, share, right=True).clamp(max=reached.shape[-1] - 1)
