"""Span labels: latents that are code words of spans of the CoT, after MUX (arXiv 2607.18264); no encoder, no stage 1.

The label of a latent is the position-weighted mixture of the tokens of its span (`method.spans`), and the model learns
to produce it as in stage 2 of Latent-SFT. MUX feeds hidden states back and is trained with CODI's terms beside; here
the mixture itself is fed back, as everywhere in this package, snapped to a code word or not. So a thought can be read.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from latent_sft.config.schema import LatentConfig, ModelConfig
from latent_sft.config.training import TrainConfig, need
from latent_sft.data.collate import Batch, TokenRow, stage2_batch
from latent_sft.data.lengths import Lengths, count_tokens, single
from latent_sft.inference.solve import Policy, Thinker
from latent_sft.method.layout import fixed_segments, split_cot
from latent_sft.method.spans import LONGEST, SpanThinking, random_cuts, separation, span_labels
from latent_sft.method.types import LatentSpec, SpanCode, Superposition
from latent_sft.methods.base import Collate, Curriculum, Method, Model, Prepare, Setup, Stage, load_saved, save_plain
from latent_sft.methods.common import drawn_anew, step_lengths
from latent_sft.models.load import load_lm, load_tokenizer, trainable
from latent_sft.models.logits import head
from latent_sft.models.stage2 import Stage2Model

log = logging.getLogger(__name__)

# (token before, token) -> whether a span may end between them, and whether that is a good place
Boundary = Callable[[int, int], tuple[bool, bool]]


@dataclass(frozen=True, kw_only=True)
class SpansConfig:
    """Span labels (after MUX, arXiv 2607.18264): a latent is the position-weighted mixture of its span's tokens."""

    init: Literal["base", "cot"] = "cot"
    """What training starts from: the base model, or the `cot` stage's checkpoint."""
    cuts: Literal["step", "fixed", "random", "semantic"] = "step"
    """step: one span per CoT step. fixed: `rate` tokens each. random: `num_spans` spans, cut points drawn anew each
    time a row is shown (MUX). semantic: at most `rate` tokens, never cut inside a number or word, where possible at the
    end of an equation or sentence."""
    rate: int = 4
    """Tokens per span for `fixed`; at most, for `semantic`."""
    num_spans: int = 6
    """Latents per row for `random` (MUX: 6)."""
    longest: int = 8
    """Tokens of a span at most; a longer step or random span is cut into equal parts."""
    rho: float = 0.7
    """Ratio of the weight of a span's token to the one before (MUX: 0.9). Up to 0.5, spans of known length can always
    be told apart; near 1 the weights differ too little to be learned exactly."""
    snap: Literal["none", "nearest", "likeliest", "greedy"] = "nearest"
    """What is fed back when problems are solved: the latent as predicted, or the code word nearest to it (in L1; in KL;
    or found token by token, for spans longer than 9). Validation during training decodes without."""
    own_latents: float = 0.0
    """Scheduled sampling: share of the latents whose input, while training, is what the model makes of the place itself
    (snapped as `snap` says) in a pass over the labels; the targets stay the labels. Costs that pass."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        need(1 <= self.longest <= 64, "spans.longest", self.longest, "1 to 64 tokens")
        need(1 <= self.rate <= self.longest, "spans.rate", self.rate, f"1 to spans.longest={self.longest} tokens")
        need(self.num_spans >= 1, "spans.num_spans", self.num_spans, "an integer >= 1")
        need(0 < self.rho <= 1, "spans.rho", self.rho, "0 < rho <= 1")
        need(0 <= self.own_latents <= 1, "spans.own_latents", self.own_latents, "a share from 0 to 1")
        short = self.longest <= LONGEST or self.snap in ("none", "greedy")
        need(short, "spans.snap", self.snap, f"none or greedy, where spans.longest={self.longest} is above {LONGEST}")

    @property
    def code(self) -> SpanCode:
        """How labels are made and read."""
        return SpanCode(rho=self.rho, longest=self.longest, snap=self.snap)


def span_lengths(row: TokenRow, config: SpansConfig, boundary: Boundary, draw: random.Random) -> list[int]:
    """Return the number of tokens of each span of a row's CoT.

    Args:
        row: a tokenised row.
        config: settings.
        boundary: where `semantic` may cut.
        draw: for `random`.

    Raises:
        DataError: a span is a step, but the row's steps are not known.
    """
    cot = row["cot"]
    if config.cuts == "fixed":
        return fixed_segments(len(cot), config.rate)
    if config.cuts == "semantic":
        return _semantic(cot, config.rate, config.longest, boundary)
    lengths = random_cuts(len(cot), config.num_spans, draw) if config.cuts == "random" else step_lengths(row)
    return [part for length in lengths for part in _equal_parts(length, config.longest)]


def _equal_parts(length: int, longest: int) -> list[int]:
    """Return the lengths of the fewest nearly equal parts that are at most `longest`.

    >>> _equal_parts(10, 4)
    [4, 3, 3]
    """
    count = -(-length // longest)
    return [length // count + (i < length % count) for i in range(count)]


def _semantic(cot: Sequence[int], budget: int, longest: int, boundary: Boundary) -> list[int]:
    lengths, start = [], 0
    while start < len(cot):
        ends = range(start + 1, min(start + longest, len(cot)) + 1)
        kinds = {end: (True, True) if end == len(cot) else boundary(cot[end - 1], cot[end]) for end in ends}
        good = [end for end in ends if kinds[end][1] and budget / 2 <= end - start <= budget]
        allowed = [end for end in ends if kinds[end][0] and end - start <= budget]
        beyond = [end for end in ends if kinds[end][0]]
        end = good[-1] if good else allowed[-1] if allowed else beyond[0] if beyond else ends[-1]
        lengths.append(end - start)
        start = end
    return lengths


def boundary_of(tokenizer: PreTrainedTokenizerBase | None) -> Boundary:
    """Return where a text may be cut: not inside a number or word; best after an equation, sentence or line.

    Without a tokenizer, while a job is only planned, that is anywhere.
    """

    @cache
    def boundary(before: int, after: int) -> tuple[bool, bool]:
        if tokenizer is None:
            return True, True
        left, both = str(tokenizer.decode([before])), str(tokenizer.decode([before, after]))
        right = both.removeprefix(left)
        joined = re.search(r"[\w.,]$", left) and re.match(r"[\w.,]", right)
        return not joined, not joined and bool(re.search(r"(>>|[.;:!?)\n])\s*$", left))

    return boundary


def spans_batch(
    rows: Sequence[TokenRow],
    spec: LatentSpec,
    config: SpansConfig,
    boundary: Boundary,
    *,
    loss_reduction: str,
) -> Batch:
    """Batch of stage 2 (see `data.collate.stage2_batch`) whose labels are the code words of the rows' spans.

    Args:
        rows: tokenised rows, with `phase`, the seed of their cuts, where these are drawn.
        spec: settings.
        config: settings of span labels.
        boundary: where `semantic` may cut.
        loss_reduction: of the cross-entropy, see `TrainConfig`.
    """
    labels = {}
    for row in rows:
        draw = random.Random(f"{row.get('phase', 0)}/{row['id']}")
        spans = split_cot(row["cot"], span_lengths(row, config, boundary, draw))
        labels[row["id"]] = span_labels(spans, config.rho, config.longest)
    return stage2_batch(rows, spec, label_of=lambda row, _: labels[row], loss_reduction=loss_reduction)


def with_own_latents(batch: Batch, policy: Policy, *, share: float, code: SpanCode) -> Batch:
    """Return a batch in which a share of the latents that are fed are the model's own; scheduled sampling in one pass.

    The own latent of a place is that after the labels before it, so all of a row come from one pass. Which places have
    theirs is drawn from seed, optimizer step and row.

    Args:
        batch: of `spans_batch`.
        policy: the model under training.
        share: of places.
        code: how its latents are read.
    """
    model = policy.module
    assert isinstance(model, Stage2Model)
    label = Superposition(batch["latent_ids"], batch["latent_weights"])
    hidden = model.states(batch, label)[batch["kl_index"]]
    thinking = SpanThinking(policy.spec, hidden.device, mixture=code)
    own = thinking.choose(head(model.lm)(hidden))
    size, (num_rows, width) = max(own.ids.shape[-1], label.ids.shape[-1]), label.ids.shape[:2]
    draws = [policy.random(row_id) for row_id in batch["row_ids"]]
    drawn = torch.tensor([[draw.random() < share for _ in range(width)] for draw in draws], device=hidden.device)
    chosen = drawn.flatten()[batch["kl_latent"]]
    place = batch["kl_latent"][chosen]
    fed = []
    for ours, theirs in zip(own, label, strict=True):
        part = theirs.new_zeros(num_rows * width, size)
        part[:, : theirs.shape[-1]] = theirs.flatten(0, 1)
        part[place] = 0
        part[place, : ours.shape[-1]] = ours[chosen].to(part.dtype)
        fed.append(part.view(num_rows, width, size))
    return {**batch, "fed_ids": fed[0], "fed_weights": fed[1]}


def spans_lengths(data: Any, spec: LatentSpec, config: SpansConfig, boundary: Boundary) -> Lengths:
    """Lengths of `[P, z_1..z_N, E, A]`; where cuts are drawn, with as many latents as there can be."""
    cot = count_tokens(data, "cot")
    if config.cuts == "random":
        latents = torch.minimum(cot, config.num_spans + cot // config.longest)
    elif config.cuts == "fixed":
        latents = -(-cot // config.rate)
    else:
        columns = data.select_columns(["id", "cot", "step_lengths"])
        latents = torch.tensor([len(span_lengths(row, config, boundary, random.Random(0))) for row in columns])
    return single(count_tokens(data, "prompt") + latents + len(spec.end_think_ids) + count_tokens(data, "answer"))


def _model(setup: Setup) -> nn.Module:
    config = setup.settings
    gap, dtype = separation(min(config.longest, 16), config.rho), getattr(torch, setup.trained_model.dtype)
    spacing = torch.finfo(dtype).eps / 4  # of numbers between 1/4 and 1/2
    if gap < spacing:
        what = f"differ by {gap:.1e} only, less than {setup.trained_model.dtype} tells apart ({spacing:.1e})"
        advice = "lower spans.rho (0.5 is safest) or spans.longest"
        log.warning("spans: two spans of %d tokens can have labels that %s; %s", config.longest, what, advice)
    model = Stage2Model(trainable(load_lm(setup.single, setup.trained_model), setup.model.lora), setup.spec)
    model.code = dataclasses.replace(config.code, snap="none")
    return model


def _batch(setup: Setup) -> Collate:
    return partial(
        spans_batch,
        spec=setup.spec,
        config=setup.settings,
        boundary=boundary_of(setup.tokenizer),
        loss_reduction=setup.train.loss_reduction,
    )


def _prepare(setup: Setup) -> Prepare | None:
    share = setup.settings.own_latents
    return partial(with_own_latents, share=share, code=setup.settings.code) if share else None


def _identity(settings: SpansConfig, latent: LatentConfig) -> dict[str, Any]:
    unused = ("train",) if settings.own_latents else ("train", "snap")
    own = {k: v for k, v in dataclasses.asdict(settings).items() if k not in unused}
    noise = {k: getattr(latent, k) for k in ("noise_scale", "noise_temperature", "noise_clip", "decode_temperature")}
    return {"method": own, "latent": {**noise, "top_k": latent.top_k, "exclude_end": latent.exclude_end}}


def _load(folder: Path, model: ModelConfig, spec: LatentSpec, settings: SpansConfig, device: torch.device) -> Thinker:
    boundary = boundary_of(load_tokenizer(folder, model))

    def spans_of(row: TokenRow) -> list[list[int]]:
        return split_cot(row["cot"], span_lengths(row, settings, boundary, random.Random()))

    thinker = load_saved(folder, model, spec, settings, device)
    return thinker._replace(mixture=settings.code, spans_of=None if settings.cuts == "random" else spans_of)


METHOD = Method(
    title="Span labels",
    arxiv="2607.18264",
    paper="MUX",
    story="Each token it thinks in stands for a span of written reasoning, whose tokens it mixes by their position.",
    settings="spans",
    sections={"spans": SpansConfig},
    stages=(
        Stage(
            name="latent-spans",
            section="spans.train",
            meaning="the model learns to think in mixtures of the tokens of each span of the CoT",
            thinker=lambda model: Thinker("spans", model.lm, mixture=model.code),
            source=lambda settings: "cot" if settings.init == "cot" else None,
            identity=_identity,
            model=_model,
            batch=_batch,
            lengths=lambda data, setup: spans_lengths(data, setup.spec, setup.settings, boundary_of(setup.tokenizer)),
            terms=lambda setup: {"ce": setup.train.ce_weight, "kl": setup.train.kl_weight},
            curriculum=lambda setup: Curriculum(number=drawn_anew) if setup.settings.cuts == "random" else None,
            prepare=_prepare,
            save=lambda model, setup, folder: save_plain(
                model, setup, folder, thinker="spans", settings=setup.settings.code
            ),
        ),
    ),
    models=(
        Model(
            name="latent-spans",
            meaning="thinks in mixtures that stand for a span of written reasoning each",
            colour="#6a51a3",
            role="latent",
            stages=("latent-spans",),
            identity=lambda settings: {"snap": settings.snap},
            load=_load,
        ),
    ),
)
