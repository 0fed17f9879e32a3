"""How a model reads a prompt, thinks in hidden states and reads on; every part once, whatever needs it afterwards.

    z_1 = f(h of the last prompt token)                                                          f: models.thoughts
    sequential  z_{i+1} = f(h of z_i), one latent a pass                                          (Coconut, CODI)
    parallel    T passes over all M latents, causal: inputs of the next are z_1, f(h of latents 1..M-1)     (PCCoT)
                the first pass is that over the prompt, with M placeholders behind it; z_1 never changes

What comes after the latents reads the keys and values of the last pass over them. T = 0 leaves those of the
placeholders (pause tokens). T >= M is the sequential way, since latent i is final after i passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latent_sft.models.backbone import check_window, core, embed
from latent_sft.models.thought_attention import Piece, Result, run
from latent_sft.models.thoughts import Thoughts, placeholders


class Prompt(NamedTuple):
    """A prompt that was read.

    Attributes:
        piece: its keys and values.
        last: `[B, D]` hidden state of its last token.
        length: `[B]`.
        waiting: of the pass with the placeholders in it: hidden states `[B, M, D]`, keys and values, or None.
    """

    piece: Piece
    last: Tensor
    length: Tensor
    waiting: tuple[Tensor, Piece] | None


class Thought(NamedTuple):
    """Latents that were thought.

    Attributes:
        pieces: their keys and values, in order, one piece a pass or one for all.
        last: `[B, D]` hidden state of the last latent (of the prompt, where a row has none).
        position: `[B]` position id of what comes next.
        passes: the passes that left the pieces; their `turned` belongs to the pieces' keys.
    """

    pieces: tuple[Piece, ...]
    last: Tensor
    position: Tensor
    passes: tuple[Result, ...]


def read(lm: nn.Module, ids: Tensor, length: Tensor, thoughts: Thoughts | None = None) -> tuple[Prompt, Result]:
    """Read right-padded prompts, with `thoughts` with its M placeholders behind them in the same pass.

    Args:
        lm: prepared by `use_thoughts`.
        ids: `[B, P]`.
        length: `[B]` tokens of each prompt, at least 1.
        thoughts: whose placeholders; None reads the prompt alone.
    """
    batch, columns = ids.shape
    at = torch.arange(columns, device=ids.device).expand(batch, -1)
    embeds, real = embed(lm, ids), at < length[:, None]
    if thoughts is None:
        result = run(lm, embeds, at, real)
        return Prompt(result.piece, _at(result.hidden, length - 1), length, None), result
    count = thoughts.spec.num_latents
    behind = length[:, None] + torch.arange(count, device=ids.device)
    embeds = torch.cat([embeds, placeholders(thoughts, batch).to(embeds.dtype)], dim=1)
    result = run(
        lm,
        embeds,
        torch.cat([at, behind], dim=1),
        torch.cat([real, torch.ones_like(behind, dtype=torch.bool)], dim=1),
        gaps=True,
    )
    waiting = result.hidden[:, columns:], result.piece.part(columns, columns + count)
    return Prompt(result.piece.part(0, columns), _at(result.hidden, length - 1), length, waiting), result


def think_in_turn(lm: nn.Module, thoughts: Thoughts, prompt: Prompt, real: Tensor) -> Thought:
    """Think one latent after another.

    Args:
        lm: prepared by `use_thoughts`.
        thoughts: f.
        prompt: see `read`.
        real: `[B, N]` which latents a row has, none behind a missing one; N passes are made for all.
    """
    passes: list[Result] = []
    hidden = last = prompt.last
    for i in range(real.shape[1]):
        before = (prompt.piece, *(done.piece for done in passes))
        inputs = thoughts(hidden)[:, None]
        passes.append(run(lm, inputs, _within(prompt.length + i, real[:, i])[:, None], real[:, i : i + 1], before))
        hidden = passes[-1].hidden[:, 0]
        last = torch.where(real[:, i, None], hidden, last)
    return Thought(tuple(done.piece for done in passes), last, prompt.length + real.sum(1), tuple(passes))


def think_at_once(lm: nn.Module, thoughts: Thoughts, prompt: Prompt, first: Result) -> Thought:
    """Think M latents in T Jacobi iterations; `prompt` and `first` are what `read` gave with the placeholders."""
    assert prompt.waiting is not None
    count = thoughts.spec.num_latents
    hidden, piece = prompt.waiting
    position = prompt.length[:, None] + torch.arange(count, device=hidden.device)
    start = thoughts(prompt.last)[:, None] if thoughts.spec.iterations else None
    done = _columns(first, first.hidden.shape[1] - count, piece)
    for _ in range(thoughts.spec.iterations):
        assert start is not None
        inputs = torch.cat([start, thoughts(hidden[:, :-1])], dim=1)
        done = run(lm, inputs, position, piece.real, [prompt.piece])
        hidden, piece = done.hidden, done.piece
    return Thought((piece,), hidden[:, -1], prompt.length + count, (done,))


def read_on(
    lm: nn.Module, ids: Tensor, length: Tensor, position: Tensor, prefix: tuple[Piece, ...], **options: Any
) -> Result:
    """Read right-padded tokens after what was read or thought before.

    Args:
        lm: prepared by `use_thoughts`.
        ids: `[B, S]`.
        length: `[B]` tokens of each row.
        position: `[B]` position id of the first one.
        prefix: what it sees.
        options: of `thought_attention.run`.
    """
    at = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    real = at < length[:, None]
    return run(lm, embed(lm, ids), _within(position[:, None] + at, real), real, prefix, **options)


def labelled(last: Tensor, result: Result, index: Tensor) -> Tensor:
    """Return hidden states `[M, D]` at `index` into `[B, 1 + S]`: the state before a pass, then its columns'."""
    return torch.cat([last[:, None], result.hidden], dim=1).flatten(0, 1)[index]


def check_length(lm: nn.Module, columns: int) -> None:
    """Refuse sequences longer than a sliding window; `columns` is the longest a row of the batch can be."""
    check_window(core(lm), columns, "thinking", "Thoughts in hidden states are trained under")


def _columns(result: Result, start: int, piece: Piece) -> Result:
    turned = {layer: (cos[:, start:], sin[:, start:]) for layer, (cos, sin) in result.turned.items()}
    return result._replace(hidden=result.hidden[:, start:], piece=piece, turned=turned)


def _within(position: Tensor, real: Tensor) -> Tensor:
    # a table of positions (GPT-2) ends somewhere, and padding must not lie behind it
    return torch.where(real, position, 0)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
