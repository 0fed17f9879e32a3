"""One call of the model for all rows, and what each of them is fed next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latent_sft.inference.cache import SlotCache
from latent_sft.inference.noise import Sampling, sample
from latent_sft.method import thinking
from latent_sft.method.soft import soft_step
from latent_sft.method.thinking import ThinkState
from latent_sft.method.types import LatentSpec, Soft, Superposition, ThoughtSpec
from latent_sft.models.backbone import core, embed, mix_latents
from latent_sft.models.logits import head
from latent_sft.models.thoughts import Thoughts

# (problem in each row, state `[B]`, logits `[B, V]`, uniform numbers `[B]` or None) -> the token `[B]` that each row
# would write if it is answering
Write = Callable[[Sequence[int | None], ThinkState, Tensor, Tensor | None], Tensor]


class Job(NamedTuple):
    """What is the same for all problems of a call.

    Attributes:
        model: causal LM, perhaps wrapped by PEFT.
        spec: settings.
        thinker: what steps feed back: `latent` superpositions, `explicit` tokens, `soft` mixtures of tokens, or
            `continuous` hidden states.
        phase: in which rows start.
        max_cot_tokens: cap of explicit thinking and of soft mixtures.
        longest: most columns a row may take.
        sampling: None is greedy.
        static: buffers of full size from the start, and the same shapes at every step.
        compiled: compile the step.
        thoughts: from hidden states to inputs, for `continuous`.
        soft: settings of `soft`.
        write: chooses answer tokens; None takes the likeliest or, with `sampling`, samples.
    """

    model: nn.Module
    spec: LatentSpec
    thinker: str
    phase: int
    max_cot_tokens: int
    longest: int
    sampling: Sampling | None
    static: bool
    compiled: bool
    thoughts: Thoughts | None = None
    soft: Soft | None = None
    write: Write | None = None

    @property
    def kept(self) -> int:
        """Return K, the entries of a superposition that is fed or shown."""
        if self.soft is not None:
            return min(self.soft.top_k, self.spec.vocab_size)
        return 1 if self.thinker == "explicit" else self.spec.top_k

    @property
    def parallel(self) -> ThoughtSpec | None:
        """Return the settings where all latents are thought at once, while a problem is read."""
        return None if self.thoughts is None or self.thoughts.spec.sequential else self.thoughts.spec


class Moved(NamedTuple):
    """What a step gives: what rows are fed next (`[B, K]`, `[B, 1, D]` at `[B, 1]`), and their state."""

    fed: Superposition
    embeds: Tensor
    position: Tensor
    state: ThinkState


def advance(
    job: Job,
    script: thinking.Script,
    cache: SlotCache,
    embeds: Tensor,
    position: Tensor,
    mask: Any,
    state: ThinkState,
    token_noise: Tensor | None,
    latent_noise: Tensor | None,
    problems: Sequence[int | None] = (),
) -> Moved:
    """Run the model on `[B, T, D]` and choose what each row is fed next; pure but for the cache (and `job.write`)."""
    if job.thinker == "continuous":
        hidden = last_states(job.model, cache, embeds, position, mask)[:, -1]
        return follow(job, script, hidden, position[:, -1:], state, token_noise, problems)
    out = core(job.model)(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[:, -1].to(embeds.device)
    answers = _written(job, logits, token_noise, state, problems)
    if job.thinker == "latent":
        fed, after = thinking.latent_step(logits, state, job.spec, script, answers, latent_noise)
        following = mix_latents(job.model, fed)[:, None]
    elif job.thinker == "soft":
        assert job.soft is not None
        fed, after = soft_step(logits, state, job.spec, script, job.soft, job.max_cot_tokens, answers, latent_noise)
        following = mix_latents(job.model, fed)[:, None]
    else:
        fed, after = thinking.explicit_step(logits, state, job.spec, script, job.max_cot_tokens, answers)
        following = embed(job.model, fed.ids)
    return Moved(fed, following.to(embeds.dtype), _next(position[:, -1:], after, job.spec), after)


def last_states(model: nn.Module, cache: SlotCache, embeds: Tensor, position: Tensor, mask: Any) -> Tensor:
    """Return the last hidden states `[B, T, D]`, after the final norm, of a pass that reads and writes the cache."""
    decoder = core(model).get_decoder()
    out = decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state.to(embeds.device)  # a model may be spread over devices


def follow(
    job: Job,
    script: thinking.Script,
    hidden: Tensor,
    position: Tensor,
    state: ThinkState,
    token_noise: Tensor | None,
    problems: Sequence[int | None] = (),
) -> Moved:
    """Choose what each row is fed after its last hidden state `[B, D]` at `[B, 1]`, where thoughts are such states."""
    assert job.thoughts is not None
    logits = head(job.model)(hidden).to(hidden.device)
    answers = _written(job, logits, token_noise, state, problems)
    fed, thinks, after = thinking.thought_step(logits, state, job.spec, script, job.thoughts.spec.num_latents, answers)
    written = embed(job.model, fed.ids[:, 0])
    thought = job.thoughts(hidden).to(written.dtype)
    following = torch.where(thinks[:, None], thought, written)[:, None]
    return Moved(fed, following.to(hidden.dtype), _next(position, after, job.spec), after)


def copied(moved: Moved) -> Moved:
    """Return the same in memory of its own."""
    return Moved(
        Superposition(*(t.clone() for t in moved.fed)),
        moved.embeds.clone(),
        moved.position.clone(),
        ThinkState(*(t.clone() for t in moved.state)),
    )


def _written(
    job: Job, logits: Tensor, noise: Tensor | None, state: ThinkState, problems: Sequence[int | None]
) -> Tensor | None:
    if job.write is not None:
        return job.write(problems, state, logits, noise)
    if noise is None:
        return None
    assert job.sampling is not None
    # sorting the vocabulary costs more than this look; compiled code must not look
    if job.thinker != "explicit" and not job.compiled and not (state.phase == thinking.answer_phase(job.spec)).any():
        return None
    return sample(logits, noise, job.sampling)


def _next(position: Tensor, after: ThinkState, spec: LatentSpec) -> Tensor:
    """Return `[B, 1]` the next positions; a row that is done stays, or its own would leave what the model knows."""
    return position + (after.phase <= thinking.answer_phase(spec))[:, None]
