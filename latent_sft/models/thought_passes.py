"""How a model reads a prompt, thinks in hidden states and reads on; every part once, whatever needs it afterwards.

    z_1 = f(h of the last prompt token)                                                          f: models.thoughts
    sequential  z_{i+1} = f(h of z_i), one latent a pass
    parallel    T passes over all M latents, causal: inputs of the next are z_1, f(h of latents 1..M-1)
                the first pass is that over the prompt, with M placeholders E behind it; z_1 never changes
    looped      the same with the inputs E + f(h of latents 1..M)                                  (`added`)

What comes after the latents reads the keys and values of the last pass over them. T = 0 leaves those of the
placeholders (pause tokens). T >= M is the sequential way, since latent i is final after i passes.

A pass runs the decoder over some columns, which see the keys and values that earlier passes left as plain tensors:

    read    [P (+ placeholders)]        leaves the prompt's
    think   [z_1 .. z_M]                sees the prompt's, leaves the latents'
    answer  [E A]                       sees both

Not a transformers Cache, which is off under gradient checkpointing. There (not re-entrant) the tensors taken in the
forward pass belong to its graph; while activations are recomputed nothing is taken any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from latent_sft.errors import ConfigError, TrainingError
from latent_sft.method.attention import softcapped
from latent_sft.method.kv_distill import attention_logits
from latent_sft.method.types import ThoughtSpec
from latent_sft.models.attention import planned, use_plans
from latent_sft.models.backbone import check_window, embed, unwrap_peft
from latent_sft.models.thoughts import Thoughts, iterate, placeholders


class Piece(NamedTuple):
    """Keys and values of some columns, one `[B, H_kv, S, d]` a layer, and which columns are real `[B, S]`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    real: Tensor

    def part(self, start: int, stop: int) -> Piece:
        """Return columns `start` to `stop`, without copying."""
        keys, values = (tuple(x[:, :, start:stop] for x in states) for states in (self.keys, self.values))
        return Piece(keys, values, self.real[:, start:stop])


class Watch(NamedTuple):
    """Queries whose attention is wanted.

    Attributes:
        columns: `[B, Q]` columns of the pass they are in.
        pooling: see `method.kv_distill.attention_logits`.
        total: also the logarithm of the softmax's denominator over everything they see.
    """

    columns: Tensor
    pooling: str
    total: bool


class Watched(NamedTuple):
    """What a layer left of the watched queries, detached: `query` `[B, H, Q, d]`, the scores' `scale` and `softcap`,
    and `log_total` `[B, H_kv, G, Q]` or None."""

    query: Tensor
    scale: float | None
    softcap: float | None
    log_total: Tensor | None


class Result(NamedTuple):
    """What a pass leaves.

    Attributes:
        hidden: `[B, S, D]` after the final norm.
        layers: `[B, S, D]` of the embedding and of every layer (the last one after the final norm), or empty.
        piece: keys and values of the columns, keys as a cache holds them.
        watched: one a layer, or empty.
    """

    hidden: Tensor
    layers: tuple[Tensor, ...]
    piece: Piece
    watched: dict[int, Watched]


class Pass:
    """The attention plan of one pass: what its layers are given, and where they leave theirs, by `layer_idx`."""

    def __init__(self, prefix: Sequence[Piece], mask: Tensor | None, watch: Watch | None) -> None:
        self.prefix, self.mask, self.watch = tuple(prefix), mask, watch
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.watched: dict[int, Watched] = {}
        self.over = False  # layers that are run again, for their gradients, leave nothing

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        dropout: float,
        softcap: float | None,
    ) -> Tensor:
        """Compute a layer's attention; see `attention.Plan`."""
        if not self.over:
            self.keys[layer], self.values[layer] = key, value
        if self.prefix:
            key = torch.cat([*(piece.keys[layer] for piece in self.prefix), key], dim=2)
            value = torch.cat([*(piece.values[layer] for piece in self.prefix), value], dim=2)
        if self.watch is not None and not self.over:
            self.watched[layer] = _watched(self.watch, self.mask, query.detach(), key.detach(), scale, softcap)
        if softcap is not None:
            return softcapped(query, key, value, self.mask, scale, dropout, softcap)
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and self.mask is not None:  # fused kernels take a mask or grouped heads, not both
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask,
            dropout_p=dropout,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def use_thoughts(model: nn.Module) -> None:
    """Prepare a causal LM for these passes; whole sequences and decoding work as before.

    Raises:
        ConfigError: the model's attention does not go through transformers' interface.
    """
    if not use_plans(model):
        raise ConfigError(
            f"model: {type(unwrap_peft(model)).__name__} does not use transformers' attention interface, which "
            "training with thoughts in hidden states goes through. Use another model, or turn those stages off."
        )


