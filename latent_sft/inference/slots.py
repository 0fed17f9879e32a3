"""Decoding in slots: a batch of fixed width whose rows start and end at different times.

All slots share one column of the cache (see `inference.cache`). A row that ends leaves its slot; several free slots are
filled together with problems from the queue. What is fed at a column is kept in a trace beside the cache, so a finished
row is cut out of it in one piece. When the column reaches the end of the buffers, everything moves to the left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_sft.inference.advance import Job, Moved, advance, copied, follow, last_states
from latent_sft.inference.cache import Reading, SlotCache, Windows, prompt_mask, repacked
from latent_sft.inference.jacobi import said, think_at_once
from latent_sft.inference.noise import Noise
from latent_sft.method import thinking
from latent_sft.method.masks import to_additive
from latent_sft.method.thinking import ThinkState
from latent_sft.method.types import Superposition
from latent_sft.models.backbone import core, embed

PREFILL_TOKENS = 16384  # of prompts read at once; their attention mask is `[n, 1, W, W]`
FIRST_COLUMNS = 64  # beyond the longest prompt; buffers grow by doubling, since few rows need all they may
# a quarter of the slots is filled at once: reading a few prompts costs nearly as much as reading many. A model of 20M
# parameters with 64 slots on a CPU took 13 % less time a problem than filling each slot at once; half gave 2 % more
REFILL = 4
# moving everything to the left pays where this many columns, and half as many as are in use, are empty for all rows
WASTE = 32
# steps between two looks at which rows have finished: a look makes the host wait for the device
LOOK_EVERY = {"cpu": 1}
LOOK_EVERY_ELSEWHERE = 4


class Finished(NamedTuple):
    """A row that is done: its problem, everything it was fed `[T, K]`, latents or tokens, and answer tokens.

    Of thoughts in hidden states `fed` holds what they say, and `thoughts` `[M, D]` what was fed.
    """

    problem: int
    fed: Superposition
    num_steps: int
    num_answer: int
    thoughts: Tensor | None


class Slots:
    """The rows in work.

    Attributes:
        problems: the problem in each slot, or None.
        begin: first column of each slot's row.
        width: columns of its prompt.
        thoughts: `[S, M + 1, D]` thoughts in hidden states of each slot; the last place is for what is none.
    """

    def __init__(self, job: Job, count: int, longest_prompt: int) -> None:
        self.job = job
        lm = core(job.model)
        self.device = lm.get_input_embeddings().weight.device  # of a model that is spread over several, too
        # rows that run as long as they may would otherwise have everything moved at every step
        self.most = job.longest + WASTE
        capacity = self.most if job.static else min(self.most, longest_prompt + FIRST_COLUMNS)
        self.cache = SlotCache(count, capacity, job.static, self.device)
        self.windows = Windows(lm, job.longest)
        mixture = job.kept if job.soft is not None and job.soft.noise_scale > 0 else 0
        self.noise = Noise(job.sampling, job.spec, job.thinker == "latent", self.device, mixture)
        self.script = thinking.script_of(job.spec, self.device, job.kept)
        self.problems: list[int | None] = [None] * count
        self.begin, self.width = [0] * count, [0] * count
        self.embeds = embed(job.model, torch.zeros(count, 1, dtype=torch.long, device=self.device))
        dtype = self.embeds.dtype
        self.visible = torch.full((count, capacity), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        self.trace = Superposition(
            torch.zeros(count, capacity, job.kept, dtype=torch.long, device=self.device),
            torch.zeros(count, capacity, job.kept, device=self.device),
        )
        self.state = thinking.start(count, job.spec, self.device, thinking.answer_phase(job.spec) + 1)
        self.position = torch.zeros(count, 1, dtype=torch.long, device=self.device)
        self.thoughts: Tensor | None = None
        if job.thoughts is not None:
            self.thoughts = self.embeds.repeat(1, job.thoughts.spec.num_latents + 1, 1)
        self.steps = 0
        self.look_every = LOOK_EVERY.get(self.device.type, LOOK_EVERY_ELSEWHERE)
        self.advance: Callable[..., Moved] = advance
        if job.compiled:
            self.advance = torch.compile(advance, mode="reduce-overhead", dynamic=False)

    def live(self) -> list[int]:
        """Return the slots in work."""
        return [slot for slot, problem in enumerate(self.problems) if problem is not None]

    def refill(
        self, queue: deque[int], prefix: Callable[[Sequence[int]], tuple[Tensor, Tensor]], sizes: Sequence[int]
    ) -> None:
        """Read problems of the queue into free slots, where enough are free for it to pay.

        Args:
            queue: problems, longest prompt first: then every prompt fits left of the column, which is as far to the
                right as the rows in work are long.
            prefix: problems -> left-padded `[n, W, D]` and which of it is real `[n, W]`.
            sizes: length of the prefix of each problem.
        """
        free = [slot for slot, problem in enumerate(self.problems) if problem is None]
        slots = len(self.problems)
        if not queue or len(free) < min(len(queue), -(-slots // REFILL)):
            return
        if len(free) == slots:
            self.cache.move_to(0)
        while free and queue:
            width = sizes[queue[0]]
            count = min(len(free), len(queue), max(1, PREFILL_TOKENS // width))
            chosen = [queue.popleft() for _ in range(count)]
            if self.cache.column < width:
                assert not self.live(), "a longer prompt after a shorter one"
                self.cache.move_to(width)
            self._read(free[:count], chosen, *prefix(chosen))
            free = free[count:]

    def _read(self, slots: list[int], problems: list[int], embeds: Tensor, real: Tensor) -> None:
        column, width, job = self.cache.column, embeds.shape[1], self.job
        where = torch.tensor(slots, device=self.device)
        lengths = real.sum(1)
        position = (real.cumsum(1) - 1).clamp(min=0)
        draws = self.noise.draw(problems)
        before = thinking.start(len(slots), job.spec, self.device, job.phase)
        if job.parallel is not None:
            before = before._replace(num_steps=before.num_steps + job.parallel.num_latents)
            moved = self._think_at_once(where, embeds, real, position, before, draws[0], problems)
            lengths = lengths - job.parallel.num_latents - len(job.spec.end_think_ids)
        else:
            mask = self._prompt_mask(real, embeds.dtype, 0, width)
            self.cache.reading = Reading(where, column - width, column - width)
            moved = advance(job, self.script, self.cache, embeds, position, mask, before, *draws, problems)
            self._keep_thoughts(where, before, moved)
        self.cache.reading = None
        lowest = torch.finfo(embeds.dtype).min
        row = torch.full((len(slots), self.cache.capacity), lowest, dtype=embeds.dtype, device=self.device)
        row[:, column - width : column] = to_additive(real, embeds.dtype)
        self.visible.index_copy_(0, where, row)
        self.embeds.index_copy_(0, where, moved.embeds)
        self.position.index_copy_(0, where, moved.position)
        self.state = ThinkState(*(o.index_copy(0, where, n) for o, n in zip(self.state, moved.state, strict=True)))
        for buffer, fed in zip(self.trace, moved.fed, strict=True):
            buffer[:, column].index_copy_(0, where, fed.to(buffer.dtype))
        columns = zip(real.sum(1).tolist(), lengths.tolist(), strict=True)
        for slot, problem, (whole, prompt) in zip(slots, problems, columns, strict=True):
            self.problems[slot], self.begin[slot], self.width[slot] = problem, column - whole, prompt

    def _prompt_mask(self, real: Tensor, dtype: torch.dtype, begin: int, end: int) -> Tensor | dict[str, Tensor]:
        """Return the mask of a pass over the tokens `begin..end` of left-padded rows that see what is before them."""
        ages = torch.arange(end, device=self.device)
        return self.windows.masks(prompt_mask(real[:, :end], dtype)[:, :, begin:], ages[begin:, None] - ages[None])

    def _think_at_once(
        self,
        where: Tensor,
        embeds: Tensor,
        real: Tensor,
        position: Tensor,
        state: ThinkState,
        noise: Tensor | None,
        problems: list[int],
    ) -> Moved:
        """Read prompts and think all their latents; these and `</think>` end up in the trace as if fed in steps."""
        job, first = self.job, self.cache.column - embeds.shape[1]
        assert job.thoughts is not None and self.thoughts is not None

        def read(inputs: Tensor, begin: int) -> Tensor:
            end = begin + inputs.shape[1]
            self.cache.reading = Reading(where, first, first + begin)
            mask = self._prompt_mask(real, embeds.dtype, begin, end)
            return last_states(job.model, self.cache, inputs, position[:, begin:end], mask)

        thought = think_at_once(job.thoughts, embeds, len(job.spec.end_think_ids), read)
        latents = said(job.model, job.spec, thought.states)
        count, stop = thought.inputs.shape[1], self.cache.column
        self.thoughts[where, :count] = thought.inputs
        ids, weights = self.trace
        start = stop - count - len(job.spec.end_think_ids)
        for buffer, values in zip(self.trace, latents, strict=True):
            buffer[where, start : start + count] = values.to(buffer.dtype)
        ids[where, start + count : stop] = self.script.tokens[: stop - start - count, None]
        weights[where, start + count : stop] = self.script.one
        return follow(job, self.script, thought.hidden, position[:, -1:], state, noise, problems)

    def _keep_thoughts(self, where: Tensor | None, before: ThinkState, moved: Moved) -> None:
        """Store the hidden states that rows (None: all) are fed next."""
        if self.thoughts is None:
            return
        rows = torch.arange(len(self.thoughts), device=self.device) if where is None else where
        thinks = moved.state.num_steps > before.num_steps
        place = torch.where(thinks, before.num_steps, self.thoughts.shape[1] - 1)
        self.thoughts[rows, place] = moved.embeds[:, 0]

    def step(self) -> None:
        """Feed every slot once; where none is in work, that changes nothing."""
        if not self.live():
            self.cache.move_to(0)
        if self.cache.column + 1 == self.cache.capacity:
            self._pack(grow=True)
        column, job = self.cache.column, self.job
        self.visible[:, column] = 0
        columns = self.cache.capacity if job.static else column + 1
        visible = self.visible[:, None, None, :columns]
        mask: Tensor | dict[str, Tensor] = visible
        if self.windows.size:
            mask = self.windows.masks(visible, column - torch.arange(columns, device=self.device)[None])
        if job.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        moved = self.advance(
            job,
            self.script,
            self.cache,
            self.embeds,
            self.position,
            mask,
            self.state,
            *self.noise.draw(self.problems),
            () if job.write is None else self.problems,  # compiled code would be made anew for other numbers
        )
        if job.compiled:  # CUDA graphs write the next result over this one
            moved = copied(moved)
        self.cache.move_to(column + 1)
        self._keep_thoughts(None, self.state, moved)
        self.embeds, self.position, self.state = moved.embeds, moved.position, moved.state
        for buffer, fed in zip(self.trace, moved.fed, strict=True):
            buffer[:, column + 1] = fed
        self.steps += 1

    def harvest(self) -> list[Finished]:
        """Return the rows that are done and free their slots."""
        full = self.cache.column + 1 == self.cache.capacity
        if self.steps % self.look_every and not full:
            return []
        done = thinking.answer_phase(self.job.spec) + 1
        phases = self.state.phase.tolist()
        slots = [slot for slot in self.live() if phases[slot] == done]
        if not slots:
            return []
        first = min(self.begin[slot] + self.width[slot] for slot in slots)
        where = torch.tensor(slots, device=self.device)
        ids, weights = (b[:, first : self.cache.column + 1].index_select(0, where).cpu() for b in self.trace)
        num_steps, num_answer = self.state.num_steps.tolist(), self.state.num_answer.tolist()
        finished = []
        for row, slot in enumerate(slots):
            problem = self.problems[slot]
            assert problem is not None
            start = self.begin[slot] + self.width[slot] - first
            fed = Superposition(ids[row, start:], weights[row, start:])
            thoughts = None if self.thoughts is None else self.thoughts[slot, :-1].clone().float().cpu()
            finished.append(Finished(problem, fed, num_steps[slot], num_answer[slot], thoughts))
            self.noise.forget(problem)
            self.problems[slot] = None
        return finished

    def tidy(self, more: bool) -> None:
        """Give up columns that no row uses and, where nothing is left to come, slots that no row uses."""
        live = self.live()
        if not live or self.job.static:
            return
        few = not more and 2 * len(live) <= len(self.problems)
        unused = min(self.begin[slot] for slot in live)
        if few or unused >= max(WASTE, (self.cache.column - unused) // 2):
            self._pack(rows=live if few else None)

    def _pack(self, rows: list[int] | None = None, grow: bool = False) -> None:
        """Move everything to the left; drop all slots but `rows`; with `grow`, more columns if that gave too few."""
        cache = self.cache
        first = min(self.begin[slot] for slot in self.live())
        capacity = cache.capacity
        if grow and first < max(1, capacity // 4):
            capacity = min(self.most, 2 * capacity)
        where = None if rows is None else torch.tensor(rows, device=self.device)
        last = cache.column + 1
        self.trace = Superposition(*(repacked(b, 1, where, first, last, capacity) for b in self.trace))
        self.visible = repacked(self.visible, 1, where, first, last - 1, capacity)
        cache.repack(where, first, capacity)
        self.visible[:, cache.column :] = torch.finfo(self.visible.dtype).min
        if rows is not None:
            assert where is not None
            self.state = ThinkState(*(t[where] for t in self.state))
            self.embeds, self.position = self.embeds[where], self.position[where]
            self.thoughts = None if self.thoughts is None else self.thoughts[where]
            self.problems = [self.problems[slot] for slot in rows]
            self.width = [self.width[slot] for slot in rows]
            self.begin = [self.begin[slot] for slot in rows]
        self.begin = [begin - first for begin in self.begin]
