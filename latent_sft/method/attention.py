"""The structured masks as pieces of ordinary attention: no `[T, T]` mask, no work on masked pairs.

Sequences are in *two-track order* (`layout.two_track`): a main track under plain causal attention, then side tokens in
groups that hang off one main-track token, their anchor.

    decoder  P z_1 .. z_N E A  | S_2 | S_3 | ..   a chunk sees its latent (the anchor) and itself: tiny attentions
    encoder  P S_1 .. S_N E    | m_1 | m_2 | ..   a marker sees the text up to its anchor and itself

`masks.py` is the definition; tests compare outputs and gradients with it. Exact, since every query's keys are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Chunks are attended to in blocks of about this many tokens: single chunks of 2 to 16 are too small for any kernel.
BRANCH_BLOCK = 64
# Markers are attended to in blocks: the mask of a block ends at the last text token that one of them sees.
MARKER_BLOCK = 128
# Queries of a block where attention is written out (soft-capping, which SDPA does not have).
EXPLICIT_BLOCK = 512


class MarkerBlock(NamedTuple):
    """Markers `start..stop`, the number of text tokens any of them sees, and their additive mask
    `[B, 1, stop - start, reach + stop - start]` over that text and the block's own markers."""

    start: int
    stop: int
    reach: int
    mask: Tensor


class Tracks(NamedTuple):
    """What attention needs to know of a batch in two-track order.

    Attributes:
        anchor: `[B, G, R]` index in the main track that each side token hangs off: G groups of R tokens.
        markers: blocks of the induction mask; None is the supervision mask.
    """

    anchor: Tensor
    markers: tuple[MarkerBlock, ...] | None

    def main_length(self, length: int) -> int:
        """Tokens of the main track in a sequence of `length`."""
        return length - self.anchor.shape[1] * self.anchor.shape[2]


def supervision_tracks(anchor: Tensor) -> Tracks:
    """Tracks of the stage-1 decoder; `anchor` `[B, N - 1, R]` is the latent of each chunk."""
    return Tracks(anchor, None)


def induction_tracks(anchor: Tensor, text_length: int, dtype: torch.dtype) -> Tracks:
    """Tracks of the encoder; `anchor` `[B, N, 1]` is the last text token that a marker sees.

    The masks are built once a forward pass and shared by all layers.
    """
    last = anchor[..., 0]
    blocks = []
    for start in range(0, last.shape[1], MARKER_BLOCK):
        seen = last[:, start : start + MARKER_BLOCK]
        size = seen.shape[1]
        # reading the largest anchor would stop a GPU; there the mask covers all of the text
        reach = text_length if anchor.is_cuda else int(seen.max()) + 1
        text = torch.arange(reach, device=anchor.device) <= seen[..., None]
        itself = torch.eye(size, dtype=torch.bool, device=anchor.device).expand(len(seen), -1, -1)
        keep = torch.cat([text, itself], dim=-1)[:, None]
        mask = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, float("-inf"))
        blocks.append(MarkerBlock(start, start + size, reach, mask))
    return Tracks(anchor, tuple(blocks))


