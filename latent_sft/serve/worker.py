"""The engine in a thread of its own: requests go in, what they have produced comes out as often as they want it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import monotonic

import torch
from torch import Tensor

from latent_sft.errors import ConfigError
from latent_sft.inference.engine import Decoded, Engine
from latent_sft.inference.noise import Sampling
from latent_sft.inference.show import Reasoner
from latent_sft.method.thinking import Limits, ThinkState, answer_phase

MAX_COT_TOKENS = 512  # as `Reasoner.generate` has it
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token that was written, with the likeliest ones `(token, log-probability)`."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """One answer to one prompt.

    Attributes:
        prompt: token ids.
        changed: set, in its event loop, when `seen` or `error` has changed.
        sampling: None is greedy.
        place: see `Engine.add`.
        limits: within those of the engine.
        watched: progress is wanted, not only the end.
        alternatives: of each token of the answer; None where no log-probabilities are wanted.
        seen: what it has produced so far, and whether that is all.
        error: why it will not be.
        began: when it was taken into the batch.
        logprobs: of the tokens of the answer so far.
        number: in the engine.
    """

    prompt: Sequence[int]
    changed: asyncio.Event
    sampling: Sampling | None = None
    place: int = 0
    limits: Limits | None = None
    watched: bool = False
    alternatives: int | None = None
    seen: tuple[Decoded, bool] | None = None
    error: Exception | None = None
    began: float | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    number: int | None = None


class Worker:
    """Decodes jobs until it is closed. All but `_run` and what it calls belongs to the event loop.

    Attributes:
        open: jobs that are not done.
        capacity: jobs that may be open.
        longest: most tokens of a prompt.
        limits: of rows that have none of their own.
    """

    def __init__(self, reasoner: Reasoner, *, longest: int | None, batch_size: int, most_waiting: int) -> None:
        """Set up; `start` begins. Without `longest` prompts may be as long as the positions of the model allow.

        Raises:
            ConfigError: the model has no room for prompts of that length.
        """
        self.reasoner, self.batch_size, self.capacity = reasoner, batch_size, batch_size + most_waiting
        self.open: set[Job] = set()
        self.limits = self._engine(1).thinking.limits
        spec, config = reasoner.spec, getattr(reasoner.thinker.lm, "config", None)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
        room = (positions or math.inf) - self.limits.most - len(spec.end_think_ids) - self.limits.answer
        if not 1 <= (longest or 1) <= room:
            raise ConfigError(
                f"--max-length: got {longest or 1}, expected 1 to {room}; the rest of the model's {positions} "
                "positions is for thought and answer."
            )
        self.longest = longest or int(min(room, 2**20))
        self._inbox: SimpleQueue[tuple[str, Job] | None] = SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _engine(self, longest: int) -> Engine:
        how = self.reasoner.thinker
        return Engine(
            how.lm,
            self.reasoner.spec,
            thinker=how.kind,
            longest=longest,
            batch_size=self.batch_size,
            watch=self._watch,
            max_cot_tokens=MAX_COT_TOKENS,
            thoughts=how.thoughts,
            mixture=how.mixture,
        )

    def start(self) -> None:
        """Begin; called in the event loop that is told of changes."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End, whatever is in work."""
        self._inbox.put(None)
        self._thread.join()

    def alive(self) -> bool:
        """Return whether jobs are decoded."""
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Take jobs, all or none; return whether there was room."""
        if len(self.open) + len(jobs) > self.capacity:
            return False
        self.open.update(jobs)
        for job in jobs:
            self._inbox.put(("add", job))
        return True

    def release(self, jobs: Sequence[Job]) -> None:
        """Free the slots of jobs that nobody waits for any more."""
        for job in jobs:
            if job in self.open:
                self.open.discard(job)
                self._inbox.put(("cancel", job))

    def _run(self) -> None:
        while True:
            engine = self._engine(self.longest)
            try:
                with engine:
                    self._decode(engine)
                return
            except Exception as error:
                # one step is the same work for all: whose fault it was cannot be told
                logger.exception("decoding failed; %d requests are lost", len(self._jobs))
                for job in self._jobs.values():
                    job.error = error
                self._tell(list(self._jobs.values()))
                self._jobs.clear()

    def _decode(self, engine: Engine) -> None:
        fresh: list[Job] = []  # jobs that may still wait for a slot
        while True:
            while not engine.busy() or not self._inbox.empty():
                order = self._inbox.get()
                if order is None:
                    return
                self._obey(engine, *order, fresh)
            found = engine.step()
            if fresh:
                waiting = {request.number for request in engine.queue}
                for job in fresh:
                    job.began = None if job.number in waiting else monotonic()
                fresh = [job for job in fresh if job.began is None]
            watched = [number for number, job in self._jobs.items() if job.watched]
            changed = []
            for number, decoded in (engine.peek(watched) | found if watched else found).items():
                job = self._jobs.pop(number) if number in found else self._jobs[number]
                job.seen = decoded, number in found
                changed.append(job)
            if changed:
                self._tell(changed)

    def _obey(self, engine: Engine, order: str, job: Job, fresh: list[Job]) -> None:
        if order == "add":
            try:
                job.number = engine.add(job.prompt, sampling=job.sampling, place=job.place, limits=job.limits)
            except ValueError as error:
                job.error = error
                self._tell([job])
                return
            self._jobs[job.number] = job
            fresh.append(job)
        elif job.number is not None and self._jobs.pop(job.number, None):
            engine.cancel(job.number)

    def _tell(self, jobs: list[Job]) -> None:
        def wake() -> None:
            for job in jobs:
                if job.error or (job.seen and job.seen[1]):
                    self.open.discard(job)
                job.changed.set()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(wake)

    def _watch(self, requests: Sequence[int | None], state: ThinkState, logits: Tensor, token: Tensor) -> None:
        jobs = {row: self._jobs[number] for row, number in enumerate(requests) if number in self._jobs}
        rows = [row for row, job in jobs.items() if job.alternatives is not None]
        if not rows:
            return
        answering = (state.phase[rows] == answer_phase(self.reasoner.spec)).tolist()
        if not (rows := [row for row, answers in zip(rows, answering, strict=True) if answers]):
            return
        logs = logits[rows].float().log_softmax(-1)
        most = max(jobs[row].alternatives or 0 for row in rows)
        values, ids = (part.tolist() for part in torch.topk(logs, min(most, logs.shape[-1]), dim=-1))
        tokens = token[rows]
        chosen = logs.gather(-1, tokens[:, None])[:, 0].tolist()
        for i, (row, written) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            top = list(zip(ids[i], values[i], strict=True))[: jobs[row].alternatives]
            jobs[row].logprobs.append(Logprob(written, chosen[i], top))