def run(
    model: nn.Module,
    embeds: Tensor,
    position: Tensor,
    real: Tensor,
    prefix: Sequence[Piece] = (),
    *,
    gaps: bool = False,
    watch: Watch | None = None,
    layers: bool = False,
) -> Result:
    """Run the decoder over some columns.

    Args:
        model: causal LM prepared by `use_thoughts`, possibly wrapped by PEFT.
        embeds: `[B, S, D]` input embeddings.
        position: `[B, S]` position ids.
        real: `[B, S]` which columns are real; what stands in others is never seen.
        prefix: what earlier passes left, seen by every column.
        gaps: columns that are not real stand between real ones, not only behind them.
        watch: queries whose attention is wanted.
        layers: keep the hidden states of all layers.

    Raises:
        TrainingError: a layer did not leave its keys and values.
    """
    given = Pass(prefix, _mask(real, prefix, gaps), watch)
    out = planned(model, embeds, position, given, output_hidden_states=layers)
    given.over = True
    count = unwrap_peft(model).config.get_text_config().num_hidden_layers
    states = out.hidden_states if layers else ()
    complete = sorted(given.keys) == list(range(count)) and (watch is None or len(given.watched) == count)
    if not complete or (layers and len(states or ()) != count + 1):
        raise TrainingError(
            f"model: {len(given.keys)} of {count} layers of {type(unwrap_peft(model)).__name__} left their "
            "keys, values and states; distilling them would train nothing. The model needs use_thoughts, and layers "
            "that call transformers' attention interface in the forward pass."
        )
    piece = Piece(
        tuple(given.keys[layer] for layer in range(count)), tuple(given.values[layer] for layer in range(count)), real
    )
    return Result(out.last_hidden_state, tuple(states), piece, given.watched)


class Prompt(NamedTuple):
    """A prompt that was read.

    Attributes:
        piece: its keys and values.
        last: `[B, D]` hidden state of its last token.
        length: `[B]`.
        waiting: of the pass with the placeholders in it: hidden states `[B, M, D]`, keys and values, or None.
    """

    piece: Piece
    last: Tensor
    length: Tensor
    waiting: tuple[Tensor, Piece] | None


class Thought(NamedTuple):
    """Latents that were thought.

    Attributes:
        pieces: their keys and values, in order, one piece a pass or one for all.
        inputs: `[B, N, D]` what the last pass over each latent read; N = 0 where there was none.
        last: `[B, D]` hidden state of the last latent (of the prompt, where a row has none).
        position: `[B]` position id of what comes next.
        passes: `[B, N, D]` hidden states of every pass over all of them, that over placeholders first; empty where they
            were thought one after another.
    """

    pieces: tuple[Piece, ...]
    inputs: Tensor
    last: Tensor
    position: Tensor
    passes: tuple[Tensor, ...] = ()


def read(
    lm: nn.Module, ids: Tensor, length: Tensor, thoughts: Thoughts | None = None, spec: ThoughtSpec | None = None
) -> Prompt:
    """Read right-padded prompts, with `thoughts` with its M placeholders behind them in the same pass.

    Args:
        lm: prepared by `use_thoughts`.
        ids: `[B, P]`.
        length: `[B]` tokens of each prompt, at least 1.
        thoughts: whose placeholders; None reads the prompt alone.
        spec: M, where it is not that of `thoughts`.
    """
    batch, columns = ids.shape
    at = torch.arange(columns, device=ids.device).expand(batch, -1)
    embeds, real = embed(lm, ids), at < length[:, None]
    if thoughts is None:
        result = run(lm, embeds, at, real)
        return Prompt(result.piece, _at(result.hidden, length - 1), length, None)
    count = (spec or thoughts.spec).num_latents
    behind = length[:, None] + torch.arange(count, device=ids.device)
    embeds = torch.cat([embeds, placeholders(thoughts, batch, count).to(embeds.dtype)], dim=1)
    at, real = torch.cat([at, behind], dim=1), torch.cat([real, torch.ones_like(behind, dtype=torch.bool)], dim=1)
    result = run(lm, embeds, at, real, gaps=True)
    waiting = result.hidden[:, columns:], result.piece.part(columns, columns + count)
    return Prompt(result.piece.part(0, columns), _at(result.hidden, length - 1), length, waiting)


