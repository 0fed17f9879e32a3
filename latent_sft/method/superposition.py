"""From hidden states or logits to superpositions, from superpositions to embeddings, and the one noise function.

Used by the encoder (stage 1), the labels, stage 2 and decoding alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_sft.method.types import LatentSpec, Superposition

# Independent draws tried per position before the clean weights are taken; a position that fails all of them has a
# failure chance p with p**8 small, or its clean top-1 is the end token already.
NOISE_DRAWS = 8
# entries searched at once for the largest logits: on a CPU 64 was faster than 128 and 256 for a vocabulary of 32k, and
# as fast as 128 for one of 152k
GROUP = 64
# a superposition with more entries has every id once: no span of tokens is that long
MOST_REPEATING = 64


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` largest entries `[..., k]` and their ids, largest first: `topk`, faster for wide vocabularies.

    A group of 64 entries that holds one of the k largest is among the k groups with the largest maxima, so only those
    are searched. Gradient flows through the returned entries.

    Args:
        logits: `[..., V]`.
        k: 1..V.
    """
    vocab = logits.shape[-1]
    groups = vocab // GROUP
    if groups <= 8 * k:  # few groups: little to save
        top = logits.max(-1, keepdim=True) if k == 1 else logits.topk(k, dim=-1)
        return top[0], top[1]
    grouped = logits[..., : groups * GROUP].unflatten(-1, (groups, GROUP))
    chosen = grouped.detach().amax(-1).topk(k, dim=-1, sorted=False).indices
    ids = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=logits.device)).flatten(-2)
    if vocab % GROUP:
        rest = torch.arange(groups * GROUP, vocab, device=logits.device)
        ids = torch.cat([ids, rest.expand(*ids.shape[:-1], -1)], dim=-1)
    top = logits.gather(-1, ids).topk(k, dim=-1)
    return top.values, ids.gather(-1, top.indices)


