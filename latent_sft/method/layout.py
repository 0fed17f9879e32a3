"""Where everything sits: token order, kinds, position ids and targets of every sequence the method uses.

Works on plain lists of token ids, one example at a time; `latent_sft.data.collate` pads and stacks. Knows nothing about
tokenizers, masks (`masks.py` derives them from `kind` and `branch`) or models.

Worked example (r = 2, prompt of 5 tokens, CoT `a b c d e`, `</think>` = 3 tokens, answer `A EOS`):

    decoder   P P P P P  Z1 c  d  Z2 e  Z3  </ think >  A  EOS
    kind      1 1 1 1 1  2  3  3  2  3  2   4  4     4  4  4
    branch    - - - - -  0  0  0  1  1  2   -  -     -  -  -
    position  0 1 2 3 4  5  6  7  6  7  7   8  9    10 11 12
    target    . . . . .  c  d  .  e  .  </  th >     A  E  .
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

IGNORE = -100


class Kind(IntEnum):
    """What a position holds. Masks read this, never token values."""

    PAD = 0
    TEXT = 1  # prompt in the decoder; every text token in the encoder and in explicit sequences
    LATENT = 2
    CHUNK = 3  # CoT token of a branch, supervision mask only
    TAIL = 4  # </think> and the answer, and the CoT before them where it is written out
    MARKER = 5  # encoder query whose hidden state becomes a latent


class Row(NamedTuple):
    """One laid-out example, lists of equal length T.

    Attributes:
        ids: token id; 0 where an embedding replaces it (latent slots, markers).
        kind: `Kind` value.
        branch: index i of the latent a LATENT is or a CHUNK hangs off (0-based); index of a MARKER; -1 elsewhere.
        position: position id for the model.
        target: token to predict at this position (already shifted), or IGNORE.
        weight: weight of that target in the cross-entropy sum; 0 where there is none.
    """

    ids: list[int]
    kind: list[int]
    branch: list[int]
    position: list[int]
    target: list[int]
    weight: list[float]


def split_cot(cot: Sequence[int], segment_lengths: Sequence[int]) -> list[list[int]]:
    """Cut CoT tokens into segments S_1..S_N (paper: by token count; a shorter last one gets its own latent).

    >>> split_cot([1, 2, 3], [2, 1])
    [[1, 2], [3]]
    """
    if sum(segment_lengths) != len(cot) or any(n < 1 for n in segment_lengths):
        raise ValueError(f"segment lengths {list(segment_lengths)} do not partition a CoT of {len(cot)} tokens")
    ends = [0]
    for n in segment_lengths:
        ends.append(ends[-1] + n)
    return [list(cot[a:b]) for a, b in pairwise(ends)]


def fixed_segments(num_tokens: int, rate: int) -> list[int]:
    """Lengths of the segments of `num_tokens` CoT tokens at `rate` tokens per latent.

    >>> fixed_segments(5, 2)
    [2, 2, 1]
    """
    return [min(rate, num_tokens - start) for start in range(0, num_tokens, rate)]


def encoder_row(
    prompt: Sequence[int], segments: Sequence[Sequence[int]], end_think: Sequence[int], stretched: bool
) -> Row:
    """Lay out `[P, S_1, marker, ..., S_N, marker, E]` for the encoder (reference: induction mask, section 1.3).

    Args:
        prompt: prompt with `<think>` at its end.
        segments: CoT segments; an empty one in front gives a latent of the prompt alone, in both layouts of stage 1.
        end_think: tokens of `</think>`.
        stretched: True gives positions 0..T-1 (published); False lets a marker share the position of the CoT token
            before it, so that text keeps the positions it has without markers.
    """
    ids: list[int] = list(prompt)
    kind = [int(Kind.TEXT)] * len(prompt)
    branch = [-1] * len(prompt)
    position = list(range(len(prompt)))
    text = len(prompt)  # next position of the text
    for i, segment in enumerate(segments):
        ids += [*segment, 0]
        kind += [int(Kind.TEXT)] * len(segment) + [int(Kind.MARKER)]
        branch += [-1] * len(segment) + [i]
        position += [*range(text, text + len(segment)), text + len(segment) - 1]
        text += len(segment)
    ids += end_think
    kind += [int(Kind.TEXT)] * len(end_think)
    branch += [-1] * len(end_think)
    position += range(text, text + len(end_think))
    if stretched:
        position = list(range(len(ids)))
    return Row(ids, kind, branch, position, [IGNORE] * len(ids), [0.0] * len(ids))


def decoder_row(
    prompt: Sequence[int],
    segments: Sequence[Sequence[int]],
    end_think: Sequence[int],
    answer: Sequence[int],
    loss_reduction: str,
) -> Row:
    """Lay out `[P, z_1, S_2, z_2, ..., S_N, z_N, E, A]` for the stage-1 decoder (reference: section 1.4).

    S_1 does not appear. Two tracks of positions: prompt, latents, E and A are consecutive; a chunk counts on from its
    latent. Targets: S_2..S_N, E and A, each token predicted at the position before it within its own track.

    Args:
        prompt: prompt with `<think>` at its end.
        segments: CoT segments.
        end_think: tokens of `</think>`.
        answer: answer tokens with EOS.
        loss_reduction: `token`, `segment` or `sample`; sets `weight`, see `loss_count`.
    """
    num_latents = len(segments)
    tail = [*end_think, *answer]
    row = _text_row(prompt)
    start = len(prompt)
    groups: list[list[int]] = []  # indices of the positions whose targets belong to z_i (paper: J_i)
    for i in range(num_latents):
        branch_ids = segments[i + 1] if i + 1 < num_latents else []
        first = len(row.ids)
        _extend(row, [0], Kind.LATENT, i, [start + i])
        _extend(row, branch_ids, Kind.CHUNK, i, range(start + i + 1, start + i + 1 + len(branch_ids)))
        for k, token in enumerate(branch_ids):
            row.target[first + k] = token
        groups.append(list(range(first, first + len(branch_ids))))
    last = len(row.ids) - 1  # z_N, or the end of the prompt where there is no latent
    _extend(row, tail, Kind.TAIL, -1, range(start + num_latents, start + num_latents + len(tail)))
    row.target[last : last + len(tail)] = tail
    tail_group = list(range(last, last + len(tail)))
    groups = [*groups[:-1], tail_group]
    _set_weights(row, groups, loss_reduction)
    return row


def stage2_row(
    prompt: Sequence[int], num_latents: int, end_think: Sequence[int], answer: Sequence[int], loss_reduction: str
) -> Row:
    """Lay out `[P, z_1..z_N, E, A]` at plain positions (reference: section 1.8). CE targets are E and A.

    The KL target of z_i is read at the position before it: `len(prompt) - 1 + i` for i = 0..N-1.
    """
    return suffix_row(prompt, num_latents, [], end_think, answer, loss_reduction)


def suffix_row(
    prompt: Sequence[int],
    num_latents: int,
    rest: Sequence[Sequence[int]],
    end_think: Sequence[int],
    answer: Sequence[int],
    loss_reduction: str,
) -> Row:
    """Lay out `[P, z_1..z_I, S_{I+1}, ..., S_N, E, A]` at plain positions, all of it causal (suffix reconstruction).

    Targets are all that stands behind z_I; for `segment` each S_i of it, and E with A.

    Args:
        prompt: prompt with `<think>` at its end.
        num_latents: I.
        rest: the segments S_{I+1}..S_N.
        end_think: tokens of `</think>`.
        answer: answer tokens with EOS.
        loss_reduction: `token`, `segment` or `sample`.
    """
    row = _text_row(prompt)
    for i in range(num_latents):
        _extend(row, [0], Kind.LATENT, i, [len(prompt) + i])
    groups = []
    for part in (*rest, [*end_think, *answer]):
        last = len(row.ids) - 1
        _extend(row, part, Kind.TAIL, -1, range(last + 1, last + 1 + len(part)))
        row.target[last : last + len(part)] = part
        groups.append(list(range(last, last + len(part))))
    _set_weights(row, groups, loss_reduction)
    return row


def explicit_row(
    prompt: Sequence[int],
    cot: Sequence[int],
    end_think: Sequence[int],
    answer: Sequence[int],
    loss_reduction: str,
    prompt_targets: bool = False,
) -> Row:
    """Lay out `[P, C, E, A]` for explicit CoT fine-tuning; an empty CoT is the No-CoT baseline.

    Targets: C, E and A; with `prompt_targets` every token but the first, as in language-model pretraining.
    """
    rest = [*cot, *end_think, *answer]
    row = _text_row(prompt)
    last = len(row.ids) - 1
    _extend(row, rest, Kind.TEXT, -1, range(last + 1, last + 1 + len(rest)))
    first = 0 if prompt_targets else last
    row.target[first:-1] = row.ids[first + 1 :]
    _set_weights(row, [list(range(first, last + len(rest)))], loss_reduction)
    return row


def two_track(row: Row) -> tuple[list[int], list[list[int]]]:
    """Split a stage-1 row into its main track and the groups of side tokens that hang off it.

    The main track is what plain causal attention runs over: prompt, latents, delimiter and answer in the decoder,
    text in the encoder. A group is one chunk in the decoder, one marker in the encoder. Tokens that nobody sees and
    that predict nothing are left out, since they cannot change a result: in the decoder the last token of every chunk
    (half of all chunk tokens at r = 2) and of the answer, in the encoder the text behind the last marker.

    Returns:
        Indices into the row: the main track, and one list a group in order of `branch`.

    >>> two_track(decoder_row([7], [[1], [2, 3]], [8], [9], "token"))
    ([0, 1, 4, 5], [[2]])
    """
    main: list[int] = []
    groups: dict[int, list[int]] = {}
    for t, kind in enumerate(row.kind):
        if kind in (Kind.CHUNK, Kind.MARKER):
            groups.setdefault(row.branch[t], []).append(t)
        else:
            main.append(t)
    side = [groups[i] for i in sorted(groups)]
    if Kind.MARKER in row.kind:
        return [t for t in main if t < side[-1][0]], side
    return main[:-1], [group[:-1] for group in side if len(group) > 1]


def loss_count(row: Row, loss_reduction: str) -> float:
    """Return what this row adds to the denominator: its labelled tokens (`token`), or 1 (`segment`, `sample`)."""
    if loss_reduction == "token":
        return float(sum(t != IGNORE for t in row.target))
    return 1.0


def _text_row(prompt: Sequence[int]) -> Row:
    n = len(prompt)
    return Row(list(prompt), [int(Kind.TEXT)] * n, [-1] * n, list(range(n)), [IGNORE] * n, [0.0] * n)


def _extend(row: Row, ids: Sequence[int], kind: Kind, branch: int, positions: Sequence[int] | range) -> None:
    n = len(ids)
    row.ids.extend(ids)
    row.kind.extend([int(kind)] * n)
    row.branch.extend([branch] * n)
    row.position.extend(positions)
    row.target.extend([IGNORE] * n)
    row.weight.extend([0.0] * n)


def _set_weights(row: Row, groups: list[list[int]], loss_reduction: str) -> None:
    # token: 1 each. sample: 1/tokens of the row. segment: 1/(N |J_i|), the paper's L_sup.
    total = sum(len(g) for g in groups)
    for group in groups:
        for t in group:
            if loss_reduction == "token":
                row.weight[t] = 1.0
            elif loss_reduction == "sample":
                row.weight[t] = 1.0 / total
            else:
                row.weight[t] = 1.0 / (len(groups) * len(group))
