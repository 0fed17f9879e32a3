"""The decoding state machine: what a row's logits mean now, and what it is fed next. Pure tensors, all rows at once.

A row goes through phases:

    THINK    logits choose the next latent (or the next explicit CoT token), or end thinking
    CLOSE    the remaining tokens of a multi-token `</think>` are fed, one a step
    ANSWER   logits choose the next answer token, until EOS
    DONE     whatever is fed is ignored

Every step feeds every row one superposition `[K]`; a plain token is a superposition with weight 1 on its first entry.
Rows never look at each other, so a batch of N gives what N single runs give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_sft.method.superposition import perturb, superpose
from latent_sft.method.types import LatentSpec, Superposition

THINK, CLOSE, ANSWER, DONE = 0, 1, 2, 3


class ThinkState(NamedTuple):
    """State of all rows.

    Attributes:
        phase: `[B]` THINK, CLOSE, ANSWER or DONE; what the *next* logits of the row mean.
        num_steps: `[B]` latents (or explicit tokens, delimiter included while it is being written) so far.
        closed: `[B]` tokens of `</think>` already fed.
        recent: `[B, E]` the last E = len(end_think_ids) explicit tokens, for matching the delimiter.
        num_answer: `[B]` answer tokens so far, EOS included.
    """

    phase: Tensor
    num_steps: Tensor
    closed: Tensor
    recent: Tensor
    num_answer: Tensor


def start(batch_size: int, spec: LatentSpec, device: torch.device, phase: int = THINK) -> ThinkState:
    """Return the state after the prompt (or, with phase=ANSWER, after a `</think>` that was part of the prefix)."""
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    recent = torch.full((batch_size, len(spec.end_think_ids)), -1, dtype=torch.long, device=device)
    return ThinkState(zeros + phase, zeros, zeros, recent, zeros)


def latent_step(
    logits: Tensor, state: ThinkState, spec: LatentSpec, answers: Tensor, draws: Tensor | None = None
) -> tuple[Superposition, ThinkState]:
    """Choose what every row is fed next when thinking is latent (reference section 1.9, Transformers path).

    Thinking stops if and only if the clean argmax is the first token of `</think>`, not before `min_latents` and at
    the latest after `max_latents`. Otherwise the next input is the softmax over the top-k logits.

    Args:
        logits: `[B, V]` at the last position of each row.
        state: see ThinkState.
        spec: settings.
        answers: `[B]` the token each row would write if it is in ANSWER (argmax or a sample of `logits`).
        draws: `[R, B, K]` Gumbel noise, or None for no noise.

    Returns:
        The next input `[B, top_k]` and the next state.
    """
    end = spec.end_think_ids[0]
    thinking = state.phase == THINK
    wants_stop = (logits.argmax(-1) == end) & (state.num_steps >= spec.min_latents)
    stops = thinking & (wants_stop | (state.num_steps >= spec.max_latents))
    # where thinking goes on although the end token is the top-1 (min_latents), it may not be part of the latent
    held = spec.exclude_end | (thinking & (state.num_steps < spec.min_latents))
    columns = torch.arange(logits.shape[-1], device=logits.device) == end
    latent = superpose(logits.masked_fill(held[:, None] & columns, float("-inf")), spec.top_k, spec.decode_temperature)
    if draws is not None:
        latent = perturb(
            latent,
            draws,
            scale=spec.noise_scale,
            temperature=spec.noise_temperature,
            clip=spec.noise_clip,
            end_id=end,
        )
    continues = thinking & ~stops
    plain, state = _plain_step(stops, state, spec, answers)
    fed = Superposition(
        torch.where(continues[:, None], latent.ids, plain.ids),
        torch.where(continues[:, None], latent.weights, plain.weights.to(latent.weights.dtype)),
    )
    return fed, state._replace(num_steps=state.num_steps + continues.long())


def explicit_step(
    logits: Tensor, state: ThinkState, spec: LatentSpec, answers: Tensor, max_tokens: int
) -> tuple[Superposition, ThinkState]:
    """Choose what every row is fed next when thinking is written out: the same phases with K = 1.

    The row leaves THINK when its last tokens spell the whole `</think>`; after `max_tokens` tokens it is fed instead.
    An EOS written while thinking ends the row without an answer.

    Args:
        logits: `[B, V]`.
        state: see ThinkState.
        spec: settings.
        answers: `[B]` next token of each row, used in THINK and ANSWER alike.
        max_tokens: cap on explicit CoT tokens.

    Returns:
        The next input `[B, 1]` and the next state.
    """
    thinking = state.phase == THINK
    stops = thinking & (state.num_steps >= max_tokens)
    continues = thinking & ~stops
    plain, after = _plain_step(stops, state, spec, answers, top_k=1)
    tokens = torch.where(continues, answers, plain.ids[:, 0])
    shifted = torch.cat([state.recent[:, 1:], tokens[:, None]], dim=1)
    recent = torch.where(continues[:, None], shifted, state.recent)
    delimiter = torch.tensor(spec.end_think_ids, device=logits.device)
    complete = continues & (recent == delimiter).all(-1)
    after = after._replace(
        num_steps=after.num_steps + continues.long() - complete.long() * len(spec.end_think_ids),
        recent=recent,
        phase=torch.where(complete, ANSWER, torch.where(continues & (tokens == spec.eos_id), DONE, after.phase)),
    )
    return Superposition(tokens[:, None], plain.weights), after


def _plain_step(
    stops: Tensor, state: ThinkState, spec: LatentSpec, answers: Tensor, top_k: int | None = None
) -> tuple[Superposition, ThinkState]:
    """Feed one ordinary token to every row that is not thinking on: the delimiter, or the answer."""
    delimiter = torch.tensor(spec.end_think_ids, device=answers.device)
    closing = stops | (state.phase == CLOSE)
    answering = state.phase == ANSWER
    next_delimiter = delimiter[state.closed.clamp(max=len(spec.end_think_ids) - 1)]
    token = torch.where(closing, next_delimiter, torch.where(answering, answers, spec.pad_id))
    closed = state.closed + closing.long()
    num_answer = state.num_answer + answering.long()
    ended = answering & ((token == spec.eos_id) | (num_answer >= spec.max_answer_tokens))
    phase = torch.where(closing, torch.where(closed >= len(spec.end_think_ids), ANSWER, CLOSE), state.phase)
    phase = torch.where(ended, DONE, phase)
    width = spec.top_k if top_k is None else top_k
    weights = torch.zeros(len(token), width, device=token.device)
    weights[:, 0] = 1.0
    ids = token[:, None].expand(-1, width)
    return Superposition(ids, weights), state._replace(phase=phase, closed=closed, num_answer=num_answer)
