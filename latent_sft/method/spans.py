"""Labels of spans: a latent is the position-weighted mixture of its span's tokens (after MUX, arXiv 2607.18264).

    mux(s_1..s_S) = sum_j a_j onehot(s_j),   a_j = rho^(j-1) / sum_l rho^(l-1)          Eq. 2 there

So a label is a code word: where the sums of subsets of the weights are all different, the span can be read back from
it, order and repeats included, if its length is known. `snap` does that for a predicted latent, and feeds the code word
back in its place. The length is looked for too: of all lengths up to the longest, the nearest code word wins.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from latent_sft.method.superposition import largest, largest_but, weighted
from latent_sft.method.thinking import LatentThinking
from latent_sft.method.types import SpanCode, Superposition

LONGEST = 9  # of spans whose code words are all compared: 26,442


def span_weights(length: int, rho: float) -> Tensor:
    """Return `a_1..a_S`, float64: geometric and normalised over the span.

    >>> [round(w, 4) for w in span_weights(7, 0.9).tolist()]
    [0.1917, 0.1725, 0.1553, 0.1397, 0.1258, 0.1132, 0.1019]
    """
    weights = torch.tensor([rho**j for j in range(length)], dtype=torch.float64)
    return weights / weights.sum()


def span_labels(spans: Sequence[Sequence[int]], rho: float, width: int) -> Superposition:
    """Return the labels of the spans of one row: ids `[N, K]` in span order with their weights; repeats stay apart.

    Merged masses would lose the order of repeated tokens in half precision, and the span's length.

    Args:
        spans: N spans of 1..K token ids.
        rho: ratio of one weight to the one before.
        width: K; shorter spans are filled with their first id and weight 0.
    """
    ids = torch.empty(len(spans), width, dtype=torch.long)
    weights = torch.zeros(len(spans), width)
    for i, span in enumerate(spans):
        ids[i] = torch.tensor([*span, *[span[0]] * (width - len(span))])
        weights[i, : len(span)] = span_weights(len(span), rho).float()
    return Superposition(ids, weights)


def separation(length: int, rho: float) -> float:
    """Return the smallest gap between the sums of two different subsets of the weights of a span.

    Two spans of this length share a label exactly where it is 0; what must survive rounding where tokens repeat. At
    rho = 1/2 it is the largest possible, `1 / (2^S - 1)`. Exact to float64; `2^S` sums, so for S up to about 20.
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for weight in span_weights(length, rho):
        sums = torch.cat([sums, sums + weight])
    return float(sums.sort().values.diff().min())


def random_cuts(num_tokens: int, num_spans: int, draw: random.Random) -> list[int]:
    """Return the lengths of `num_spans` non-empty spans of `num_tokens` tokens, all cut points equally likely.

    Fewer tokens than spans give one span per token.
    """
    inner = sorted(draw.sample(range(1, num_tokens), min(num_spans, num_tokens) - 1)) if num_tokens else []
    return [b - a for a, b in itertools.pairwise([0, *inner, num_tokens])] if num_tokens else []


