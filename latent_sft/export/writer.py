"""How an export writes answers: by the settings that `generate` of `transformers` takes, in the engine's own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from latent_sft.inference.noise import Sampling, sample
from latent_sft.method.thinking import ThinkState, answer_phase
from latent_sft.method.types import LatentSpec


class Writer:
    """Writes answers as `transformers` writes text: processed and sampled tokens, stopping criteria, a streamer.

    Criteria and streamers see all rows one column after another, each as soon as every row has it or has ended.

    Attributes:
        tails: what follows the prompt of each row so far: delimiters, then the answer.
        cut: length at which a criterion stopped the row; None where none did.
        scores: processed logits `[V]` of each answer token of each row; `logits` are those of the model.
    """

    def __init__(
        self,
        spec: LatentSpec,
        ids: Tensor,
        tails: list[list[int]],
        shared: LogitsProcessorList,
        own: list[LogitsProcessorList],
        prefixes: list[list[int]],
        criteria: StoppingCriteriaList,
        stops: Callable[[list[int]], bool] | None,
        streamer: BaseStreamer | None,
        keep: bool,
    ) -> None:
        """Set up.

        Args:
            spec: settings.
            ids: `[B, P]` prompts as given.
            tails: `<think>` where a prompt lacked it, and `</think>`.
            shared: processors of all rows.
            own: in their place, processors of each row; empty where none of them looks at ids.
            prefixes: ids that processors see before the answer, without padding.
            criteria: see `transformers`.
            stops: whether an answer stops here.
            streamer: is given every token after the prompt.
            keep: keep scores and logits.
        """
        self.spec, self.shared, self.own, self.prefixes = spec, shared, own, prefixes
        self.criteria, self.stops, self.streamer, self.keep = criteria, stops, streamer, keep
        self.shown, self.width = ids, ids.shape[1]
        self.tails = [list(tail) for tail in tails]
        self.first = [len(tail) for tail in tails]
        self.cut: list[int | None] = [None] * len(tails)
        self.scores: list[list[Tensor]] = [[] for _ in tails]
        self.logits: list[list[Tensor]] = [[] for _ in tails]

    def __call__(
        self, problems: Sequence[int | None], state: ThinkState, logits: Tensor, uniform: Tensor | None
    ) -> Tensor:
        """Return the token `[B]` that each row in work would write; see `inference.advance.Write`."""
        chosen = torch.full_like(state.phase, self.spec.eos_id)
        answering = (state.phase == answer_phase(self.spec)).tolist()
        rows = [(slot, row) for slot, row in enumerate(problems) if row is not None and answering[slot]]
        if not rows:
            return chosen
        slots = torch.tensor([slot for slot, _ in rows], device=logits.device)
        raw = logits[slots].float()
        scores = self._processed([row for _, row in rows], raw)
        once = Sampling(temperature=1.0)  # `transformers` has put temperature and nucleus into the scores
        tokens = scores.argmax(-1) if uniform is None else sample(scores, uniform[slots], once)
        chosen[slots] = tokens
        for i, ((slot, row), token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if self.cut[row] is not None:
                chosen[slot] = self.spec.eos_id  # a criterion stopped it; this is how the engine hears of it
                continue
            self.tails[row].append(token)
            if self.keep:
                self.scores[row].append(scores[i])
                self.logits[row].append(raw[i])
        self._show()
        return chosen

    def _processed(self, rows: list[int], logits: Tensor) -> Tensor:
        if not self.own:
            return self.shared(None, logits)  # type: ignore[no-any-return, arg-type]
        parts = []
        for i, row in enumerate(rows):
            ids = [*self.prefixes[row], *self.tails[row][self.first[row] :]]
            parts.append(self.own[row](torch.tensor([ids], device=logits.device), logits[i : i + 1]))
        return torch.cat(parts)

    def _show(self) -> None:
        """Show criteria and streamer the columns that are complete."""
        if not self.criteria and self.stops is None and self.streamer is None:
            return
        while True:
            column = self.shown.shape[1] - self.width
            tokens = [self._token(row, column) for row in range(len(self.tails))]
            if None in tokens or all(column >= self._end(row) for row in range(len(self.tails))):
                return
            new = torch.tensor(tokens, dtype=self.shown.dtype, device=self.shown.device)
            self.shown = torch.cat([self.shown, new[:, None]], dim=1)
            if self.streamer is not None:
                self.streamer.put(new.cpu())
            done = self.criteria(self.shown, None).tolist()  # type: ignore[arg-type]
            for row, (tail, first) in enumerate(zip(self.tails, self.first, strict=True)):
                stopped = done[row] or (self.stops is not None and self.stops(tail[first : column + 1]))
                if stopped and first <= column < self._end(row):
                    self.cut[row] = column + 1

    def _end(self, row: int) -> float:
        """Return the length of a row that has ended, infinity before."""
        tail, cut = self.tails[row], self.cut[row]
        if cut is not None:
            return cut
        answer = tail[self.first[row] :]
        ended = answer[-1:] == [self.spec.eos_id] or len(answer) == self.spec.max_answer_tokens
        return len(tail) if ended else float("inf")

    def _token(self, row: int, column: int) -> int | None:
        """Return the token of a row in a column: padding after its end, None where it is not written yet."""
        if column >= self._end(row):
            return self.spec.pad_id
        return self.tails[row][column] if column < len(self.tails[row]) else None

    def stacked(self, kept: list[list[Tensor]], width: int) -> tuple[Tensor, ...]:
        """Return `[B, V]` for each of the `width` columns after the prompts."""
        rows = []
        for tail, first, own in zip(self.tails, self.first, kept, strict=True):
            forced = own[0].new_full((first, len(own[0])), float("-inf"))
            forced[range(first), tail[:first]] = 0
            own = own[: width - first]
            rows.append(torch.cat([forced, torch.stack(own), own[0].new_zeros(width - first - len(own), len(own[0]))]))
        return torch.stack(rows, dim=1).unbind(0)
