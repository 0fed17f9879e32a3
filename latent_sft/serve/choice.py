"""From what a row has produced so far to the text of one choice, whole or piece by piece."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from latent_sft.inference.engine import THINKERS, Decoded
from latent_sft.inference.show import Reasoner, shown_latents
from latent_sft.serve.worker import Job, Logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new since the last piece."""

    reasoning: str
    text: str
    latents: list[dict[str, Any]]
    logprobs: list[Logprob]

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.text or self.latents or self.logprobs)


@dataclass(slots=True, kw_only=True)
class Choice:
    """One choice of a response.

    Attributes:
        reasoner: the model.
        job: what is decoded.
        index: of the choice.
        stops: strings that end the answer and do not belong to it, also where they are part of a token.
        most: thought and answer together, in tokens; None is as long as they like.
        top: tokens shown per latent.
        with_latents: they are returned.
        reasoning: thought as text so far, `text` the answer, `latents` and `num_answer` what belongs to them.
        finish_reason: `stop` or `length`; None before the end.
        taken: what of the job is in it.
    """

    reasoner: Reasoner
    job: Job
    index: int
    stops: list[str]
    most: int | None
    top: int
    with_latents: bool
    reasoning: str = ""
    text: str = ""
    latents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_steps: int = 0
    num_answer: int = 0
    finish_reason: str | None = None
    taken: tuple[Decoded, bool] | None = None
    _lines: list[str] = dataclasses.field(default_factory=list)

    def update(self) -> Piece:
        """Take over what the job has produced, and return what is new to a reader."""
        assert self.job.seen is not None
        self.taken = seen, ended = self.job.seen
        before = len(self.reasoning), len(self.text), len(self.latents), self.num_answer
        self.num_steps, ids = seen.num_steps, seen.answer_ids
        # a row that writes EOS while it thinks has no answer, and was not cut either
        reason = ("stop" if seen.finished or not ids else "length") if ended else None
        if self.most is not None and self.num_steps + len(ids) >= self.most:
            fits = self.num_steps + len(ids) == self.most and reason == "stop"
            self.num_steps = min(self.num_steps, self.most)
            ids, reason = ids[: self.most - self.num_steps], reason if fits else "length"
        text, stopped = self._answer(ids)
        reason = "stop" if stopped else reason
        self._think(seen, ended or reason is not None)
        whole = reason is not None
        # what may still become a stop string, half of a character or white space at the end is held back
        visible = (text if whole else text[: len(text) - self._held(text)].removesuffix("\ufffd")).strip()
        if whole or visible.startswith(self.text):
            self.text = visible
        self.finish_reason = reason
        return Piece(
            reasoning=self.reasoning[before[0] :],
            text=self.text[before[1] :],
            latents=self.latents[before[2] :],
            logprobs=self.job.logprobs[before[3] : self.num_answer],
        )

    @property
    def logprobs(self) -> list[Logprob]:
        """Return those of the answer."""
        return self.job.logprobs[: self.num_answer]

    def _answer(self, ids: list[int]) -> tuple[str, bool]:
        """Return the answer up to the first stop string, and whether there was one; count its tokens."""
        decode, known = self.reasoner.tokenizer.decode, self.num_answer
        text, self.num_answer = str(decode(ids)), len(ids)
        if not any(stop in text for stop in self.stops):
            return text, False
        for count in range(known, len(ids) + 1):  # the same wherever the looks fell
            text = str(decode(ids[:count]))
            if places := [text.index(stop) for stop in self.stops if stop in text]:
                self.num_answer = count
                return text[: min(places)], True
        raise AssertionError("a stop string is in the whole and in no beginning of it")

    def _held(self, text: str) -> int:
        lengths = (n for stop in self.stops for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _think(self, seen: Decoded, ended: bool) -> None:
        tokenizer, kind = self.reasoner.tokenizer, self.reasoner.thinker.kind
        if self.with_latents or not THINKERS[kind].readable:
            for latent in shown_latents(seen, kind, tokenizer, self.top, first=len(self._lines)):
                self._lines.append(" ".join(text for text, _ in latent.tokens))
                if self.with_latents:
                    self.latents.append(dataclasses.asdict(latent))
        thought = "\n".join(self._lines)
        if THINKERS[kind].readable:
            ids = seen.thought_ids
            if seen.spans is None:
                # the delimiter counts as thought until it is complete
                held = 0 if ended or seen.answer_ids else len(self.reasoner.spec.end_think_ids)
                ids = ids[: max(0, min(len(ids) - held, self.num_steps))]
            thought = str(tokenizer.decode(ids)).removesuffix("" if ended else "\ufffd")
        if ended or thought.startswith(self.reasoning):
            self.reasoning = thought
