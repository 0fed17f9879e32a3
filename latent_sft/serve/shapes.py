"""Responses as OpenAI's clients read them, whole and in events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from latent_sft.inference.show import Reasoner
from latent_sft.serve.choice import Choice, Piece
from latent_sft.serve.worker import Logprob


class Chat:
    """Responses of `/v1/chat/completions`."""

    prefix: ClassVar[str] = "chatcmpl"
    kinds: ClassVar[tuple[str, str]] = "chat.completion", "chat.completion.chunk"

    def __init__(self, name: str, reasoner: Reasoner, with_logprobs: bool) -> None:
        self.tokenizer, self.with_logprobs = reasoner.tokenizer, with_logprobs
        self.frame = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def whole(self, num_prompt: int, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the response to a request that does not stream."""
        shown = [self.one(c, c.reasoning, c.text, c.latents, c.logprobs, c.finish_reason) for c in choices]
        return {"object": self.kinds[0], **self.frame, "choices": shown, "usage": usage(num_prompt, choices)}

    def parts(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece: thought, answer, end."""
        if piece.reasoning or piece.latents:
            yield self.event([self.one(choice, piece.reasoning, "", piece.latents, [], None, part=True)])
        if piece.text or piece.logprobs:
            yield self.event([self.one(choice, "", piece.text, [], piece.logprobs, None, part=True)])
        if choice.finish_reason:
            yield self.event([self.one(choice, "", "", [], [], choice.finish_reason, part=True)])

    def first(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """Yield what comes before all else."""
        delta = {"role": "assistant", "content": ""}
        yield self.event([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def event(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return an event."""
        return {"object": self.kinds[1], **self.frame, "choices": choices, **more}

    def one(
        self,
        choice: Choice,
        reasoning: str,
        text: str,
        latents: list[dict[str, Any]],
        logprobs: list[Logprob],
        reason: str | None,
        part: bool = False,
    ) -> dict[str, Any]:
        """Return a choice, or a part of it."""
        said = {} if part else {"role": "assistant", "content": text, "refusal": None}
        said |= {"content": text} if text else {}
        said |= {"reasoning_content": reasoning} if reasoning else {}
        listed = {"content": [self._logprob(entry) for entry in logprobs], "refusal": None}
        shown = {"index": choice.index, "delta" if part else "message": said, "finish_reason": reason}
        shown["logprobs"] = listed if self.with_logprobs and (logprobs or not part) else None
        return shown | extras(choice, latents, part)

    def _logprob(self, entry: Logprob) -> dict[str, Any]:
        return {**self._token(entry.token, entry.logprob), "top_logprobs": [self._token(*pair) for pair in entry.top]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self.tokenizer.decode([token]))
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class Completion(Chat):
    """Responses of `/v1/completions`."""

    prefix = "cmpl"
    kinds = "text_completion", "text_completion"

    def first(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """See `Chat.first`: nothing."""
        return iter(())

    def one(
        self,
        choice: Choice,
        reasoning: str,
        text: str,
        latents: list[dict[str, Any]],
        logprobs: list[Logprob],
        reason: str | None,
        part: bool = False,
    ) -> dict[str, Any]:
        """See `Chat.one`."""
        shown: dict[str, Any] = {"index": choice.index, "text": text, "finish_reason": reason, "logprobs": None}
        if self.with_logprobs and (logprobs or not part):
            decode = self.tokenizer.decode
            tokens = [str(decode([entry.token])) for entry in logprobs]
            before = choice.num_answer - len(logprobs)
            ids = [entry.token for entry in choice.logprobs]
            shown["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [entry.logprob for entry in logprobs],
                "top_logprobs": [{str(decode([token])): value for token, value in entry.top} for entry in logprobs],
                "text_offset": [len(str(decode(ids[: before + i]))) for i in range(len(logprobs))],
            }
        shown |= {"reasoning_content": reasoning} if reasoning else {}
        return shown | extras(choice, latents, part)


def extras(choice: Choice, latents: list[dict[str, Any]], part: bool) -> dict[str, Any]:
    """Return what a choice has beyond OpenAI's fields, where it was asked for."""
    if not choice.with_latents or (part and not latents):
        return {}
    return {"latent_sft": {"latents": latents} | ({} if part else {"num_steps": choice.num_steps})}


def usage(num_prompt: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return what a request used; latents count as the tokens of a thought do."""
    thought = sum(choice.num_steps for choice in choices)
    written = thought + sum(choice.num_answer for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": written,
        "total_tokens": num_prompt + written,
        "completion_tokens_details": {"reasoning_tokens": thought},
    }
