"""The decoding engine: batched, KV-cached, no second prefill; every row in its own phase (`method.thinking`).

Requests join while others are in work and leave when they are done or cancelled. Prompt ids in, latents and answer ids
out; knows nothing about tokenizers or files, and of ways of thinking only what `Thinking` says. How rows share a batch
is in `inference.slots`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latent_sft.inference.advance import DecodeConfig, Watch, Write
from latent_sft.inference.noise import Sampling
from latent_sft.inference.slots import Finished, Request, Slots
from latent_sft.method.soft import SoftThinking
from latent_sft.method.spans import SpanThinking
from latent_sft.method.thinking import (
    THINK,
    ExplicitThinking,
    HiddenStateThinking,
    LatentThinking,
    Limits,
    MixtureThinking,
    NoThinking,
    Thinking,
    answer_phase,
)
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import embed, mix_latents, unwrap_peft
from latent_sft.models.thoughts import placeholders

SPARE = 4  # slots per row in work that are kept while requests may come
# names of ways of thinking, as in `thinker.json`
THINKERS: dict[str, type[Thinking]] = {
    "none": NoThinking,
    "explicit": ExplicitThinking,
    "latent": LatentThinking,
    "continuous": HiddenStateThinking,
    "soft": SoftThinking,
    "spans": SpanThinking,
    "mixtures": MixtureThinking,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What one problem produced.

    Attributes:
        latent_ids: `[n, K]` on the CPU, or None where thinking was explicit. For hidden states these say what the LM
            head makes of the state that a latent was made of.
        latent_weights: `[n, K]` float32, likewise.
        thought_ids: explicit tokens between the delimiters; for latents what they stand for.
        answer_ids: answer without EOS.
        num_steps: latents, or explicit CoT tokens.
        forward_passes: model calls this row took part in, prefill included.
        finished: EOS was written.
        latent_embeds: `[n, D]` float32 on the CPU, what the latents were fed as, where that was not a superposition.
        spans: the part of `thought_ids` that each latent stands for.
    """

    latent_ids: Tensor | None
    latent_weights: Tensor | None
    thought_ids: list[int]
    answer_ids: list[int]
    num_steps: int
    forward_passes: int
    finished: bool
    latent_embeds: Tensor | None = None
    spans: list[list[int]] | None = None


