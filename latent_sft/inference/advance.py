"""One call of the model for all rows, and what each of them is fed next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latent_sft.inference.cache import SlotCache
from latent_sft.inference.noise import RowSampling, Sampling, sample
from latent_sft.method.thinking import Thinking, ThinkState, answer_phase
from latent_sft.method.types import Superposition
from latent_sft.models.backbone import embed, mix_latents, unwrap_peft
from latent_sft.models.logits import head

# (request in each row, state `[B]`, logits `[B, V]`, uniform numbers `[B]` or None) -> the token `[B]` that each row
# would write if it is answering
Write = Callable[[Sequence[int | None], ThinkState, Tensor, Tensor | None], Tensor]
# (request in each row, state `[B]` before the step, logits `[B, V]`, the token `[B]` chosen by them)
Watch = Callable[[Sequence[int | None], ThinkState, Tensor, Tensor], None]


class DecodeConfig(NamedTuple):
    """What is the same for all requests.

    Attributes:
        model: causal LM, perhaps wrapped by PEFT.
        thinking: what steps feed back, with the settings.
        longest: most columns a row may take.
        sampling: of requests that have none of their own; None is greedy.
        static: buffers of full size from the start, and the same shapes at every step.
        compiled: compile the step.
        write: chooses answer tokens; None takes the likeliest or, with `sampling`, samples.
        watch: is shown what was chosen.
    """

    model: nn.Module
    thinking: Thinking
    longest: int
    sampling: Sampling | None = None
    static: bool = False
    compiled: bool = False
    write: Write | None = None
    watch: Watch | None = None


class StepOutput(NamedTuple):
    """What a step gives: what rows are fed next (`[B, K]`, `[B, 1, D]` at `[B, 1]`), and their state."""

    fed: Superposition
    embeds: Tensor
    position: Tensor
    state: ThinkState


def advance(
    config: DecodeConfig,
    cache: SlotCache,
    embeds: Tensor,
    position: Tensor,
    mask: Any,
    state: ThinkState,
    sampling: Sampling | RowSampling | None,
    token_noise: Tensor | None,
    latent_noise: Tensor | None,
    requests: Sequence[int | None] = (),
) -> StepOutput:
    """Run the model on `[B, T, D]` and choose what each row is fed next.

    Pure but for the cache (and `config.write` and `config.watch`).
    """
    if config.thinking.thoughts is not None:
        hidden = last_states(config.model, cache, embeds, position, mask)[:, -1]
        return follow(config, hidden, position[:, -1:], state, sampling, token_noise, requests)
    out = unwrap_peft(config.model)(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[:, -1].to(embeds.device)
    answers = _written(config, logits, sampling, token_noise, state, requests)
    fed, after = config.thinking.step(logits, state, answers, latent_noise)
    if config.watch is not None:
        config.watch(requests, state, logits, fed.ids[:, 0])
    plain = config.thinking.kept == 1
    following = embed(config.model, fed.ids) if plain else mix_latents(config.model, fed)[:, None]
    return StepOutput(fed, following.to(embeds.dtype), _next(position[:, -1:], after, config), after)


def last_states(model: nn.Module, cache: SlotCache, embeds: Tensor, position: Tensor, mask: Any) -> Tensor:
    """Return the last hidden states `[B, T, D]`, after the final norm, of a pass that reads and writes the cache."""
    decoder = unwrap_peft(model).get_decoder()
    out = decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state.to(embeds.device)  # a model may be spread over devices


def follow(
    config: DecodeConfig,
    hidden: Tensor,
    position: Tensor,
    state: ThinkState,
    sampling: Sampling | RowSampling | None,
    token_noise: Tensor | None,
    requests: Sequence[int | None] = (),
) -> StepOutput:
    """Choose what each row is fed after its last hidden state `[B, D]` at `[B, 1]`, where thoughts are such states."""
    logits = head(config.model)(hidden).to(hidden.device)
    answers = _written(config, logits, sampling, token_noise, state, requests)
    fed, after = config.thinking.step(logits, state, answers)
    if config.watch is not None:
        config.watch(requests, state, logits, fed.ids[:, 0])
    written = embed(config.model, fed.ids[:, 0])
    thought = config.thinking.thoughts(hidden).to(written.dtype)
    thinks = after.num_steps > state.num_steps
    following = torch.where(thinks[:, None], thought, written)[:, None]
    return StepOutput(fed, following.to(hidden.dtype), _next(position, after, config), after)


def copied(output: StepOutput) -> StepOutput:
    """Return the same in memory of its own."""
    return StepOutput(
        Superposition(*(t.clone() for t in output.fed)),
        output.embeds.clone(),
        output.position.clone(),
        ThinkState(*(t.clone() for t in output.state)),
    )


def _written(
    config: DecodeConfig,
    logits: Tensor,
    sampling: Sampling | RowSampling | None,
    noise: Tensor | None,
    state: ThinkState,
    requests: Sequence[int | None],
) -> Tensor | None:
    if config.write is not None:
        return config.write(requests, state, logits, noise)
    if sampling is None or noise is None:
        return None
    # on a CPU sorting the vocabulary costs more than this look; a GPU would be waited for; compiled code must not look
    looks = not config.thinking.written and not config.compiled and logits.device.type == "cpu"
    if looks and not (state.phase == answer_phase(config.thinking.spec)).any():
        return None
    return sample(logits, noise, sampling)


def _next(position: Tensor, after: ThinkState, config: DecodeConfig) -> Tensor:
    """Return `[B, 1]` the next positions; a row that is done stays, or its own would leave what the model knows."""
    return position + (after.phase <= answer_phase(config.thinking.spec))[:, None]
