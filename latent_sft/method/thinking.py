"""The decoding state machine: what a row's logits mean now, and what it is fed next. Pure tensors, all rows at once.

A row goes through phases, counted up by one number (E = tokens of `</think>`):

    0 (THINK)   logits choose the next latent (or the next explicit CoT token), or end thinking
    1..E-1      so many tokens of `</think>` have been fed; the next one follows, whatever the model says
    E           logits choose the next answer token, until EOS
    E+1         done: whatever is fed is ignored

Every step feeds every row one superposition `[K]`; a plain token is a superposition with weight 1 on its first entry.
Rows never look at each other, so a batch of N gives what N single runs give. Decoding pays for every one of these
small operations at every step, hence their number is kept down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_sft.method.superposition import largest, largest_but, perturb, weighted
from latent_sft.method.types import LatentSpec, Superposition

THINK = 0


def answer_phase(spec: LatentSpec) -> int:
    """Return the phase in which logits choose answer tokens; the one after it is the end."""
    return len(spec.end_think_ids)


class ThinkState(NamedTuple):
    """State of all rows.

    Attributes:
        phase: `[B]` what the *next* logits of the row mean, see above.
        num_steps: `[B]` latents (or explicit tokens, delimiter included while it is being written) so far.
        num_answer: `[B]` answer tokens so far, EOS included.
        recent: `[B, E]` the last E explicit tokens, for matching the delimiter.
        cold: `[B]` steps in a row that were sure of their token (Soft Thinking).
    """

    phase: Tensor
    num_steps: Tensor
    num_answer: Tensor
    recent: Tensor
    cold: Tensor


class Script(NamedTuple):
    """Constants of the steps on the right device.

    Attributes:
        tokens: `[E+2]` what a row is fed at each phase: `</think>`, (the answer), padding.
        one: `[K]` weights of a plain token.
    """

    tokens: Tensor
    one: Tensor


def start(batch_size: int, spec: LatentSpec, device: torch.device, phase: int = THINK) -> ThinkState:
    """Return the state after the prompt (or, in the answer phase, after a `</think>` that was part of the prefix)."""
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    recent = torch.full((batch_size, len(spec.end_think_ids)), -1, dtype=torch.long, device=device)
    return ThinkState(zeros + phase, zeros, zeros, recent, zeros)


def script_of(spec: LatentSpec, device: torch.device, kept: int | None = None) -> Script:
    """Return the constants of the steps; `kept` is K, that of the spec by default."""
    one = torch.zeros(kept or spec.top_k, device=device)
    one[0] = 1.0
    return Script(torch.tensor([*spec.end_think_ids, spec.pad_id, spec.pad_id], device=device), one)


def latent_step(
    logits: Tensor,
    state: ThinkState,
    spec: LatentSpec,
    script: Script,
    answers: Tensor | None = None,
    draws: Tensor | None = None,
) -> tuple[Superposition, ThinkState]:
    """Choose what every row is fed next when thinking is latent (reference section 1.9, Transformers path).

    Thinking stops if and only if the clean argmax is the first token of `</think>`, not before `min_latents` and at
    the latest after `max_latents`. Otherwise the next input is the softmax over the top-k logits.

    Args:
        logits: `[B, V]` at the last position of each row.
        state: see ThinkState.
        spec: settings.
        script: see `script_of`.
        answers: `[B]` the token each row would write if it is answering; None is the argmax.
        draws: `[R, B, K]` Gumbel noise, or None for no noise.

    Returns:
        The next input `[B, top_k]` and the next state.
    """
    end = spec.end_think_ids[0]
    if spec.exclude_end or spec.min_latents > 0:
        # where thinking goes on although the end token is the top-1 (min_latents), it may not be part of the latent
        held = True if spec.exclude_end else state.num_steps < spec.min_latents
        kept, ids, top = largest_but(logits, spec.top_k, end, held)
    else:
        kept, ids = largest(logits, spec.top_k)
        top = ids[:, 0]
    latent = weighted(kept, ids, spec.decode_temperature)
    if draws is not None:
        latent = perturb(
            latent,
            draws,
            scale=spec.noise_scale,
            temperature=spec.noise_temperature,
            clip=spec.noise_clip,
            end_id=end,
        )
    stops = top == end
    if spec.min_latents > 0:
        stops = stops & (state.num_steps >= spec.min_latents)
    thinking = state.phase == THINK
    continues = thinking & ~(stops | (state.num_steps >= spec.max_latents))
    token, after = plain_step(thinking, continues, state, spec, script, top if answers is None else answers)
    here = continues[:, None]
    fed = Superposition(torch.where(here, latent.ids, token[:, None]), torch.where(here, latent.weights, script.one))
    return fed, after


def explicit_step(
    logits: Tensor,
    state: ThinkState,
    spec: LatentSpec,
    script: Script,
    max_tokens: int,
    answers: Tensor | None = None,
) -> tuple[Superposition, ThinkState]:
    """Choose what every row is fed next when thinking is written out: the same phases with K = 1.

    The row leaves THINK when its last tokens spell the whole `</think>`; after `max_tokens` tokens it is fed instead.
    An EOS written while thinking ends the row without an answer.

    Args:
        logits: `[B, V]`.
        state: see ThinkState.
        spec: settings.
        script: see `script_of`.
        max_tokens: cap on explicit CoT tokens.
        answers: `[B]` next token of each row, thinking and answering alike; None is the argmax.

    Returns:
        The next input `[B, 1]` and the next state.
    """
    answer = answer_phase(spec)
    if answers is None:
        answers = largest(logits, 1)[1][:, 0]
    thinking = state.phase == THINK
    continues = thinking & (state.num_steps < max_tokens)
    forced, after = plain_step(thinking, continues, state, spec, script, answers)
    token = torch.where(continues, answers, forced)
    recent = torch.cat([state.recent[:, 1:], token[:, None]], dim=1)  # of no use once the row has stopped thinking
    complete = continues & (recent == script.tokens[:answer]).all(-1)
    phase = torch.where(continues & (token == spec.eos_id), answer + 1, after.phase)
    after = after._replace(
        num_steps=after.num_steps - complete * answer, phase=torch.where(complete, answer, phase), recent=recent
    )
    return Superposition(token[:, None], script.one[:1].expand(len(token), 1)), after


def thought_step(
    logits: Tensor,
    state: ThinkState,
    spec: LatentSpec,
    script: Script,
    num_latents: int,
    answers: Tensor | None = None,
) -> tuple[Superposition, Tensor, ThinkState]:
    """Choose what every row is fed next when thoughts are hidden states: always so many, whatever the model would say.

    Args:
        logits: `[B, V]` of the hidden states that become thoughts.
        state: see ThinkState.
        spec: settings; its limits on latents do not count here.
        script: see `script_of`.
        num_latents: M.
        answers: `[B]` the token each row would write if it is answering; None is the argmax.

    Returns:
        The next input `[B, top_k]`; which rows are fed their hidden state instead `[B]` (for them the first is what the
        thought says: the softmax over its top-k logits); the next state.
    """
    kept, ids = largest(logits, spec.top_k)
    said = weighted(kept, ids, spec.decode_temperature)
    thinking = state.phase == THINK
    continues = thinking & (state.num_steps < num_latents)
    token, after = plain_step(thinking, continues, state, spec, script, ids[:, 0] if answers is None else answers)
    here = continues[:, None]
    fed = Superposition(torch.where(here, said.ids, token[:, None]), torch.where(here, said.weights, script.one))
    return fed, continues, after


def plain_step(
    thinking: Tensor, continues: Tensor, state: ThinkState, spec: LatentSpec, script: Script, answers: Tensor
) -> tuple[Tensor, ThinkState]:
    """Return the token `[B]` of every row that does not think on (the delimiter, or the answer) and the next state."""
    answer = answer_phase(spec)
    answering = state.phase == answer
    token = torch.where(answering, answers, script.tokens[state.phase])
    num_answer = state.num_answer + answering
    moves = answering & ((token == spec.eos_id) | (num_answer >= spec.max_answer_tokens))
    if answer > 1:
        moves = moves | ((state.phase > THINK) & (state.phase < answer))
    phase = state.phase + (moves | (thinking & ~continues))
    return token, state._replace(phase=phase, num_steps=state.num_steps + continues, num_answer=num_answer)
