"""The floor: operations that must happen however the work is done, counted as docs/internals/speed.md says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from eval.speed.cases import Case, Size, spec_of
from latent_sft.inference.generate import Decoded
from latent_sft.method.layout import fixed_segments


class Work(NamedTuple):
    """Tokens through the blocks, allowed query-key pairs, positions with logits, and projected markers."""

    tokens: int
    pairs: int
    logits: int
    projected: int = 0


def flops(size: Size, work: Work, *, backward: bool) -> float:
    """Return the operations of a piece of work; a multiply-add is two."""
    weights = size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)
    forward = 2.0 * weights * work.tokens + 4.0 * size.hidden * size.layers * work.pairs
    forward += 2.0 * size.hidden * size.vocab * work.logits
    # the gradient of the projection passes through the k kept logits only
    return (3 if backward else 1) * forward + 2.0 * size.hidden * size.vocab * work.projected


def of_case(case: Case) -> float:
    """Return the floor of one call of a training or label case."""
    pieces = {"stage2": (_stage2,), "decoder": (_decoder,), "labels": (_encoder,)}.get(case.part, (_encoder, _decoder))
    backward = case.part != "labels"
    return sum(flops(case.size, _total(piece(case, n) for n in case.cot), backward=backward) for piece in pieces)


def of_decoding(size: Size, prompts: list[list[int]], decoded: list[Decoded]) -> float:
    """Return the floor of decoding: the prefix once, then one token a forward pass."""
    total = 0.0
    for prompt, row in zip(prompts, decoded, strict=True):
        tokens = len(prompt) + row.forward_passes - 1
        total += flops(size, Work(tokens, tokens * (tokens + 1) // 2, row.forward_passes), backward=False)
    return total


def _total(parts: Iterable[Work]) -> Work:
    return Work(*(sum(column) for column in zip(*parts, strict=True)))


def _encoder(case: Case, length: int) -> Work:
    text = case.prompt + length  # no marker sees </think>
    segments = fixed_segments(length, case.rate)
    read, pairs = case.prompt, text * (text + 1) // 2
    for segment in segments:
        read += segment
        pairs += read + 1
    return Work(text + len(segments), pairs, 0, len(segments))


def _decoder(case: Case, length: int) -> Work:
    segments = fixed_segments(length, case.rate)
    tail = len(spec_of(case.size).end_think_ids) + case.answer
    # the last token of the answer and of each chunk predicts nothing and is seen by nobody
    main = case.prompt + len(segments) + tail - 1
    branches = sum(n - 1 for n in segments[1:])
    pairs = main * (main + 1) // 2 + sum(j + 1 for n in segments[1:] for j in range(1, n))
    return Work(main + branches, pairs, sum(segments[1:]) + tail)


def _stage2(case: Case, latents: int) -> Work:
    tail = len(spec_of(case.size).end_think_ids) + case.answer
    tokens = case.prompt + latents + tail
    return Work(tokens, tokens * (tokens + 1) // 2, latents + tail)
