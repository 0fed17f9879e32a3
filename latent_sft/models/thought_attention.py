"""Forward passes over parts of a sequence that hand on keys and values as plain tensors, for any Hugging Face decoder.

A pass runs the decoder over some columns; they see, beside each other, the keys and values that earlier passes left:

    read    [P (+ placeholders)]        leaves the prompt's
    think   [z_1 .. z_M]                sees the prompt's, leaves the latents'
    answer  [E A]                       sees both

Not a transformers Cache: that one is switched off under gradient checkpointing, and gradients have to run through it.
An attention function of ours (transformers' AttentionInterface) gets a `Pass` as a keyword argument, which says what to
put in front and takes what the layer computed. Under gradient checkpointing (not re-entrant) the tensors taken in the
forward pass belong to its graph; while activations are recomputed nothing is taken any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from latent_sft.errors import ConfigError, TrainingError
from latent_sft.method.attention import softcapped
from latent_sft.method.kv_distill import attention_logits
from latent_sft.models.backbone import core
from latent_sft.models.plain_attention import plain_attention, refuse_sinks

THOUGHTS = "latent_sft_thoughts"
ARGUMENT = "thought_pass"


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
        turned: cosine and sine `[B, S, d_rot]` that a layer rotated its keys by, where `rotation.watch_rotation` was
            called.
        watched: one a layer, or empty.
    """

    hidden: Tensor
    layers: tuple[Tensor, ...]
    piece: Piece
    turned: dict[int, tuple[Tensor, Tensor]]
    watched: dict[int, Watched]


class Pass:
    """What the layers of one pass are given, and where they leave theirs, by `layer_idx`."""

    def __init__(self, prefix: Sequence[Piece], mask: Tensor | None, watch: Watch | None) -> None:
        self.prefix, self.mask, self.watch = tuple(prefix), mask, watch
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.turned: dict[int, tuple[Tensor, Tensor]] = {}
        self.watched: dict[int, Watched] = {}
        self.over = False  # layers that are run again, for their gradients, leave nothing


def use_thoughts(model: nn.Module) -> None:
    """Prepare a causal LM for these passes; whole sequences and decoding work as before.

    Raises:
        ConfigError: the model's attention does not go through transformers' interface.
    """
    lm = core(model)
    if not getattr(lm, "_supports_attention_backend", False):
        raise ConfigError(
            f"model: {type(lm).__name__} does not use transformers' attention interface, which training with thoughts "
            "in hidden states (coconut, codi, pccot, kava) goes through. Use another model, or turn those stages off."
        )
    lm.set_attn_implementation(THOUGHTS)


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
    # a mask of four dimensions is passed on untouched; it keeps transformers from building one
    out = core(model).get_decoder()(
        inputs_embeds=embeds,
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        position_ids=position,
        use_cache=False,
        output_hidden_states=layers,
        **{ARGUMENT: given},
    )
    given.over = True
    count = core(model).config.get_text_config().num_hidden_layers
    states = out.hidden_states if layers else ()
    complete = sorted(given.keys) == list(range(count)) and (watch is None or len(given.watched) == count)
    if not complete or (layers and len(states or ()) != count + 1):
        raise TrainingError(
            f"model: {len(given.keys)} of {count} layers of {type(core(model)).__name__} left their keys, values and "
            "states; distilling them would train nothing. The model needs use_thoughts, and layers that call "
            "transformers' attention interface in the forward pass."
        )
    piece = Piece(
        tuple(given.keys[layer] for layer in range(count)), tuple(given.values[layer] for layer in range(count)), real
    )
    return Result(out.last_hidden_state, tuple(states), piece, given.turned, given.watched)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    thought_pass: Pass | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface; without a pass (decoding) it is plain SDPA."""
    refuse_sinks(module, others, "model: {name}, which training with thoughts in hidden states does not have.")
    if thought_pass is None:
        return plain_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, others)
    given, layer = thought_pass, module.layer_idx
    if not given.over:
        given.keys[layer], given.values[layer] = key, value
    if given.prefix:
        key = torch.cat([*(piece.keys[layer] for piece in given.prefix), key], dim=2)
        value = torch.cat([*(piece.values[layer] for piece in given.prefix), value], dim=2)
    if given.watch is not None and not given.over:
        given.watched[layer] = _watched(given.watch, given.mask, query.detach(), key.detach(), scaling, softcap)
    if softcap is not None:
        out = softcapped(query, key, value, given.mask, scaling, dropout, softcap)
    else:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and given.mask is not None:  # fused kernels take a mask or grouped heads, not both
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=given.mask,
            dropout_p=dropout,
            is_causal=given.mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(THOUGHTS, _forward)
AttentionMaskInterface.register(THOUGHTS, sdpa_mask)


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
