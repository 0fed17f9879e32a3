"""Decoding in slots: a batch of fixed width whose rows start and end at different times.

All slots share one column of the cache (see `inference.cache`). A row that ends leaves its slot; several free slots are
filled together with problems from the queue. What is fed at a column is kept in a trace beside the cache, so a finished
row is cut out of it in one piece. When the column reaches the end of the buffers, everything moves to the left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latent_sft.inference.cache import SlotCache, Windows, prompt_mask, repacked
from latent_sft.inference.noise import Noise, Sampling, sample
from latent_sft.method import thinking
from latent_sft.method.masks import to_additive
from latent_sft.method.thinking import ThinkState
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import core, embed, mix_latents

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


class Job(NamedTuple):
    """What is the same for all problems of a call.

    Attributes:
        model: causal LM, perhaps wrapped by PEFT.
        spec: settings.
        latent: feed superpositions; otherwise tokens.
        phase: in which rows start.
        max_cot_tokens: cap of explicit thinking.
        longest: most columns a row may take.
        sampling: None is greedy.
        static: buffers of full size from the start, and the same shapes at every step.
        compiled: compile the step.
    """

    model: nn.Module
    spec: LatentSpec
    latent: bool
    phase: int
    max_cot_tokens: int
    longest: int
    sampling: Sampling | None
    static: bool
    compiled: bool


class Moved(NamedTuple):
    """What a step gives: what rows are fed next (`[B, K]`, `[B, 1, D]` at `[B, 1]`), and their state."""

    fed: Superposition
    embeds: Tensor
    position: Tensor
    state: ThinkState


class Finished(NamedTuple):
    """A row that is done: its problem, everything it was fed `[T, K]`, latents or tokens, and answer tokens."""

    problem: int
    fed: Superposition
    num_steps: int
    num_answer: int


class Slots:
    """The rows in work.

    Attributes:
        problems: the problem in each slot, or None.
        begin: first column of each slot's row.
        width: columns of its prompt.
    """

    def __init__(self, job: Job, count: int, longest_prompt: int) -> None:
        self.job = job
        lm = core(job.model)
        self.device = lm.device
        # rows that run as long as they may would otherwise have everything moved at every step
        self.most = job.longest + WASTE
        capacity = self.most if job.static else min(self.most, longest_prompt + FIRST_COLUMNS)
        self.cache = SlotCache(count, capacity, job.static, self.device)
        self.windows = Windows(lm, job.longest)
        self.noise = Noise(job.sampling, job.spec, job.latent, self.device)
        self.script = thinking.script_of(job.spec, self.device)
        self.problems: list[int | None] = [None] * count
        self.begin, self.width = [0] * count, [0] * count
        kept = job.spec.top_k if job.latent else 1
        self.embeds = embed(job.model, torch.zeros(count, 1, dtype=torch.long, device=self.device))
        dtype = self.embeds.dtype
        self.visible = torch.full((count, capacity), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        self.trace = Superposition(
            torch.zeros(count, capacity, kept, dtype=torch.long, device=self.device),
            torch.zeros(count, capacity, kept, device=self.device),
        )
        self.state = thinking.start(count, job.spec, self.device, thinking.answer_phase(job.spec) + 1)
        self.position = torch.zeros(count, 1, dtype=torch.long, device=self.device)
        self.steps = 0
        self.look_every = LOOK_EVERY.get(self.device.type, LOOK_EVERY_ELSEWHERE)
        self.advance: Callable[..., Moved] = _advance
        if job.compiled:
            self.advance = torch.compile(_advance, mode="reduce-overhead", dynamic=False)

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
        column, width = self.cache.column, embeds.shape[1]
        where = torch.tensor(slots, device=self.device)
        lengths = real.sum(1)
        ages = torch.arange(width, device=self.device)
        mask = self.windows.masks(prompt_mask(real, embeds.dtype), ages[:, None] - ages[None])
        position = (real.cumsum(1) - 1).clamp(min=0)
        state = thinking.start(len(slots), self.job.spec, self.device, self.job.phase)
        self.cache.prompts = (where, width)
        moved = _advance(self.job, self.script, self.cache, embeds, position, mask, state, *self.noise.draw(problems))
        self.cache.prompts = None
        lowest = torch.finfo(embeds.dtype).min
        row = torch.full((len(slots), self.cache.capacity), lowest, dtype=embeds.dtype, device=self.device)
        row[:, column - width : column] = to_additive(real, embeds.dtype)
        self.visible.index_copy_(0, where, row)
        self.embeds.index_copy_(0, where, moved.embeds)
        self.position.index_copy_(0, where, moved.position)
        self.state = ThinkState(*(o.index_copy(0, where, n) for o, n in zip(self.state, moved.state, strict=True)))
        for buffer, fed in zip(self.trace, moved.fed, strict=True):
            buffer[:, column].index_copy_(0, where, fed.to(buffer.dtype))
        for slot, problem, length in zip(slots, problems, lengths.tolist(), strict=True):
            self.problems[slot], self.begin[slot], self.width[slot] = problem, column - length, length

    def step(self) -> None:
        """Feed every slot once."""
        if self.cache.column + 1 == self.cache.capacity:
            self._pack(grow=True)
        column, job = self.cache.column, self.job
        self.visible[:, column] = 0
        columns = self.cache.capacity if job.static else column + 1
        mask = self.visible[:, None, None, :columns]
        if self.windows.size:
            mask = self.windows.masks(mask, column - torch.arange(columns, device=self.device)[None])
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
        )
        if job.compiled:  # CUDA graphs write the next result over this one
            moved = _copied(moved)
        self.cache.move_to(column + 1)
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
            finished.append(Finished(problem, fed, num_steps[slot], num_answer[slot]))
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
            self.problems = [self.problems[slot] for slot in rows]
            self.width = [self.width[slot] for slot in rows]
            self.begin = [self.begin[slot] for slot in rows]
        self.begin = [begin - first for begin in self.begin]


def _advance(
    job: Job,
    script: thinking.Script,
    cache: SlotCache,
    embeds: Tensor,
    position: Tensor,
    mask: Any,
    state: ThinkState,
    token_noise: Tensor | None,
    latent_noise: Tensor | None,
) -> Moved:
    """Run the model on `[B, T, D]` and choose what each row is fed next; pure but for the cache."""
    out = core(job.model)(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[:, -1]
    answers = None
    if token_noise is not None:
        assert job.sampling is not None
        answers = sample(logits, token_noise, job.sampling)
    if job.latent:
        fed, after = thinking.latent_step(logits, state, job.spec, script, answers, latent_noise)
        following = mix_latents(job.model, fed)[:, None]
    else:
        fed, after = thinking.explicit_step(logits, state, job.spec, script, job.max_cot_tokens, answers)
        following = embed(job.model, fed.ids)
    # a row that is done stays where it is, or its position would leave what the model knows
    working = (after.phase <= thinking.answer_phase(job.spec))[:, None]
    return Moved(fed, following.to(embeds.dtype), position[:, -1:] + working, after)


def _copied(moved: Moved) -> Moved:
    return Moved(
        Superposition(*(t.clone() for t in moved.fed)),
        moved.embeds.clone(),
        moved.position.clone(),
        ThinkState(*(t.clone() for t in moved.state)),
    )
