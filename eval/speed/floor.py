"""The floor: floating-point operations that must happen, and the rate at which this machine multiplies matrices.

One multiply-add is two operations. With H hidden units, V vocabulary entries, and W weights in the linear layers of all
blocks (`layers * (4 H^2 + 3 H I)`):

    linear layers   2 W            a token
    attention       4 H layers     a query-key pair that the method allows (scores, and the weighted sum of values)
    head            2 H V          a position that has a label, or whose next token is chosen
    backward        twice that again, for the gradients of inputs and of weights

Allowed pairs of stage 1, for a prompt of P tokens, a CoT of L in N segments, `</think>` of E and an answer of A tokens:
encoder text `T(T+1)/2` with `T = P+L`, a marker all text before it and itself; main track of the decoder `M(M+1)/2`
with `M = P+N+E+A-1`; the j-th token of a branch `j+1`. The last tokens of chunks and answers predict nothing and do not
count. The encoder's projection (2 H V a marker) counts forward only: its gradient passes through the k kept logits.
Norms, activations, softmax, recomputation and the optimiser do not count, so the floor cannot be reached; it does not
depend on how the work is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

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
    """Return the operations of a piece of work; see the module docstring."""
    weights = size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)
    forward = 2.0 * weights * work.tokens + 4.0 * size.hidden * size.layers * work.pairs
    forward += 2.0 * size.hidden * size.vocab * work.logits
    return (3 if backward else 1) * forward + 2.0 * size.hidden * size.vocab * work.projected


def of_case(case: Case) -> float:
    """Return the floor of one call of a training or label case."""
    if case.part == "stage2":
        return flops(case.size, _total(_stage2(case, n) for n in case.cot), backward=True)
    if case.part == "decoder":
        return flops(case.size, _total(_decoder(case, n) for n in case.cot), backward=True)
    encoder = _total(_encoder(case, n) for n in case.cot)
    if case.part == "labels":
        return flops(case.size, encoder, backward=False)
    decoder = _total(_decoder(case, n) for n in case.cot)
    return flops(case.size, encoder, backward=True) + flops(case.size, decoder, backward=True)


def of_plain(case: Case) -> float:
    """Return what the plain path does instead: all T^2 pairs of the padded batch, decoder logits at every position."""
    rows = len(case.cot)
    spec = spec_of(case.size)
    latents = -(-max(case.cot) // case.rate)
    encoder = case.prompt + max(case.cot) + latents + len(spec.end_think_ids)
    if case.part == "labels":
        lengths = [case.prompt + n + -(-n // case.rate) + len(spec.end_think_ids) for n in case.cot]
        markers = sum(-(-n // case.rate) for n in case.cot)
        return flops(case.size, Work(sum(lengths), sum(n * n for n in lengths), 0, markers), backward=False)
    tail = len(spec.end_think_ids) + case.answer
    if case.part == "stage2":
        length = case.prompt + latents + tail
        return flops(case.size, Work(rows * length, rows * length**2, rows * length), backward=True)
    decoder = case.prompt + latents + max(case.cot) - min(case.rate, max(case.cot)) + tail
    read = flops(case.size, Work(rows * encoder, rows * encoder**2, 0, 2 * rows * latents), backward=True)
    return read + flops(case.size, Work(rows * decoder, rows * decoder**2, rows * decoder), backward=True)


def of_decoding(size: Size, prompts: list[list[int]], decoded: list[Decoded]) -> float:
    """Return the floor of decoding: the prefix once, then one token a forward pass."""
    total = 0.0
    for prompt, row in zip(prompts, decoded, strict=True):
        tokens = len(prompt) + row.forward_passes - 1
        total += flops(size, Work(tokens, tokens * (tokens + 1) // 2, row.forward_passes), backward=False)
    return total


def matmul_rate(device: str, size: int, repeats: int = 7) -> float:
    """Return measured operations a second of a square float32 matrix product, the median after a warm-up."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    seconds = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / sorted(seconds[1:])[repeats // 2]


def synchronise(device: str) -> None:
    """Wait until the device has done everything it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


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
