"""Who may attend to whom, as boolean masks `[B, 1, T, T]`, True = may attend. The dense form is the definition.

Derived from `kind`, `branch` and `time` of the layout, never from token values, so `pad == eos` is harmless. `time` is
the index in the sequence as the paper writes it (None: the order of the tensor): a position attends only to itself and
to earlier ones. Every row attends at least to itself, so no softmax row is empty.

This is the definition and the `dense` backend. `attention.py` computes the same without a mask over all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_sft.method.layout import Kind


def induction_mask(kind: Tensor, time: Tensor | None = None) -> Tensor:
    """Encoder mask (LTIM, docs/internals/method.md): everybody sees earlier *text*; nobody sees an earlier marker.

    For `a b m c m` (m = marker):

            a b m c m
        a   x
        b   x x
        m   x x x
        c   x x . x
        m   x x . x x

    Args:
        kind: `[B, T]` values of `Kind`.
        time: `[B, T]` index in the encoder sequence, or None.

    Returns:
        `[B, 1, T, T]` bool.
    """
    keys_are_text = (kind == Kind.TEXT)[:, None, :]
    queries_are_real = (kind != Kind.PAD)[:, :, None]
    return _with_diagonal(_earlier(kind, time) & keys_are_text & queries_are_real)


def supervision_mask(kind: Tensor, branch: Tensor, time: Tensor | None = None) -> Tensor:
    """Stage-1 decoder mask (LTSuM, docs/internals/method.md).

    Prompt, latents, `</think>` and answer see each other causally (the main track). A chunk token sees its latent and
    the earlier tokens of its own chunk, nothing else. For `p Z1 c Z2 / A` (c = S_2, / = `</think>`):

             p Z1 c Z2 / A
        p    x
        Z1   x x
        c    . x  x
        Z2   x x  . x
        /    x x  . x  x
        A    x x  . x  x x

    Args:
        kind: `[B, T]` values of `Kind`.
        branch: `[B, T]` branch index, -1 outside branches.
        time: `[B, T]` index in the decoder sequence, or None.

    Returns:
        `[B, 1, T, T]` bool.
    """
    main = (kind == Kind.TEXT) | (kind == Kind.LATENT) | (kind == Kind.TAIL)
    chunk = kind == Kind.CHUNK
    same_branch = branch[:, :, None] == branch[:, None, :]
    in_branch = chunk | (kind == Kind.LATENT)
    main_sees = main[:, :, None] & main[:, None, :]
    chunk_sees = chunk[:, :, None] & in_branch[:, None, :] & same_branch
    return _with_diagonal(_earlier(kind, time) & (main_sees | chunk_sees))


def to_additive(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `keep`, else the finite minimum of `dtype`: what transformers' sdpa and eager attention take."""
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, torch.finfo(dtype).min)


def _earlier(kind: Tensor, time: Tensor | None) -> Tensor:
    if time is None:
        time = torch.arange(kind.shape[1], device=kind.device)[None]
    return time[:, None, :] < time[:, :, None]


def _with_diagonal(keep: Tensor) -> Tensor:
    eye = torch.eye(keep.shape[-1], dtype=torch.bool, device=keep.device)
    return (keep | eye)[:, None]
