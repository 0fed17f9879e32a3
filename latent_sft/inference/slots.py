"""Decoding in slots: a batch of fixed width whose rows start and end at different times.

All slots share one column of the cache (see `inference.cache`). A row that ends leaves its slot; several free slots are
filled together with requests from the queue. What is fed at a column is kept in a trace beside the cache, so a finished
row is cut out of it in one piece. When the column reaches the end of the buffers, everything moves to the left; where a
prompt is longer than any row in work, to the right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_sft.inference.advance import DecodeConfig, StepOutput, advance, copied, follow, last_states
from latent_sft.inference.cache import Reading, SlotCache, Windows, prompt_mask, repacked
from latent_sft.inference.jacobi import said, think_at_once
from latent_sft.inference.noise import Noise
from latent_sft.method.masks import to_additive
from latent_sft.method.thinking import Limits, ThinkState, answer_phase
from latent_sft.method.types import Superposition
from latent_sft.models.backbone import embed, unwrap_peft

PREFILL_TOKENS = 16384  # of prompts read at once; their attention mask is `[n, 1, W, W]`
FIRST_COLUMNS = 64  # beyond the longest prompt; buffers grow by doubling, since few rows need all they may
# a quarter of the slots is filled at once: reading a few prompts costs nearly as much as reading many. A model of 20M
# parameters with 64 slots on a CPU took 13 % less time per problem than filling each slot at once; half gave 2 % more
ADMIT = 4
# moving everything to the left pays where this many columns, and half as many as are in use, are empty for all rows
WASTE = 32
# numbers of slots and columns that a process compiles for; torch gives up after 8 and says so in its log only
COMPILED = 64
# steps between two looks at which rows have finished: a look makes the host wait for the device
LOOK_EVERY = {"cpu": 1}
LOOK_EVERY_ELSEWHERE = 4


class Request(NamedTuple):
    """What is waiting for a slot.

    Attributes:
        number: of the request; decides its draws.
        prompt: token ids.
        latents: given in place of thinking, see `generate`; None where the row thinks.
        size: columns of its prefix: prompt, given latents and `</think>` behind them.
        phase: in which its row starts.
        limits: of its row.
    """

    number: int
    prompt: list[int]
    latents: Any
    size: int
    phase: int
    limits: Limits


class Finished(NamedTuple):
    """A row that is done, or how far it got: request, all it was fed `[T, K]`, latents or tokens, and answer tokens.

    Of thoughts in hidden states `fed` holds what they say, and `thoughts` `[M, D]` what was fed.
    """

    number: int
    fed: Superposition
    num_steps: int
    num_answer: int
    thoughts: Tensor | None


class Slots:
    """The rows in work.

    Attributes:
        count: slots at most.
        requests: the number of the request in each slot, or None.
        begin: first column of each slot's row.
        width: columns of its prompt.
        thoughts: `[S, M + 1, D]` thoughts in hidden states of each slot; the last place is for what is none.
    """

    def __init__(self, config: DecodeConfig, count: int) -> None:
        self.config, self.thinking = config, config.thinking
        lm = unwrap_peft(config.model)
        self.device = lm.get_input_embeddings().weight.device  # of a model that is spread over several, too
        self.count, count = count, count if config.static else 1
        # rows that run as long as they may would otherwise have everything moved at every step
        self.most = config.longest + WASTE
        capacity = self.most if config.static else min(self.most, FIRST_COLUMNS)
        self.cache = SlotCache(count, capacity, config.static, self.device)
        self.windows = Windows(lm, config.longest)
        noisy = config.sampling is not None and config.sampling.latent_noise
        self.noise = Noise(config.sampling, self.thinking.num_draws(noisy), self.device)
        self.done = answer_phase(self.thinking.spec) + 1
        self.requests: list[int | None] = [None] * count
        self.begin, self.width = [0] * count, [0] * count
        self.embeds = embed(config.model, torch.zeros(count, 1, dtype=torch.long, device=self.device))
        dtype = self.embeds.dtype
        self.visible = torch.full((count, capacity), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        kept = self.thinking.kept
        self.trace = Superposition(
            torch.zeros(count, capacity, kept, dtype=torch.long, device=self.device),
            torch.zeros(count, capacity, kept, device=self.device),
        )
        self.state = self.thinking.start([self.done] * count)
        self.position = torch.zeros(count, 1, dtype=torch.long, device=self.device)
        self.thoughts: Tensor | None = None
        if self.thinking.thoughts is not None:
            self.thoughts = self.embeds.repeat(1, self.thinking.most_steps + 1, 1)
        self.steps = 0
        self.look_every = LOOK_EVERY.get(self.device.type, LOOK_EVERY_ELSEWHERE)
        self.advance: Callable[..., StepOutput] = advance
        if config.compiled:
            patched = torch._dynamo.config.patch(cache_size_limit=COMPILED)
            self.advance = patched(torch.compile(advance, mode="reduce-overhead", dynamic=False))

    def live(self) -> list[int]:
        """Return the slots in work."""
        return [slot for slot, number in enumerate(self.requests) if number is not None]

    def admit(self, queue: deque[Request], prefix: Callable[[list[Request]], tuple[Tensor, Tensor]]) -> None:
        """Read requests of the queue into free slots, where enough are free for it to pay.

        Args:
            queue: in the order in which they are read. With the longest first, nothing ever moves to the right.
            prefix: requests -> left-padded `[n, W, D]` and which of it is real `[n, W]`.
        """
        self._widen(len(self.live()) + len(queue))
        free = [slot for slot, number in enumerate(self.requests) if number is None]
        slots = len(self.requests)
        if not queue or len(free) < min(len(queue), -(-slots // ADMIT)):
            return
        if len(free) == slots:
            self.cache.move_to(0)
        while free and queue:
            count = min(len(free), len(queue))
            count = min(count, max(1, PREFILL_TOKENS // max(queue[i].size for i in range(count))))
            chosen = [queue.popleft() for _ in range(count)]
            self._open(max(request.size for request in chosen))
            self._read(free[:count], chosen, *prefix(chosen))
            free = free[count:]

    def cancel(self, number: int) -> None:
        """Free the slot of a request, if it has one; what is left of its row is computed and ignored."""
        self.requests = [None if own == number else own for own in self.requests]
        self.noise.forget(number)

    def _read(self, slots: list[int], requests: list[Request], embeds: Tensor, real: Tensor) -> None:
        column, width = self.cache.column, embeds.shape[1]
        where = torch.tensor(slots, device=self.device)
        lengths = real.sum(1)
        position = (real.cumsum(1) - 1).clamp(min=0)
        numbers = [request.number for request in requests]
        draws = self.noise.settings(numbers), *self.noise.draw(numbers)
        before = self.thinking.start([r.phase for r in requests], [r.limits for r in requests])
        if self.thinking.at_once:
            before = before._replace(num_steps=before.num_steps + self.thinking.at_once)
            output = self._think_at_once(where, embeds, real, position, before, draws[:2], numbers)
            lengths = lengths - self.thinking.at_once - len(self.thinking.spec.end_think_ids)
        else:
            mask = self._prompt_mask(real, embeds.dtype, 0, width)
            self.cache.reading = Reading(where, column - width, column - width)
            output = advance(self.config, self.cache, embeds, position, mask, before, *draws, numbers)
            self._keep_thoughts(where, before, output)
        self.cache.reading = None
        lowest = torch.finfo(embeds.dtype).min
        row = torch.full((len(slots), self.cache.capacity), lowest, dtype=embeds.dtype, device=self.device)
        row[:, column - width : column] = to_additive(real, embeds.dtype)
        self.visible.index_copy_(0, where, row)
        self.embeds.index_copy_(0, where, output.embeds)
        self.position.index_copy_(0, where, output.position)
        self.state = ThinkState(*(o.index_copy(0, where, n) for o, n in zip(self.state, output.state, strict=True)))
        for buffer, fed in zip(self.trace, output.fed, strict=True):
            buffer[:, column].index_copy_(0, where, fed.to(buffer.dtype))
        columns = zip(real.sum(1).tolist(), lengths.tolist(), strict=True)
        for slot, number, (whole, prompt) in zip(slots, numbers, columns, strict=True):
            self.requests[slot], self.begin[slot], self.width[slot] = number, column - whole, prompt

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
        draws: tuple[Any, Tensor | None],
        numbers: list[int],
    ) -> StepOutput:
        """Read prompts and think all their latents; these and `</think>` end up in the trace as if fed in steps."""
        thinking, first = self.thinking, self.cache.column - embeds.shape[1]
        assert self.thoughts is not None

        def read(inputs: Tensor, begin: int) -> Tensor:
            end = begin + inputs.shape[1]
            self.cache.reading = Reading(where, first, first + begin)
            mask = self._prompt_mask(real, embeds.dtype, begin, end)
            return last_states(self.config.model, self.cache, inputs, position[:, begin:end], mask)

        end = thinking.tokens[: answer_phase(thinking.spec)]
        thought = think_at_once(thinking.thoughts, embeds, len(end), read)
        latents = said(self.config.model, thinking, thought.states)
        count, stop = thought.inputs.shape[1], self.cache.column
        self.thoughts[where, :count] = thought.inputs
        ids, weights = self.trace
        start = stop - count - len(end)
        for buffer, values in zip(self.trace, latents, strict=True):
            buffer[where, start : start + count] = values.to(buffer.dtype)
        ids[where, start + count : stop] = end[:, None]
        weights[where, start + count : stop] = thinking.one
        return follow(self.config, thought.hidden, position[:, -1:], state, *draws, numbers)

    def _keep_thoughts(self, where: Tensor | None, before: ThinkState, output: StepOutput) -> None:
        """Store the hidden states that rows (None: all) are fed next."""
        if self.thoughts is None:
            return
        rows = torch.arange(len(self.thoughts), device=self.device) if where is None else where
        thinks = output.state.num_steps > before.num_steps
        place = torch.where(thinks, before.num_steps, self.thoughts.shape[1] - 1)
        self.thoughts[rows, place] = output.embeds[:, 0]

    def step(self) -> None:
        """Feed every slot once; where none is in work, that changes nothing."""
        if not self.live():
            self.cache.move_to(0)
        if self.cache.column + 1 == self.cache.capacity:
            self._pack(grow=True)
        column, config = self.cache.column, self.config
        self.visible[:, column] = 0
        columns = self.cache.capacity if config.static else column + 1
        visible = self.visible[:, None, None, :columns]
        mask: Tensor | dict[str, Tensor] = visible
        if self.windows.size:
            mask = self.windows.masks(visible, column - torch.arange(columns, device=self.device)[None])
        if config.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        output = self.advance(
            config,
            self.cache,
            self.embeds,
            self.position,
            mask,
            self.state,
            self.noise.settings(self.requests),
            *self.noise.draw(self.requests),
            # compiled code would be made anew for other numbers
            () if config.write is None and config.watch is None else self.requests,
        )
        if config.compiled:  # CUDA graphs write the next result over this one
            output = copied(output)
        self.cache.move_to(column + 1)
        self._keep_thoughts(None, self.state, output)
        self.embeds, self.position, self.state = output.embeds, output.position, output.state
        for buffer, fed in zip(self.trace, output.fed, strict=True):
            buffer[:, column + 1] = fed
        self.steps += 1

    def collect_finished(self) -> list[Finished]:
        """Return the rows that are done and free their slots."""
        full = self.cache.column + 1 == self.cache.capacity
        if self.steps % self.look_every and not full:
            return []
        phases = self.state.phase.tolist()
        finished = self.rows([slot for slot in self.live() if phases[slot] == self.done])
        for row in finished:
            self.cancel(row.number)
        return finished

    def rows(self, slots: list[int]) -> list[Finished]:
        """Return what rows in work were fed so far, and what they are fed next."""
        if not slots:
            return []
        first = min(self.begin[slot] + self.width[slot] for slot in slots)
        where = torch.tensor(slots, device=self.device)
        ids, weights = (b[:, first : self.cache.column + 1].index_select(0, where).cpu() for b in self.trace)
        num_steps, num_answer = self.state.num_steps.tolist(), self.state.num_answer.tolist()
        finished = []
        for row, slot in enumerate(slots):
            number = self.requests[slot]
            assert number is not None
            start = self.begin[slot] + self.width[slot] - first
            fed = Superposition(ids[row, start:], weights[row, start:])
            thoughts = None if self.thoughts is None else self.thoughts[slot, :-1].clone().float().cpu()
            finished.append(Finished(number, fed, num_steps[slot], num_answer[slot], thoughts))
        return finished

    def compact(self, spare: int) -> None:
        """Give up columns that no row uses, and such slots where `spare` times the rows fit into all (0: keep them)."""
        live = self.live()
        if not live or self.config.static:
            return
        few = 0 < spare * len(live) <= len(self.requests)
        unused = min(self.begin[slot] for slot in live)
        if few or unused >= max(WASTE, (self.cache.column - unused) // 2):
            self._pack(rows=live if few else None)

    def _widen(self, rows: int) -> None:
        """Make more slots, a power of two, where so many rows have none; what is in new ones does not count."""
        slots, wanted = len(self.requests), min(self.count, 1 << (rows - 1).bit_length()) if rows else 0
        if wanted > slots:
            self._move(0, self.cache.capacity, [*range(slots), *[0] * (wanted - slots)])
            self.requests[slots:] = [None] * (wanted - slots)

    def _pack(self, rows: list[int] | None = None, grow: bool = False) -> None:
        """Move everything to the left; drop all slots but `rows`; with `grow`, more columns if that gave too few."""
        first, capacity = min(self.begin[slot] for slot in self.live()), self.cache.capacity
        if grow and first < max(1, capacity // 4):
            capacity = min(self.most, 2 * capacity)
        self._move(first, capacity, rows)

    def _open(self, width: int) -> None:
        """Move everything to the right where a prompt of `width` tokens does not fit left of the column."""
        column, capacity = self.cache.column, self.cache.capacity
        if column < width:
            self._move(column - width, capacity if width < capacity else min(self.most, width + FIRST_COLUMNS))

    def _move(self, first: int, capacity: int, rows: list[int] | None = None) -> None:
        """Let column `first` (below 0: a new one) become the first of `capacity`; keep some slots (None: all)."""
        where = None if rows is None else torch.tensor(rows, device=self.device)
        last, lowest = self.cache.column + 1, torch.finfo(self.visible.dtype).min
        self.trace = Superposition(*(repacked(b, 1, where, first, last, capacity) for b in self.trace))
        self.visible = repacked(self.visible, 1, where, first, last - 1, capacity)
        self.cache.repack(where, first, capacity)
        self.visible[:, self.cache.column :] = lowest
        self.visible[:, : max(-first, 0)] = lowest
        if rows is not None:
            assert where is not None
            self.state = ThinkState(*(t[where] for t in self.state))
            self.embeds, self.position = self.embeds[where], self.position[where]
            self.thoughts = None if self.thoughts is None else self.thoughts[where]
            self.requests = [self.requests[slot] for slot in rows]
            self.width = [self.width[slot] for slot in rows]
            self.begin = [self.begin[slot] for slot in rows]
        self.begin = [begin - first for begin in self.begin]