def think_in_turn(lm: nn.Module, thoughts: Thoughts, prompt: Prompt, real: Tensor) -> Thought:
    """Think one latent after another.

    Args:
        lm: prepared by `use_thoughts`.
        thoughts: f.
        prompt: see `read`.
        real: `[B, N]` which latents a row has, none behind a missing one; N passes are made for all.
    """
    pieces, fed, hidden, last = list[Piece](), [prompt.last[:, None][:, :0]], prompt.last, prompt.last
    for i in range(real.shape[1]):
        inputs = thoughts(hidden)[:, None]
        position = _within(prompt.length + i, real[:, i])[:, None]
        done = run(lm, inputs, position, real[:, i : i + 1], (prompt.piece, *pieces))
        pieces.append(done.piece)
        fed.append(inputs)
        hidden = done.hidden[:, 0]
        last = torch.where(real[:, i, None], hidden, last)
    return Thought(tuple(pieces), torch.cat(fed, dim=1), last, prompt.length + real.sum(1))


def think_at_once(lm: nn.Module, thoughts: Thoughts, prompt: Prompt, spec: ThoughtSpec | None = None) -> Thought:
    """Think M latents in T iterations; `prompt` was read with the placeholders, and with `spec` if it is given here."""
    assert prompt.waiting is not None
    spec = spec or thoughts.spec
    hidden, piece = prompt.waiting
    passes = [hidden]
    position = prompt.length[:, None] + torch.arange(spec.num_latents, device=hidden.device)

    def again(inputs: Tensor, final: bool) -> Tensor:
        nonlocal piece
        hidden, _, piece, _ = run(lm, inputs, position, piece.real, [prompt.piece])
        passes.append(hidden)
        return hidden

    inputs, _, hidden = iterate(thoughts, prompt.last, hidden, again, spec)
    inputs = hidden[:, :0] if inputs is None else inputs
    last = hidden[:, -1] if spec.num_latents else prompt.last
    return Thought((piece,), inputs, last, prompt.length + spec.num_latents, tuple(passes))


def read_on(
    lm: nn.Module, ids: Tensor, length: Tensor, position: Tensor, prefix: tuple[Piece, ...], **options: Any
) -> Result:
    """Read right-padded tokens after what was read or thought before.

    Args:
        lm: prepared by `use_thoughts`.
        ids: `[B, S]`.
        length: `[B]` tokens of each row.
        position: `[B]` position id of the first one.
        prefix: what it sees.
        options: of `run`.
    """
    at = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    real = at < length[:, None]
    return run(lm, embed(lm, ids), _within(position[:, None] + at, real), real, prefix, **options)


def labelled(last: Tensor, result: Result, index: Tensor) -> Tensor:
    """Return hidden states `[M, D]` at `index` into `[B, 1 + S]`: the state before a pass, then its columns'."""
    return torch.cat([last[:, None], result.hidden], dim=1).flatten(0, 1)[index]


def check_length(lm: nn.Module, columns: int) -> None:
    """Refuse sequences longer than a sliding window; `columns` is the longest a row of the batch can be."""
    check_window(unwrap_peft(lm), columns, "thinking", "Thoughts in hidden states are trained under")


def _within(position: Tensor, real: Tensor) -> Tensor:
    # a table of positions (GPT-2) ends somewhere, and padding must not lie behind it
    return torch.where(real, position, 0)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


@torch.no_grad()
def _watched(
    watch: Watch, mask: Tensor | None, query: Tensor, key: Tensor, scale: float | None, softcap: float | None
) -> Watched:
    columns = watch.columns[:, None, :, None]
    chosen = query.gather(2, columns.expand(-1, query.shape[1], -1, query.shape[3]))
    if not watch.total:
        return Watched(chosen, scale, softcap, None)
    logits = attention_logits(chosen, key, scale, softcap, watch.pooling)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    sees = mask.expand(len(columns), 1, -1, -1).gather(2, columns.expand(-1, 1, -1, key.shape[2]))
    return Watched(chosen, scale, softcap, logits.masked_fill(~sees[:, :, None], float("-inf")).logsumexp(-1))


def _mask(real: Tensor, prefix: Sequence[Piece], gaps: bool) -> Tensor | None:
    # [B, 1, S, prefix + S], True = may attend; None is plain causal attention
    if not prefix and not gaps:
        return None
    length = real.shape[1]
    own = torch.ones(length, length, dtype=torch.bool, device=real.device).tril().expand(len(real), -1, -1)
    if gaps:  # a column always sees itself, or those in front of the first real one would see nothing
        own = (own & real[:, None]) | torch.eye(length, dtype=torch.bool, device=real.device)
    before = [piece.real[:, None].expand(-1, length, -1) for piece in prefix]
    return torch.cat([*before, own], dim=2)[:, None]