def largest_but(logits: Tensor, k: int, unwanted: int, drop: Tensor | bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `k` largest entries without `unwanted`, and the largest id with it: one pass for both.

    Args:
        logits: `[..., V]`.
        k: 1..V; where it is V, the unwanted id comes last with the value -inf.
        unwanted: an id.
        drop: `[...]` bool: positions at which `unwanted` is left out; elsewhere it may stay.

    Returns:
        Values and ids `[..., k]`, largest first, and the id of the overall largest entry `[...]`.
    """
    values, ids = largest(logits, min(k + 1, logits.shape[-1]))
    top = ids[..., 0]
    if values.shape[-1] == k:
        values = torch.cat([values, torch.full_like(values[..., :1], float("-inf"))], dim=-1)
        ids = torch.cat([ids, torch.full_like(ids[..., :1], unwanted)], dim=-1)
    # entries from the unwanted one on move up by one place
    moved = (ids[..., :k] == unwanted).cumsum(-1) > 0
    if isinstance(drop, Tensor):
        moved = moved & drop.unsqueeze(-1)
    return (
        torch.where(moved, values[..., 1:], values[..., :k]),
        torch.where(moved, ids[..., 1:], ids[..., :k]),
        top,
    )


def superpose(logits: Tensor, top_k: int, temperature: float = 1.0, exclude: int | None = None) -> Superposition:
    """Keep the `top_k` largest logits and weight them by their softmax (docs/internals/method.md).

        K = top-k(o),  alpha = softmax(o[K] / temperature)

    Gradient flows through the kept logits. The softmax runs in float32 (float64 stays float64).

    Args:
        logits: `[..., V]`.
        top_k: number of kept entries, 1..V.
        temperature: > 0; large values flatten the weights.
        exclude: id that must not be part of the superposition, or None.

    Returns:
        Superposition of ids `[..., K]` (largest first) and weights `[..., K]`.
    """
    kept, ids = largest(logits, top_k) if exclude is None else largest_but(logits, top_k, exclude)[:2]
    return weighted(kept, ids, temperature)


def weighted(kept: Tensor, ids: Tensor, temperature: float) -> Superposition:
    """Return the superposition of kept logits `[..., K]` and their ids: weights `softmax(kept / temperature)`."""
    precise = kept.dtype if kept.dtype == torch.float64 else torch.float32
    return Superposition(ids, torch.softmax(kept.to(precise) / temperature, dim=-1))


def mix(latent: Superposition, table: Tensor) -> Tensor:
    """Return the embedding of a superposition, `sum_v alpha[v] W[v]` (docs/internals/method.md).

    The `[..., K, D]` looked-up rows are never written to memory. The full vocabulary is one product, `alpha @ W`.

    Args:
        latent: ids and weights `[..., K]`.
        table: `[V, D]` input embeddings; pass it detached where it must not be trained through latents.

    Returns:
        `[..., D]` in the dtype of `table`.
    """
    ids, weights = latent
    width = ids.shape[-1]
    if width == len(table):
        # not scatter: a row that is fed one token has that id in every place, and its weight in the first
        dense = torch.zeros_like(weights).scatter_add(-1, ids, weights).to(table.dtype)
        with torch.autocast(table.device.type, enabled=False):  # as a lookup, which autocast does not round
            return dense @ table
    flat = torch.nn.functional.embedding_bag(
        ids.reshape(-1, width), table, per_sample_weights=weights.reshape(-1, width).to(table.dtype), mode="sum"
    )
    return flat.view(*ids.shape[:-1], table.shape[-1])


def combine(embeddings: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of already looked-up embeddings: `[..., K, D]`, `[..., K]` -> `[..., D]`.

    For models whose embedding module does more than a lookup (Gemma scales), look up with the module itself.
    """
    return torch.einsum("...kd,...k->...d", embeddings, weights.to(embeddings.dtype))


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw standard Gumbel noise, float32, from `generator` (None: the global one)."""
    uniform = torch.rand(shape, generator=generator, device=device)
    tiny = torch.finfo(torch.float32).tiny
    return -torch.log(-torch.log(uniform.clamp(tiny, 1.0 - 2.0**-24)))


def perturb(
    latent: Superposition,
    draws: Tensor,
    *,
    scale: float,
    temperature: float,
    clip: tuple[float, float],
    end_id: int,
) -> Superposition:
    """Perturb weights with Gumbel noise; ids never change and noise never makes `end_id` the top-1 (section 1.8).

        g~ = clamp(scale * g, clip),   a~ = softmax((log(a + 1e-10) + g~) / temperature)

    The guard: of the given independent draws, a position takes the first one whose top-1 is not `end_id`, or its clean
    weights where there is none. The published code redraws the whole sequence instead; since positions are independent,
    the two have the same distribution.

    Args:
        latent: clean superposition, `[..., K]`.
        draws: `[R, ..., K]` Gumbel noise, R draws to choose from (see `gumbel`, NOISE_DRAWS).
        scale: noise multiplier; 0 returns the input unchanged.
        temperature: of the softmax.
        clip: range of the scaled noise.
        end_id: first token of `</think>`.

    Returns:
        Superposition with the same ids.
    """
    if scale == 0:
        return latent
    ids, weights = latent
    noise = (scale * draws).clamp(*clip).to(weights.dtype)
    tries = torch.softmax((torch.log(weights + 1e-10) + noise) / temperature, dim=-1)  # [R, ..., K]
    top = tries.argmax(-1, keepdim=True)  # [R, ..., 1]
    refused = ids.expand(tries.shape).gather(-1, top).squeeze(-1) == end_id  # [R, ...]
    accepted = ~refused
    first = accepted.int().argmax(0)  # index of the first accepted draw; 0 where there is none
    chosen = tries.gather(0, first[None, ..., None].expand(1, *weights.shape)).squeeze(0)
    return Superposition(ids, torch.where(accepted.any(0)[..., None], chosen, weights))


def with_noise(latent: Superposition, spec: LatentSpec, scale: float) -> Superposition:
    """Return the superposition with fresh noise from the global generator, as `perturb`; scale 0 draws nothing."""
    if scale == 0:
        return latent
    return perturb(
        latent,
        gumbel((NOISE_DRAWS, *latent.weights.shape), None, latent.weights.device),
        scale=scale,
        temperature=spec.noise_temperature,
        clip=spec.noise_clip,
        end_id=spec.end_think_ids[0],
    )


def entropy(latent: Superposition) -> Tensor:
    """Return the entropy in nats, `[...]`; 0 for a single token, log K for uniform weights. Repeated ids add."""
    mass = latent.weights
    if 1 < latent.ids.shape[-1] <= MOST_REPEATING:
        # the mass of an id stands at each of its entries, so that -sum_k a_k log mass_k is that of the merged masses
        ids, order = latent.ids.sort(-1)
        group = torch.nn.functional.pad((ids[..., 1:] != ids[..., :-1]).long().cumsum(-1), (1, 0))
        place = torch.empty_like(group).scatter_(-1, order, group)
        mass = torch.zeros_like(mass).scatter_add_(-1, place, mass).gather(-1, place)
    return -torch.xlogy(latent.weights, mass).sum(-1)
