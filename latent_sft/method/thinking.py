"""How a row thinks: what its logits mean now, and what it is fed next. Pure tensors, all rows at once.

A row goes through phases, counted up by one number (E = tokens of `</think>`):

    0 (THINK)   logits choose the next latent (or the next explicit CoT token), or end thinking
    1..E-1      so many tokens of `</think>` have been fed; the next one follows, whatever the model says
    E           logits choose the next answer token, until EOS
    E+1         done: whatever is fed is ignored

Every step feeds every row one superposition `[K]`; a plain token is a superposition with weight 1 on its first entry.
A `Thinking` decides it; decoding knows no more of a way of thinking than this class says.
Rows never look at each other, so a batch of N gives what N single runs give. Decoding pays for every one of these
small operations at every step, hence their number is kept down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from latent_sft.method.superposition import largest, largest_but, perturb, superpose, weighted
from latent_sft.method.types import LatentSpec, Mixing, Mixtures, Superposition

THINK = 0


def answer_phase(spec: LatentSpec) -> int:
    """Return the phase in which logits choose answer tokens; the one after it is the end."""
    return len(spec.end_think_ids)


class Limits(NamedTuple):
    """How long a row may think and answer: steps of thinking at least and at most, and answer tokens at most."""

    least: int
    most: int
    answer: int


class ThinkState(NamedTuple):
    """State of all rows.

    Attributes:
        phase: `[B]` what the *next* logits of the row mean, see above.
        num_steps: `[B]` latents (or explicit tokens, delimiter included while it is being written) so far.
        num_answer: `[B]` answer tokens so far, EOS included.
        recent: `[B, E]` the last E explicit tokens, for matching the delimiter.
        cold: `[B]` steps in a row that were sure of their token (Soft Thinking).
        least: `[B]` see `Limits`, as are the next two.
        most: `[B]`; of no use where there are always as many steps.
        answer: `[B]`.
    """

    phase: Tensor
    num_steps: Tensor
    num_answer: Tensor
    recent: Tensor
    cold: Tensor
    least: Tensor
    most: Tensor
    answer: Tensor


class Thinking:
    """A way of thinking, with what it needs; one object a call.

    Attributes:
        title: what thoughts are called; empty where there are none.
        needs: the argument of `__init__` that it cannot do without.
        written: thoughts are tokens like any others, sampled where answers are.
        readable: what thoughts stand for is a text, the CoT.
        spec: settings.
        kept: K, the entries of a superposition that is fed or shown.
        most_steps: of thinking, `</think>` not counted.
        thoughts: from hidden states to inputs (`models.thoughts`), where thoughts are such states; what `step` chooses
            for them is then what they say, and not what is fed.
        at_once: so many latents are thought while the prompt is read; 0 where they come one by one.
        tokens: `[E+2]` what a row is fed at each phase: `</think>`, (the answer), padding.
        one: `[K]` weights of a plain token.
        limits: of a row that has none of its own.
        waits: some rows must not stop thinking at once.
    """

    title: ClassVar[str] = "latent tokens"
    needs: ClassVar[str] = ""
    written: ClassVar[bool] = False
    readable: ClassVar[bool] = False

    def __init__(
        self,
        spec: LatentSpec,
        device: torch.device,
        *,
        max_tokens: int = 0,
        thoughts: Any = None,
        mixture: Mixing | None = None,
    ) -> None:
        """Set up; of the settings, each kind uses its own.

        Args:
            spec: settings.
            device: of the logits.
            max_tokens: cap of thinking that may go on as long as it likes.
            thoughts: a `models.thoughts.Thoughts`.
            mixture: settings of mixtures of tokens.
        """
        self.spec, self.device = spec, device
        self.kept, self.most_steps, self.at_once = spec.top_k, max_tokens, 0
        self.thoughts: Any = None
        self._prepare(thoughts, mixture)
        self.tokens = torch.tensor([*spec.end_think_ids, spec.pad_id, spec.pad_id], device=device)
        self.one = torch.zeros(self.kept, device=device)
        self.one[0] = 1.0
        least = min(spec.min_latents, self.most_steps)  # those that never think have the same spec
        self.limits, self.waits = Limits(least, self.most_steps, spec.max_answer_tokens), False

    def _prepare(self, thoughts: Any, mixture: Mixing | None) -> None:
        """Take what this kind needs."""

    def start(self, phases: list[int], limits: Sequence[Limits] = ()) -> ThinkState:
        """Return the state of rows whose prompt was read and whose next logits belong to these phases.

        Args:
            phases: of each row.
            limits: of each row; empty where they are those of the settings.
        """
        phase = torch.tensor(phases, device=self.device)
        own = torch.tensor(limits or [self.limits] * len(phases), device=self.device)
        self.waits = self.waits or any(row.least for row in limits or [self.limits])
        zeros = torch.zeros_like(phase)
        recent = torch.full((len(phases), len(self.spec.end_think_ids)), -1, device=self.device)
        return ThinkState(phase, zeros, zeros, recent, zeros, *own.unbind(1))

    def num_draws(self, noise: bool) -> int:
        """Return the entries that Gumbel noise is drawn for at every step; `noise`: whether latents may have it."""
        return 0

    def step(
        self, logits: Tensor, state: ThinkState, answers: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Superposition, ThinkState]:
        """Choose what every row is fed next.

        Args:
            logits: `[B, V]` at the last position of each row.
            state: see ThinkState.
            answers: `[B]` the token each row would write if it is answering (or thinks in tokens); -1, or None for all,
                is the argmax.
            draws: `[R, B, num_draws]` Gumbel noise, or None for no noise.

        Returns:
            The next input `[B, K]` and the next state.
        """
        raise NotImplementedError

    def said(self, logits: Tensor) -> Superposition:
        """Return what the LM head makes of states, `[N, K]`, from its logits `[N, V]`."""
        kept, ids = largest(logits, self.kept)
        return weighted(kept, ids, self.spec.decode_temperature)

    def read(self, latents: Superposition) -> list[list[int]]:
        """Return the tokens that each of the latents `[n, K]` of a thought stands for: its first."""
        return latents.ids[:, :1].tolist()

    def _chosen(self, top: Tensor, answers: Tensor | None) -> Tensor:
        """Return the token `[B]` that each row would write: the given one, or the likeliest."""
        return top if answers is None else torch.where(answers < 0, top, answers)

    def _plain(
        self, thinking: Tensor, continues: Tensor, state: ThinkState, answers: Tensor
    ) -> tuple[Tensor, ThinkState]:
        """Return the token `[B]` of rows that do not think on (the delimiter, or the answer) and the next state."""
        answer = answer_phase(self.spec)
        answering = state.phase == answer
        token = torch.where(answering, answers, self.tokens[state.phase])
        num_answer = state.num_answer + answering
        moves = answering & ((token == self.spec.eos_id) | (num_answer >= state.answer))
        if answer > 1:
            moves = moves | ((state.phase > THINK) & (state.phase < answer))
        phase = state.phase + (moves | (thinking & ~continues))
        return token, state._replace(phase=phase, num_steps=state.num_steps + continues, num_answer=num_answer)

    def _mixed(self, here: Tensor, latent: Superposition, token: Tensor) -> Superposition:
        """Return the latent `[B, K]` where `here` `[B]`, the token `[B]` elsewhere."""
        here = here[:, None]
        return Superposition(torch.where(here, latent.ids, token[:, None]), torch.where(here, latent.weights, self.one))

    def _spelled(
        self, thinking: Tensor, continues: Tensor, chosen: Tensor, state: ThinkState, answers: Tensor
    ) -> tuple[Tensor, ThinkState]:
        """Return the token `[B]` and the next state where thinking ends when the chosen tokens spell `</think>`.

        An EOS chosen while thinking ends the row without an answer.
        """
        answer = answer_phase(self.spec)
        forced, after = self._plain(thinking, continues, state, answers)
        token = torch.where(continues, chosen, forced)
        recent = torch.cat([state.recent[:, 1:], token[:, None]], dim=1)  # of no use once the row has stopped thinking
        complete = continues & (recent == self.tokens[:answer]).all(-1)
        phase = torch.where(continues & (token == self.spec.eos_id), answer + 1, after.phase)
        phase = torch.where(complete, answer, phase)
        return token, after._replace(num_steps=after.num_steps - complete * answer, phase=phase, recent=recent)


class LatentThinking(Thinking):
    """The softmax over the top-k logits is fed back (the published code, transformers path).

    Thinking stops if and only if the clean argmax is the first token of `</think>`, not before `min_latents` and at
    the latest after `max_latents`.
    """

    def _prepare(self, thoughts: Any, mixture: Mixing | None) -> None:
        self.most_steps, self.width = self.spec.max_latents, self.spec.top_k

    def num_draws(self, noise: bool) -> int:
        """Return as many as are kept of the logits, where latents have noise."""
        return self.width if noise and self.spec.noise_scale > 0 else 0

    def fed(self, latent: Superposition) -> Superposition:
        """Return what is fed back for a latent that was chosen: itself."""
        return latent

    def step(
        self, logits: Tensor, state: ThinkState, answers: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Superposition, ThinkState]:
        """See `Thinking.step`."""
        spec, end = self.spec, self.spec.end_think_ids[0]
        if spec.exclude_end or self.waits:
            # where thinking goes on although the end token is the top-1 (min_latents), it may not be part of the latent
            held = True if spec.exclude_end else state.num_steps < state.least
            kept, ids, top = largest_but(logits, self.width, end, held)
        else:
            kept, ids = largest(logits, self.width)
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
        if self.waits:
            stops = stops & (state.num_steps >= state.least)
        thinking = state.phase == THINK
        continues = thinking & ~(stops | (state.num_steps >= state.most))
        token, after = self._plain(thinking, continues, state, self._chosen(top, answers))
        return self._mixed(continues, self.fed(latent), token), after


class ExplicitThinking(Thinking):
    """Thinking is written out, K = 1; it ends when its last tokens spell the whole `</think>`, or at the cap."""

    title = "reasoning"
    written = True
    readable = True

    def _prepare(self, thoughts: Any, mixture: Mixing | None) -> None:
        self.kept = 1

    def step(
        self, logits: Tensor, state: ThinkState, answers: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Superposition, ThinkState]:
        """See `Thinking.step`."""
        answers = self._chosen(largest(logits, 1)[1][:, 0], answers)
        thinking = state.phase == THINK
        continues = thinking & (state.num_steps < state.most)
        token, after = self._spelled(thinking, continues, answers, state, answers)
        return Superposition(token[:, None], self.one.expand(len(token), 1)), after


class NoThinking(ExplicitThinking):
    """`</think>` follows the prompt."""

    title = ""

    def _prepare(self, thoughts: Any, mixture: Mixing | None) -> None:
        self.kept, self.most_steps = 1, 0


class FixedThinking(Thinking):
    """Always `most_steps` steps, whatever the model would say; the spec's limits do not count."""

    def step(
        self, logits: Tensor, state: ThinkState, answers: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Superposition, ThinkState]:
        """See `Thinking.step`."""
        said = self.said(logits)
        thinking = state.phase == THINK
        continues = thinking & (state.num_steps < self.most_steps)
        token, after = self._plain(thinking, continues, state, self._chosen(said.ids[:, 0], answers))
        return self._mixed(continues, said, token), after


class HiddenStateThinking(FixedThinking):
    """Last hidden states are fed back; what a thought says is the softmax over its top-k logits."""

    title = "latents, as the LM head reads them"
    needs = "thoughts"

    def _prepare(self, thoughts: Any, mixture: Mixing | None) -> None:
        self.thoughts, self.most_steps = thoughts, thoughts.spec.num_latents
        self.at_once = 0 if thoughts.spec.sequential else self.most_steps


class MixtureThinking(FixedThinking):
    """The softmax over the whole vocabulary is fed back, at temperature 1, with no token left out."""

    needs = "mixture"

    def _prepare(self, thoughts: Any, mixture: Mixing | None) -> None:
        assert isinstance(mixture, Mixtures)
        self.kept, self.most_steps = self.spec.vocab_size, mixture.num_latents

    def said(self, logits: Tensor) -> Superposition:
        """See `Thinking.said`."""
        return superpose(logits, self.kept)
