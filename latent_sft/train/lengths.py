"""How long the batches of a stage get, from the token counts of its examples; the layouts are in `method.layout`."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor

from latent_sft.method.types import LatentSpec
from latent_sft.train.sampler import Lengths


def explicit_lengths(data: Any, spec: LatentSpec, *, with_cot: bool) -> Lengths:
    """Lengths of `[P, C, E, A]`, without C for No-CoT."""
    cot = count_tokens(data, "cot") if with_cot else 0
    return _single(count_tokens(data, "prompt") + cot + len(spec.end_think_ids) + count_tokens(data, "answer"))


def stage1_lengths(data: Any, spec: LatentSpec) -> Lengths:
    """Lengths of the longer of the stage-1 decoder's sequence and the encoder's, in two-track order.

    Padded apart: the main track of each, the number of chunks, their longest, and the number of markers. A chunk's last
    token is not in the batch, so a chunk of one token is none (`layout.two_track`).
    """
    segments = [list(lengths) for lengths in data["segment_lengths"]]
    latents = torch.tensor([len(s) for s in segments])
    chunks = torch.tensor([sum(length > 1 for length in s[1:]) for s in segments])
    chunk = torch.tensor([max((length - 1 for length in s[1:]), default=0) for s in segments])
    prompt = count_tokens(data, "prompt")
    main = prompt + latents + len(spec.end_think_ids) + count_tokens(data, "answer") - 1
    parts = torch.stack([main, chunks, chunk, prompt + count_tokens(data, "cot"), latents], dim=1)
    return Lengths(parts, _stage1_width)


def stage2_lengths(data: Any, spec: LatentSpec) -> Lengths:
    """Lengths of `[P, z_1..z_N, E, A]`."""
    latents = count_tokens(data, "segment_lengths")
    return _single(count_tokens(data, "prompt") + latents + len(spec.end_think_ids) + count_tokens(data, "answer"))


def _stage1_width(parts: Tensor) -> Tensor:
    main, chunks, chunk, text, markers = parts.unbind(-1)
    return torch.maximum(main + chunks * chunk, text + markers)


def _single(lengths: Tensor) -> Lengths:
    return Lengths(lengths[:, None], lambda parts: parts[..., 0])


def count_tokens(data: Any, column: str) -> Tensor:
    """Return `[E]`: how many tokens every example has in a column of lists."""
    # counted in Arrow: a large data set is never turned into Python lists here
    lists = data.with_format("arrow")[:][column]
    return torch.from_numpy(pc.list_value_length(lists).to_numpy().copy()).long()