def tracked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tracks,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Attend under the supervision or the induction mask.

    Args:
        query: `[B, H, T, d]` in two-track order.
        key: `[B, H_kv, T, d]`, H a multiple of H_kv (grouped-query attention).
        value: `[B, H_kv, T, d_v]`.
        tracks: the batch's layout.
        scale: of the scores; None is 1/sqrt(d).
        dropout: share of attention weights dropped.
        softcap: c of `c * tanh(score / c)`, or None.

    Returns:
        `[B, H, T, d_v]`.
    """
    main = tracks.main_length(query.shape[2])
    options: dict[str, Any] = {"scale": scale, "dropout": dropout, "softcap": softcap}
    # copied, so that autograd does not keep the side tokens' states alive twice, in the whole and in their blocks
    own_states = (query[:, :, :main].contiguous(), key[:, :, :main].contiguous(), value[:, :, :main].contiguous())
    parts = [_attend(*own_states, None, **options)]
    if tracks.markers is None:
        if tracks.anchor.numel():
            parts.append(_branches(query, key, value, tracks.anchor, main, options))
    else:
        for start, stop, reach, mask in tracks.markers:
            own = slice(main + start, main + stop)
            keys = torch.cat([key[:, :, :reach], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, :reach], value[:, :, own]], dim=2)
            parts.append(_attend(query[:, :, own], keys, values, mask.to(query.dtype), **options))
    # joined in the order that follows, [B, T, H, d], which saves a copy
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _branches(query: Tensor, key: Tensor, value: Tensor, anchor: Tensor, main: int, options: dict) -> Tensor:
    batch, groups, width = anchor.shape
    per_block = max(1, min(groups, BRANCH_BLOCK // width))
    blocks = -(-groups // per_block)
    spare = blocks * per_block - groups
    queries = _blocked(query[:, :, main:], blocks, spare * width)
    latents = anchor[:, :, 0]
    keys, values = (
        torch.cat([_blocked(_take(x, latents), blocks, spare), _blocked(x[:, :, main:], blocks, spare * width)], dim=2)
        for x in (key, value)
    )
    out = _attend(queries, keys, values, _branch_mask(per_block, width, query), **options)
    out = out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, : groups * width]


def _take(states: Tensor, index: Tensor) -> Tensor:
    # [B, H, T, d] at [B, G] -> [B, H, G, d]
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _blocked(states: Tensor, blocks: int, spare: int) -> Tensor:
    # [B, H, blocks * n - spare, d] -> [B * blocks, H, n, d]
    return pad(states, (0, 0, 0, spare)).unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1)


def _branch_mask(groups: int, width: int, like: Tensor) -> Tensor:
    # keys of a block: its `groups` latents, then their chunks; additive [groups * width, groups + groups * width]
    group = torch.arange(groups * width, device=like.device) // width
    same = group[:, None] == group
    own_latent = group[:, None] == torch.arange(groups, device=like.device)
    keep = torch.cat([own_latent, same.tril()], dim=1)
    return torch.zeros(keep.shape, dtype=like.dtype, device=like.device).masked_fill_(~keep, float("-inf"))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Attention under an additive mask, or causal where it is None."""
    if softcap is None:
        options = {"is_causal": mask is None}
        if query.shape[1] != key.shape[1]:  # a branch: torch.compile has no plain bool of a symbolic comparison
            if mask is None or query.device.type == "cpu":
                options["enable_gqa"] = True
            else:  # with a mask no fused kernel of a GPU shares heads: all scores would be written down
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, **options)
    return softcapped(query, key, value, mask, scale, dropout, softcap)


def softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Attention with scores `c * tanh(score / c)` (Gemma 2), written out in blocks of queries.

    Args:
        query: `[B, H, Q, d]`.
        key: `[B, H_kv, K, d]`; `value` likewise.
        value: `[B, H_kv, K, d_v]`.
        mask: boolean (True = may attend) or additive, broadcast to `[B, 1, Q, K]`; None is causal with Q = K.
        scale: of the scores; None is 1/sqrt(d).
        dropout: share of attention weights dropped.
        softcap: c.

    Returns:
        `[B, H, Q, d_v]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    out = []
    for start in range(0, query.shape[2], EXPLICIT_BLOCK):
        part = query[:, :, start : start + EXPLICIT_BLOCK]
        stop = start + part.shape[2]
        reach = stop if mask is None else key.shape[2]
        scores = torch.tanh(part @ key[:, :, :reach].transpose(2, 3) * (scale / softcap)) * softcap
        if mask is None:
            future = torch.ones(part.shape[2], reach, dtype=torch.bool, device=query.device).triu(start + 1)
            scores = scores.masked_fill(future, float("-inf"))
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[..., start:stop, :], float("-inf"))
        else:
            scores = scores + mask[..., start:stop, :]
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        out.append(torch.dropout(weights, dropout, train=dropout > 0) @ value[:, :, :reach])
    return torch.cat(out, dim=2)
