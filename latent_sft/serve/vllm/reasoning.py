"""What vLLM's chat interface shows as reasoning: the tokens that latents stand for, before `</think>`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latent_sft.method.types import SPEC_FILE, LatentSpec
from latent_sft.runs import read_json


def split(text: str, end: str) -> tuple[str, str | None]:
    """Return the reasoning and the answer in a text that may still be written; None where the answer has not begun.

    What may turn out to be the beginning of `end` is left out.

    >>> split("a b </thi", "</think>"), split("a b </think>c", "</think>")
    (('a b ', None), ('a b ', 'c'))
    """
    thought, ended, answer = text.partition(end)
    if ended:
        return thought, answer
    held = next(n for n in range(min(len(end) - 1, len(text)), -1, -1) if text.endswith(end[:n]))
    return text[: len(text) - held], None


def last(ids: Sequence[int], part: Sequence[int]) -> int:
    """Return where the last occurrence of `part` in `ids` ends, or -1."""
    size = len(part)
    return next((i for i in range(len(ids), size - 1, -1) if list(ids[i - size : i]) == list(part)), -1)


class Reasoning:
    """What a reasoning parser of vLLM is asked for."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        spec = LatentSpec.from_dict(read_json(Path(tokenizer.name_or_path) / SPEC_FILE))
        self.think, self.end = list(spec.think_ids), list(spec.end_think_ids)
        self.start_text, self.end_text = (tokenizer.decode(ids).strip() for ids in (self.think, self.end))

    @property
    def reasoning_start_str(self) -> str:
        """The text of `<think>`."""
        return self.start_text

    @property
    def reasoning_end_str(self) -> str:
        """The text of `</think>`."""
        return self.end_text

    def adjust_request(self, request: Any) -> Any:
        """Keep `</think>` in the text, also where it is a special token."""
        request.skip_special_tokens = False
        return request

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Return whether the last `</think>` comes after the last `<think>`."""
        return last(input_ids, self.end) > last(input_ids, self.think)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Return whether an output has come to its answer."""
        return last(input_ids, self.end) >= 0

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Return what follows `</think>`."""
        end = last(input_ids, self.end)
        return list(input_ids[end:]) if end >= 0 else []

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Return how many latents an output holds, tokens of `<think>` in it counted."""
        end = last(token_ids, self.end)
        return len(token_ids) if end < 0 else end - len(self.end)

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Return reasoning and answer of a whole output."""
        thought, _, answer = model_output.partition(self.end_text)
        return self._shown(thought) or None, answer.strip() or None

    def extract_reasoning_streaming(
        self, previous_text: str, current_text: str, delta_text: str, *ids: Any, **named: Any
    ) -> Any:
        """Return what is new in a text since it was last looked at, None where nothing is."""
        from vllm.entrypoints.generate.base.protocol import DeltaMessage

        (was, _), (thought, answer) = split(previous_text, self.end_text), split(current_text, self.end_text)
        new = self._shown(thought)[len(self._shown(was)) :]
        return DeltaMessage(reasoning=new or None, content=answer or None) if new or answer else None

    def _shown(self, thought: str) -> str:
        return thought.replace(self.start_text, "").lstrip()


def __getattr__(name: str) -> Any:
    """Return the class that vLLM looks up here; its base is vLLM's."""
    if name != "LatentReasoningParser":
        raise AttributeError(name)
    from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

    return type(name, (Reasoning, ReasoningParser), {"__module__": __name__})