class Snapper:
    """Finds the code word nearest to a latent, over all spans of 1..S tokens out of the latent's own ids.

    nearest     smallest L1 distance to the weights of the latent
    likeliest   smallest KL(code word || latent), the loss that it was trained with
    greedy      for every length takes the known weights, one after another, off the heaviest id that is left

    Greedy is wrong where a repeated token outweighs the first (`a b b` at rho = 0.7), but knows no limit of length. The
    other two look at every code word: a code word is a way to split the slots into sets of equal tokens (set partition)
    with an id for each set, and the best ids for a partition are found by sorting, because both measures are least
    where the heaviest set has the heaviest id. So there are sums of Bell numbers of them (278 for S = 6), not K^S. No
    wait for the device in either.

    Attributes:
        code: settings.
        weights: `[S, S]` float32, those of a span of each length, filled with 0.
    """

    def __init__(self, code: SpanCode, device: torch.device) -> None:
        self.code = code
        size = code.longest
        weights = torch.zeros(size, size)
        for length in range(1, size + 1):
            weights[length - 1, :length] = span_weights(length, code.rho).float()
        self.weights = weights.to(device)
        if size > LONGEST and code.snap in ("nearest", "likeliest"):
            raise ValueError(f"snap: got {code.snap!r}, expected none or greedy for spans of up to {size} tokens.")
        self.greedy = code.snap == "greedy" or size > LONGEST
        if not self.greedy:
            self.masses, self.rank, self.length = (part.to(device) for part in _code_words(code))

    def __call__(self, latent: Superposition) -> Superposition:
        """Return the nearest code word of every latent: ids in span order and weights, `[B, S]`.

        Args:
            latent: ids and weights `[B, K]`, K >= S, no id twice.

        Returns:
            Ids and weights; a span shorter than S ends with weights of 0.
        """
        weights, order = latent.weights.float().sort(-1, descending=True)
        ids, size = latent.ids.gather(-1, order), self.code.longest
        if self.greedy:
            slots, length = self._greedy(weights)
        else:
            near = weights[:, :size]
            if self.code.snap == "likeliest":
                # KL(word || latent); an id without any weight is as good as excluded
                cost = torch.xlogy(self.masses, self.masses).sum(-1) - near.clamp(min=1e-9).log() @ self.masses.T
            else:
                cost = torch.cdist(near, self.masses, p=1)  # what is beyond S ids adds the same to all
            best = cost.argmin(-1)
            slots, length = self.rank[best], self.length[best]
        return Superposition(ids.gather(-1, slots), self.weights[length].to(latent.weights.dtype))

    def _greedy(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place in the latent of each slot `[B, S]`, and the length less one `[B]`."""
        size = self.code.longest
        rest = weights[:, None].repeat(1, size, 1)  # [B, S lengths, K]
        taken = torch.empty(*rest.shape[:2], size, dtype=torch.long, device=rest.device)
        for j in range(size):
            heaviest = rest.argmax(-1, keepdim=True)
            taken[..., j] = heaviest[..., 0]
            rest.scatter_add_(-1, heaviest, -self.weights[:, j][None, :, None].expand_as(heaviest))
        length = rest.abs().sum(-1).argmin(-1)
        return taken.gather(1, length[:, None, None].expand(-1, 1, size))[:, 0], length


@cache
def _code_words(code: SpanCode) -> tuple[Tensor, Tensor, Tensor]:
    """Return all code words: masses of their tokens `[C, S]`, heaviest first; each slot's place among these `[C, S]`;
    the length less one `[C]`."""
    size = code.longest
    masses, ranks, lengths = [], [], []
    for length in range(1, size + 1):
        weights = span_weights(length, code.rho).tolist()
        for sets in _partitions(length):
            mass = [0.0] * (max(sets) + 1)
            for number, weight in zip(sets, weights, strict=True):
                mass[number] += weight
            order = sorted(range(len(mass)), key=lambda number: -mass[number])
            masses.append([*(mass[number] for number in order), *[0.0] * (size - len(mass))])
            ranks.append([*(order.index(number) for number in sets), *[0] * (size - length)])
            lengths.append(length - 1)
    return torch.tensor(masses), torch.tensor(ranks), torch.tensor(lengths)


def _partitions(length: int) -> Iterator[tuple[int, ...]]:
    """Yield every set partition of `length` slots: the number of each slot's set, sets numbered as they appear."""
    stack: list[tuple[int, ...]] = [(0,)]
    while stack:
        sets = stack.pop()
        if len(sets) == length:
            yield sets
        else:
            stack += [(*sets, number) for number in range(max(sets) + 2)]


class SpanThinking(LatentThinking):
    """Latents are code words of spans of tokens and can be read as such; what is fed back is snapped, or not."""

    title = "latents, each a span of tokens"
    needs = "mixture"
    readable = True

    def _prepare(self, thoughts: Any, mixture: Any) -> None:
        assert isinstance(mixture, SpanCode)
        self.most_steps, self.code = self.spec.max_latents, mixture
        # every token of a span has to be among the kept
        self.width = min(max(self.spec.top_k, mixture.longest), self.spec.vocab_size)
        self.snapper, self.reader = Snapper(mixture, self.device), Snapper(mixture, torch.device("cpu"))
        self.kept = self.width if mixture.snap == "none" else mixture.longest

    def choose(self, logits: Tensor) -> Superposition:
        """Return what is fed back after logits `[M, V]` at which the model thinks on, without noise."""
        if self.spec.exclude_end:
            kept, ids, _ = largest_but(logits, self.width, self.spec.end_think_ids[0])
        else:
            kept, ids = largest(logits, self.width)
        return self.fed(weighted(kept, ids, self.spec.decode_temperature))

    def fed(self, latent: Superposition) -> Superposition:
        """Return the nearest code word, or the latent itself."""
        return latent if self.code.snap == "none" else self.snapper(latent)

    def read(self, latents: Superposition) -> list[list[int]]:
        """Return the span of each latent, in order."""
        if self.code.snap == "none":
            latents = self.reader(latents)
        pairs = zip(latents.ids.tolist(), latents.weights.tolist(), strict=True)
        return [[token for token, weight in zip(*pair, strict=True) if weight > 0] for pair in pairs]