class Engine:
    """Decodes requests that come and go, in a `with` block, which leaves the model as it was.

    with Engine(model, spec, thinker="latent", longest=256, batch_size=8) as engine:
        number = engine.add(prompt)
        while engine.busy():
            for number, decoded in engine.step().items(): ...
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: nn.Module,
        spec: LatentSpec,
        *,
        thinker: str,
        longest: int,
        batch_size: int = 64,
        sampling: Sampling | None = None,
        write: Write | None = None,
        watch: Watch | None = None,
        static: bool = False,
        compile: bool = False,
        max_cot_tokens: int = 512,
        **needed: Any,
    ) -> None:
        """Make the slots; see `generate` for what is not described here.

        Args:
            model: causal LM (PEFT wrapper allowed), on its device.
            spec: settings.
            thinker: one of THINKERS.
            longest: most tokens of a prompt, given latents counted.
            batch_size: slots at most; there are as many as requests need, in powers of two.
            sampling: see `generate`.
            write: see `generate`.
            watch: is shown every step what was chosen from which logits.
            static: see `generate`.
            compile: see `generate`.
            max_cot_tokens: see `generate`.
            needed: `thoughts` or `mixture`.

        Raises:
            ConfigError: the model has layers of a kind that decoding does not know.
            ValueError: an unknown thinker, or one whose settings are missing.
        """
        if thinker not in THINKERS:
            raise ValueError(f"thinker must be one of {', '.join(THINKERS)}, not {thinker!r}")
        kind = THINKERS[thinker]
        if kind.needs and needed.get(kind.needs) is None:
            raise ValueError(f"thinker {thinker!r} needs its settings: {kind.needs}=...")
        self.model, self.spec, self.longest = model, spec, longest
        device = unwrap_peft(model).get_input_embeddings().weight.device
        self.thinking = thinking = kind(spec, device, max_tokens=max_cot_tokens, **needed)
        columns = longest + thinking.most_steps + len(spec.end_think_ids) + spec.max_answer_tokens
        self.slots = Slots(
            DecodeConfig(model, thinking, columns, sampling, static or compile, compile, write, watch), batch_size
        )
        self.queue: deque[Request] = deque()
        self._requests: dict[int, Request] = {}
        self._next = 0

    def __enter__(self) -> Engine:
        """Put the modules into eval mode, with an attention function that takes masks."""
        config, thoughts = unwrap_peft(self.model).config, self.thinking.thoughts
        self._before = self.model.training, config._attn_implementation, thoughts is not None and thoughts.training
        self.model.eval()
        if thoughts is not None:
            thoughts.eval()
        # columns that rows do not have in common need a mask; flex would compile for every new shape
        if "flash" in config._attn_implementation or "flex" in config._attn_implementation:
            config._attn_implementation = "sdpa" if unwrap_peft(self.model)._supports_sdpa else "eager"
        return self

    def __exit__(self, *error: object) -> None:
        """Leave them as they were."""
        training, unwrap_peft(self.model).config._attn_implementation, thoughts_trained = self._before
        self.model.train(training)
        if self.thinking.thoughts is not None:
            self.thinking.thoughts.train(thoughts_trained)

    def add(
        self,
        prompt: Sequence[int],
        latents: Superposition | Tensor | None = None,
        number: int | None = None,
        *,
        sampling: Sampling | None = None,
        place: int = 0,
        limits: Limits | None = None,
    ) -> int:
        """Put a request at the end of the queue.

        Args:
            prompt: token ids, ending with the opening delimiter.
            latents: fed in place of thinking, see `generate`; not where latents are thought at once.
            number: which no other request in the engine has; together with the seed it decides its draws.
            sampling: of this request, in place of the engine's; its `latent_noise` does not count.
            place: with `sampling`, in place of the number: the draws are those of this problem of a call with its seed.
            limits: within those of the engine.

        Returns:
            The number, by default the next one.

        Raises:
            ValueError: a prompt that is empty, too long, or holds an id that is none, or limits beyond the engine's.
        """
        end, thinking = len(self.spec.end_think_ids), self.thinking
        length = len(prompt) + num_given(latents)
        if not 0 < len(prompt) <= length <= self.longest:
            raise ValueError(f"prompt: got {length} tokens (given latents counted), expected 1 to {self.longest}.")
        if wrong := [token for token in prompt if not 0 <= token < self.spec.vocab_size]:
            raise ValueError(f"prompt: got the token id {wrong[0]}, expected ids below {self.spec.vocab_size}.")
        if latents is not None and thinking.at_once:
            raise ValueError("latents: cannot be given where they are thought at once; use thinker='none'.")
        own, most = limits or thinking.limits, thinking.limits
        if limits and not (0 <= own.least <= own.most <= most.most and 1 <= own.answer <= most.answer):
            raise ValueError(f"limits: got {own}, expected 0 <= least <= most and at most {most}.")
        answers = latents is not None or thinking.at_once > 0
        size = length + thinking.at_once + (end if answers else 0)
        number = self._next if number is None else number
        self._next = max(self._next, number + 1)
        if sampling is not None:
            self.slots.noise.own(number, sampling, place)
        request = Request(number, list(prompt), latents, size, answer_phase(self.spec) if answers else THINK, own)
        self._requests[number] = request
        self.queue.append(request)
        return number

    def cancel(self, number: int) -> bool:
        """Drop a request; return whether it was still waiting or in work."""
        self.queue = deque(request for request in self.queue if request.number != number)
        self.slots.cancel(number)
        return self._requests.pop(number, None) is not None

    @torch.inference_mode()
    def step(self, more: bool = True, always: bool = False) -> dict[int, Decoded]:
        """Read waiting prompts into free slots, and call the model once for all rows in work.

        Args:
            more: requests may still be added; slots that no row needs are then given up later.
            always: call the model also where no row is in work.

        Returns:
            What requests that were found done produced, by their numbers.
        """
        self.slots.admit(self.queue, self._prefix)
        done = self.slots.collect_finished()
        found = {row.number: self._decoded(row, self._requests.pop(row.number).latents) for row in done}
        self.slots.compact(0 if self.queue else SPARE if more else 2)
        if always or self.slots.live():
            self.slots.step()
        return found

    def busy(self) -> bool:
        """Return whether requests are waiting or in work."""
        return bool(self._requests)

    def peek(self, numbers: Iterable[int]) -> dict[int, Decoded]:
        """Return what those of the requests that are in work have produced so far; nothing between two looks.

        Explicit thinking counts a delimiter as a thought until it is complete.
        """
        if self.slots.steps % self.slots.look_every:
            return {}
        where = {number: slot for slot, number in enumerate(self.slots.requests) if number is not None}
        rows = self.slots.rows([where[number] for number in numbers if number in where])
        return {row.number: self._decoded(row, self._requests[row.number].latents) for row in rows}

    def _prefix(self, requests: list[Request]) -> tuple[Tensor, Tensor]:
        """Return left-padded prefix embeddings `[B, W, D]` and which positions are real `[B, W]`."""
        spec, thinking, device = self.spec, self.thinking, self.slots.device
        width = max(request.size for request in requests)
        rows = []
        for request in requests:  # any id holds the place of a latent
            answers = list(spec.end_think_ids) if request.phase != THINK else []
            between = request.size - len(request.prompt) - len(answers)
            rows.append([*request.prompt, *[spec.pad_id] * between, *answers])
        ids = torch.tensor([[spec.pad_id] * (width - len(row)) + row for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        embeds = embed(self.model, ids)
        end = width - len(spec.end_think_ids)
        for b, request in enumerate(requests):
            latent = request.latents
            if thinking.at_once:
                fed = placeholders(thinking.thoughts, 1)[0]
            elif latent is None:
                continue
            elif isinstance(latent, Tensor):
                fed = latent.to(device)
            else:
                fed = mix_latents(self.model, Superposition(latent.ids.to(device), latent.weights.to(device)))
            embeds[b, end - len(fed) : end] = fed.to(embeds.dtype)
        return embeds, torch.arange(width, device=device) >= width - lengths[:, None]

    def _decoded(self, row: Finished, given: Superposition | Tensor | None) -> Decoded:
        """Cut what a row was fed into thought, `</think>` and answer."""
        steps, spec = row.num_steps, self.spec
        # an EOS while thinking ends the row before any delimiter
        between = len(spec.end_think_ids) if given is None and row.num_answer else 0
        length = steps + between + row.num_answer
        tokens = row.fed.ids[:length, 0].tolist()
        answer = tokens[steps + between :]
        finished = bool(answer) and answer[-1] == spec.eos_id
        latent, embeds = None, row.thoughts
        if isinstance(given, Tensor):
            embeds, steps = given.detach().float().cpu(), len(given)
        elif given is not None:
            latent, steps = Superposition(given.ids.cpu(), given.weights.cpu()), len(given.ids)
        elif not self.thinking.written:
            latent = Superposition(row.fed.ids[:steps].clone(), row.fed.weights[:steps].clone())
        thought = [] if given is not None else tokens[:steps]
        spans = None if latent is None else self.thinking.read(latent)
        # the last token is not fed, but there was the prefill; latents that were thought at once took T passes more
        passes = self.thinking.thoughts.spec.iterations + row.num_answer if self.thinking.at_once else length
        return Decoded(
            latent_ids=None if latent is None else latent.ids,
            latent_weights=None if latent is None else latent.weights,
            thought_ids=thought if spans is None else [token for span in spans for token in span],
            answer_ids=answer[:-1] if finished else answer,
            num_steps=steps,
            forward_passes=passes,
            finished=finished,
            latent_embeds=embeds,
            spans=spans,
        )


def num_given(latent: Superposition | Tensor | None) -> int:
    """Return n of a superposition `[n, K]` or of embeddings `[n, D]`; 0 where none are given."""
    if latent is None:
        return 0
    return len(latent) if isinstance(latent, Tensor) else len(latent.ids)
