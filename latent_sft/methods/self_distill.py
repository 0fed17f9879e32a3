"""CODI, PCCoT and KaVa: one model, as student with M latents and as teacher with the written CoT, trained together.

    L = ce / n_A + w_T teacher_ce / (n_C + n_A) + w_H hidden + w_KV kv

CODI (arXiv 2502.21074): latents one after another, `hidden`. PCCoT (arXiv 2506.18582): the same with Jacobi iterations.
KaVa (arXiv 2510.02312): `kv` besides, over the last iteration. The prompt is read once for both, and the teacher once
for its own loss and for its targets, which carry no gradient (published CODI code reads all of it three times).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latent_sft.config.training import TrainConfig, need
from latent_sft.data.collate import Batch, TokenRow, count_of
from latent_sft.data.lengths import Lengths, count_tokens
from latent_sft.memory import Backbone, Weights, one_model
from latent_sft.method import layout
from latent_sft.method.kv_distill import (
    Kept,
    attention_logits,
    cosine,
    hidden_distance,
    importance,
    kv_distance,
    scores,
    select,
    take,
)
from latent_sft.method.layout import Kind
from latent_sft.method.losses import StepOutput
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.methods.base import Collate, Method, Model, Setup, Stage
from latent_sft.methods.common import (
    kind_of,
    own_settings,
    padded,
    save_with_thoughts,
    start_of,
    step_lengths,
    take_given,
    targets_of,
    thinker_of,
)
from latent_sft.models.head import ce_total
from latent_sft.models.load import load_lm, trainable
from latent_sft.models.thought_passes import (
    Prompt,
    Result,
    Thought,
    Watch,
    check_length,
    labelled,
    read,
    read_on,
    think_at_once,
    think_in_turn,
    use_thoughts,
)
from latent_sft.models.thoughts import Thoughts

Observed = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class KvDistillConfig:
    """KaVa's loss on keys and values: the teacher's cache over its CoT, compressed to M entries a head."""

    weight: float = 0.0
    """Of the loss (paper: alpha_2); 0 computes none of it."""
    loss: Literal["l1", "smooth_l1", "mse"] = "smooth_l1"
    layer_std: bool = False
    """Divide keys and values of a layer by the teacher's standard deviation there."""
    selector: Literal["rkv", "cosine", "attention", "crop", "uniform", "random"] = "rkv"
    """Which trace tokens a head keeps: rkv by importance and diversity, cosine by diversity alone, attention by
    importance alone; crop the first ones; uniform evenly spaced ones; random ones (controls)."""
    importance: float = 0.1
    """Share of importance in the score of rkv (paper: lambda)."""
    queries: Literal["answer", "tail"] = "answer"
    """Whose attention is importance: answer tokens, or those of `</think>` too. The paper says answer tokens."""
    pooling: Literal["mean", "max"] = "mean"
    """Query heads that share a key head: mean of their attention, or maximum of their logits before the softmax (R-KV).
    The paper does not say."""
    normalise: Literal["trace", "all"] = "trace"
    """Softmax over the trace alone, or over all the query sees and then restricted. The paper's formula says trace."""
    span: Literal["steps", "delimiter"] = "steps"
    """What can be kept: the steps shown to the teacher, or `</think>` too."""
    short: Literal["mask", "zero"] = "mask"
    """A trace shorter than M leaves slots over: left out of the loss, or drawn to zero."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over heads, head size and slots: mean, or sum over them divided by 2M as the formula is printed."""


@dataclass(frozen=True, kw_only=True)
class SelfDistillConfig:
    """CODI, PCCoT or KaVa: one model, as teacher with the written CoT and as student with M latents, both trained.
    Defaults that are not those below: codi has num_latents=6, iterations=6 and hidden_embedding=true, pccot
    projection=false, kava hidden_weight=10, kv.weight=1 and kv.layer_std=true."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """`ce_weight` weighs the student's cross-entropy."""
    init: Literal["base", "cot"] = "base"
    num_latents: int = 24
    """M."""
    iterations: int = 3
    """T Jacobi iterations over all latents at once; M (or more) is one latent after another, 0 pause tokens."""
    projection: bool = True
    """Latents are hidden states through Linear-GELU-Linear-LayerNorm; false: as they are."""
    projection_dropout: float = 0.0
    drop_last_step: bool = True
    """The teacher does not see the last step (of two or more), or the token before the answer would tell nothing."""
    teacher_weight: float = 1.0
    """Of the teacher's cross-entropy on steps and answer."""
    hidden_weight: float = 1.0
    """Of the distance between hidden states at the token before the answer (CODI: gamma, KaVa: alpha_1)."""
    hidden_loss: Literal["smooth_l1", "l1", "mse"] = "smooth_l1"
    hidden_std: Literal["layer", "all", "none"] = "layer"
    """Divided by the teacher's standard deviation: of each layer, of all layers together, or not."""
    hidden_embedding: bool = False
    """Count the embedding's output as a layer (CODI's code does)."""
    kv: KvDistillConfig = field(default_factory=KvDistillConfig)

    def check(self, section: str) -> None:
        """Raise a ConfigError for a value out of range; `section` is where these settings stand."""
        need(self.num_latents >= 1, f"{section}.num_latents", self.num_latents, "an integer >= 1")
        need(self.iterations >= 0, f"{section}.iterations", self.iterations, "an integer >= 0")
        need(0 <= self.projection_dropout < 1, f"{section}.projection_dropout", self.projection_dropout, "0 to below 1")
        for key in ("teacher_weight", "hidden_weight"):
            need(getattr(self, key) >= 0, f"{section}.{key}", getattr(self, key), "a number >= 0")
        need(self.kv.weight >= 0, f"{section}.kv.weight", self.kv.weight, "a number >= 0")
        need(0 <= self.kv.importance <= 1, f"{section}.kv.importance", self.kv.importance, "0 to 1")


def codi() -> SelfDistillConfig:
    """Return CODI's defaults: six latents one after another (arXiv 2502.21074)."""
    return SelfDistillConfig(num_latents=6, iterations=6, hidden_embedding=True)


def pccot() -> SelfDistillConfig:
    """Return PCCoT's defaults: 24 latents in three iterations, no projection (arXiv 2506.18582)."""
    return SelfDistillConfig(projection=False)


def kava() -> SelfDistillConfig:
    """Return KaVa's defaults, those of Llama-3.2-1B on GSM8K-Aug (arXiv 2510.02312)."""
    return SelfDistillConfig(hidden_weight=10.0, kv=KvDistillConfig(weight=1.0, layer_std=True))


class SelfDistillModel(nn.Module):
    """A causal LM with the objective above.

    Args:
        lm: causal LM; its attention is set to ours.
        thoughts: f, M and T.
        spec: settings.
        settings: weights and what they weigh; a term of weight 0 is not computed.
    """

    def __init__(self, lm: nn.Module, thoughts: Thoughts, spec: LatentSpec, settings: SelfDistillConfig) -> None:
        super().__init__()
        self.lm, self.thoughts = lm, thoughts
        self.spec, self.settings = spec, settings
        use_thoughts(lm)

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return the sums of the terms over a batch of `distill_batch`.

        Returns:
            `ce`, and where their weights are not 0 `teacher_ce`, `hidden` and `kv`. Observed is what describes the loss
            on keys and values: `kv_short` share of rows with fewer trace tokens than latents, `kv_kept` share of a
            trace that is kept, `kv_cosine` of student's and kept teacher's keys.

        Raises:
            ConfigError: the family's attention cannot be used this way.
            TrainingError: a layer did not leave its keys and values.
        """
        return self.losses(batch, *self.think(batch))

    def think(self, batch: dict[str, Tensor]) -> tuple[Prompt, Thought]:
        """Read the prompts and think."""
        sequential = self.thoughts.spec.sequential
        count, columns = self.thoughts.spec.num_latents, batch["prompt_ids"].shape[1]
        check_length(self.lm, columns + max(count + batch["tail_ids"].shape[1], batch["teacher_ids"].shape[1]))
        prompt = read(self.lm, batch["prompt_ids"], batch["prompt_length"], None if sequential else self.thoughts)
        if sequential:
            every = torch.ones(len(prompt.length), count, dtype=torch.bool, device=prompt.length.device)
            return prompt, think_in_turn(self.lm, self.thoughts, prompt, every)
        return prompt, think_at_once(self.lm, self.thoughts, prompt)

    def losses(self, batch: dict[str, Tensor], prompt: Prompt, thought: Thought) -> StepOutput:
        """Return the sums of `forward` after what `think` gave."""
        use, kv = self.settings, self.settings.kv
        student = read_on(
            self.lm,
            batch["tail_ids"],
            batch["tail_length"],
            thought.position,
            (prompt.piece, *thought.pieces),
            layers=use.hidden_weight > 0,
        )
        sums = {"ce": self._ce(thought.last, student, batch, "")}
        observed: Observed = {}
        if not (use.teacher_weight or use.hidden_weight or kv.weight):
            return StepOutput(sums, observed)
        # targets have no gradient, so that a teacher that is not trained itself needs no graph
        with torch.set_grad_enabled(torch.is_grad_enabled() and use.teacher_weight > 0):
            teacher = read_on(
                self.lm,
                batch["teacher_ids"],
                batch["teacher_length"],
                prompt.length,
                (prompt.piece,),
                layers=use.hidden_weight > 0,
                watch=self._watch(batch) if kv.weight else None,
            )
        if use.teacher_weight:
            sums["teacher_ce"] = self._ce(prompt.last, teacher, batch, "teacher_")
        if use.hidden_weight:
            sums["hidden"] = self._hidden(student, teacher, batch).sum()
        if kv.weight:
            distances, observed = self._kv(thought, teacher, batch)
            sums["kv"] = distances.sum()
        return StepOutput(sums, observed)

    def _ce(self, last: Tensor, result: Result, batch: dict[str, Tensor], of: str) -> Tensor:
        hidden = labelled(last, result, batch[f"{of}target_index"])
        return ce_total(self.lm, hidden, batch[f"{of}targets"], batch[f"{of}target_weights"])

    def _hidden(self, student: Result, teacher: Result, batch: dict[str, Tensor]) -> Tensor:
        # at the last token of </think>, the one before the answer
        end = len(self.spec.end_think_ids) - 1
        column = (batch["trace_length"] + end)[:, None, None]
        first = 0 if self.settings.hidden_embedding else 1
        return hidden_distance(
            [states[:, end] for states in student.layers[first:]],
            [x.gather(1, column.expand(-1, 1, x.shape[-1]))[:, 0] for x in teacher.layers[first:]],
            loss=self.settings.hidden_loss,
            std=self.settings.hidden_std,
        )

    def _queries(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # columns of the teacher's pass whose attention is importance, [B, Q], and which of them count
        answers = self.settings.kv.queries == "answer"
        length = batch["answer_length"] if answers else batch["tail_length"]
        width = batch["tail_ids"].shape[1] - (len(self.spec.end_think_ids) if answers else 0)
        at = torch.arange(width, device=length.device).expand(len(length), -1)
        columns = (batch["teacher_length"] - length)[:, None] + at
        return columns.clamp(max=batch["teacher_ids"].shape[1] - 1), at < length[:, None]

    def _watch(self, batch: dict[str, Tensor]) -> Watch | None:
        kv = self.settings.kv
        if kv.selector not in ("rkv", "attention"):
            return None
        return Watch(self._queries(batch)[0], kv.pooling, kv.normalise == "all")

    def _kv(self, thought: Thought, teacher: Result, batch: dict[str, Tensor]) -> tuple[Tensor, Observed]:
        kv, count, end = self.settings.kv, self.thoughts.spec.num_latents, len(self.spec.end_think_ids)
        length = batch["trace_length"] + (end if kv.span == "delimiter" else 0)
        # the answer has a token at least, so no trace reaches further
        width = batch["teacher_ids"].shape[1] - 1 - (0 if kv.span == "delimiter" else end)
        trace = torch.arange(width, device=length.device) < length[:, None]
        ours = [torch.cat(keys, dim=2) for keys in zip(*(piece.keys for piece in thought.pieces), strict=True)]
        options: dict[str, Any] = {"loss": kv.loss, "std": kv.layer_std, "short": kv.short, "reduction": kv.reduction}
        each, alike, slots = [], [], []
        for layer, key in enumerate(teacher.piece.keys):
            key, value = key[:, :, :width].detach(), teacher.piece.values[layer][:, :, :width].detach()
            kept = self._kept(layer, key, teacher, trace, batch)
            pairs = (
                (ours[layer], take(key, kept)),
                (torch.cat([piece.values[layer] for piece in thought.pieces], dim=2), take(value, kept)),
            )
            each += [kv_distance(student, target, kept.mask, **options) for student, target in pairs]
            alike.append((cosine(pairs[0][0].detach(), pairs[0][1]) * kept.mask).sum())
            slots.append(kept.mask.sum())
        some = length > 0
        observed = {
            "kv_short": ((length < count).sum(), torch.full((), len(length), device=length.device)),
            "kv_kept": ((length.clamp(max=count) / length.clamp(min=1)).sum(), some.sum()),
            "kv_cosine": (torch.stack(alike).sum(), torch.stack(slots).sum()),
        }
        # keys and values alike, mean over layers: half of each is the mean over twice as many
        return torch.stack(each).mean(0), observed

    @torch.no_grad()
    def _kept(self, layer: int, key: Tensor, teacher: Result, trace: Tensor, batch: dict[str, Tensor]) -> Kept:
        kv, attention = self.settings.kv, None
        if layer in teacher.watched:
            seen = teacher.watched[layer]
            columns, real = self._queries(batch)
            logits = attention_logits(seen.query, key, seen.scale, seen.softcap, kv.pooling)
            later = torch.arange(trace.shape[1], device=trace.device) > columns[..., None]
            logits = logits.masked_fill(later[:, None, None], float("-inf"))
            attention = importance(logits, trace, real, seen.log_total)
        ranked = scores(
            kv.selector,
            key,
            trace,
            self.thoughts.spec.num_latents,
            attention=attention,
            share=kv.importance,
            seed=batch["row_seed"],
            layer=layer,
        )
        return select(ranked, trace, self.thoughts.spec.num_latents)


def distill_batch(
    rows: Sequence[TokenRow],
    spec: LatentSpec,
    thought_spec: ThoughtSpec,
    *,
    loss_reduction: str,
    drop_last_step: bool,
    kv: KvDistillConfig | None = None,
) -> Batch:
    """Batch for CODI, PCCoT and KaVa (`SelfDistillModel`).

    The student reads `P, M latents, E, A` and is trained on A, since `</think>` follows a known number of latents; the
    teacher reads `P, C', E, A` and is trained on all but P.

    Args:
        rows: tokenised rows.
        spec: settings.
        thought_spec: M and T.
        loss_reduction: of both cross-entropies, see `TrainConfig`; `segment` is `sample` here.
        drop_last_step: C' is the CoT without its last step where it has two or more, and empty where it has one.
        kv: settings of the loss on keys and values; they decide which rows count for it. None is its defaults.

    Returns:
        `prompt_ids` `[B, P]`, `tail_ids` `[B, S]` (E, A), `teacher_ids` `[B, T]` (C', E, A), each with `_length`
        `[B]`; `trace_length` `[B]` (of C'), `answer_length` `[B]`, `row_seed` `[B]`; targets of the student, and of
        the teacher with `teacher_`; `kind` `[B, P + M + S + T]`; `count_ce`, `count_teacher_ce`,
        `count_hidden` (rows) and `count_kv` (rows with anything to compare).

    Raises:
        DataError: steps have to be told apart and a row does not say where they end.
    """
    kv = kv or KvDistillConfig()
    end = list(spec.end_think_ids)
    traces = [_without_last_step(row) if drop_last_step else list(row["cot"]) for row in rows]
    students = [layout.explicit_row([*r["prompt"], *end], [], [], r["answer"], loss_reduction) for r in rows]
    teachers = [
        layout.explicit_row(r["prompt"], trace, end, r["answer"], loss_reduction)
        for r, trace in zip(rows, traces, strict=True)
    ]
    prompts = [list(r["prompt"]) for r in rows]
    starts = [len(p) for p in prompts]
    batch = {
        **padded("prompt", prompts, spec.pad_id),
        **padded("tail", [row.ids[n:] for row, n in zip(students, starts, strict=True)], spec.pad_id),
        **padded("teacher", [row.ids[n:] for row, n in zip(teachers, starts, strict=True)], spec.pad_id),
        "trace_length": torch.tensor([len(trace) for trace in traces]),
        "answer_length": torch.tensor([len(r["answer"]) for r in rows]),
        "row_seed": torch.tensor([zlib.crc32(f"{r['hash']} {r['id']}".encode()) for r in rows]),
    }
    compared = [bool(trace) or kv.span == "delimiter" or kv.short == "zero" for trace in traces]
    latents = torch.full((len(rows), thought_spec.num_latents), int(Kind.LATENT))
    kinds = {part: kind_of(batch, part) for part in ("prompt", "tail", "teacher")}
    return {
        **batch,
        **targets_of("", students, starts, batch["tail_ids"].shape[1]),
        **targets_of("teacher_", teachers, starts, batch["teacher_ids"].shape[1]),
        "kind": torch.cat([kinds["prompt"], latents, kinds["tail"], kinds["teacher"]], dim=1),
        "count_ce": count_of(students, loss_reduction),
        "count_teacher_ce": count_of(teachers, loss_reduction),
        "count_hidden": torch.tensor(float(len(rows))),
        "count_kv": torch.tensor(float(sum(compared))),
    }


def _without_last_step(row: TokenRow) -> list[int]:
    return list(row["cot"][: sum(step_lengths(row)[:-1])])


def distill_lengths(data: Any, spec: LatentSpec, thought_spec: ThoughtSpec) -> Lengths:
    """Lengths of `[P]`, the passes over M latents, `[E, A]` and `[C, E, A]`, with the whole CoT as an upper bound."""
    prompt, cot, answer = (count_tokens(data, column) for column in ("prompt", "cot", "answer"))
    # one at a time: M passes over one; at once: T passes over M, after the placeholders
    passes = 1 if thought_spec.sequential else thought_spec.iterations + 1
    fixed = passes * thought_spec.num_latents
    tail = len(spec.end_think_ids)
    parts = torch.stack([prompt, tail + answer, cot + tail + answer], dim=1)
    return Lengths(parts, lambda parts: parts.sum(-1) + fixed)


def _thought_spec(settings: SelfDistillConfig) -> ThoughtSpec:
    return ThoughtSpec(num_latents=settings.num_latents, iterations=settings.iterations, projection=settings.projection)


def _model(setup: Setup) -> nn.Module:
    settings: SelfDistillConfig = setup.settings
    lm = load_lm(setup.single, setup.trained_model)
    thoughts = Thoughts(_thought_spec(settings), start_of(lm, setup.spec), dropout=settings.projection_dropout)
    take_given(thoughts, setup)
    return SelfDistillModel(trainable(lm, setup.model.lora), thoughts, setup.spec, settings)


def _batch(setup: Setup) -> Collate:
    return partial(
        distill_batch,
        spec=setup.spec,
        thought_spec=_thought_spec(setup.settings),
        loss_reduction=setup.train.loss_reduction,
        drop_last_step=setup.settings.drop_last_step,
        kv=setup.settings.kv,
    )


def _terms(setup: Setup) -> dict[str, float]:
    settings: SelfDistillConfig = setup.settings
    return {
        "ce": setup.train.ce_weight,
        "teacher_ce": settings.teacher_weight,
        "hidden": settings.hidden_weight,
        "kv": settings.kv.weight,
    }


def _parameters(backbone: Backbone, setup: Setup) -> Weights:
    # projection: two linear maps with biases, scale and shift of the norm; and the placeholder
    settings, hidden = setup.settings, backbone.shape.hidden
    projection = 2 * (hidden * hidden + hidden) + 2 * hidden if settings.projection else 0
    return one_model(
        backbone, setup.model, setup.trained_model, projection + hidden * (settings.iterations < settings.num_latents)
    )


def _more_positions(setup: Setup) -> int:
    # latents of the iterations after the first
    settings: SelfDistillConfig = setup.settings
    return settings.num_latents * settings.iterations * (settings.iterations < settings.num_latents)


def _method(
    title: str,
    arxiv: str,
    paper: str,
    colour: str,
    defaults: Callable[[], SelfDistillConfig],
    meaning: str,
    thinks: str,
) -> Method:
    name = title.lower()
    stage = Stage(
        name=name,
        section=f"{name}.train",
        meaning=meaning,
        thinker=thinker_of,
        source=lambda settings: "cot" if settings.init == "cot" else None,
        identity=own_settings,
        model=_model,
        batch=_batch,
        lengths=lambda data, setup: distill_lengths(data, setup.spec, _thought_spec(setup.settings)),
        terms=_terms,
        save=save_with_thoughts,
        parameters=_parameters,
        more_positions=_more_positions,
    )
    return Method(
        title=title,
        arxiv=arxiv,
        paper=paper,
        settings=name,
        sections={name: defaults},
        stages=(stage,),
        models=(Model(name=name, meaning=thinks, colour=colour, role="latent", stages=(name,)),),
        check=lambda settings, model, stages: settings.check(name),
    )


CODI = _method(
    "CODI",
    "2502.21074",
    "CODI: Compressing Chain-of-Thought into Continuous Space via Self-Distillation",
    "#3b8f7a",
    codi,
    "one model as teacher with the CoT and as student with latents; hidden states before the answer agree",
    "thinks in hidden states, distilled from its own CoT",
)
PCCOT = _method(
    "PCCoT",
    "2506.18582",
    "Parallel Continuous Chain-of-Thought with Jacobi Iteration",
    "#7b5ea7",
    pccot,
    "as codi, with all latents refined at once by Jacobi iterations",
    "thinks in hidden states refined all at once, distilled from its own CoT",
)
KAVA = _method(
    "KaVa",
    "2510.02312",
    "KaVa: Latent Reasoning via Compressed KV-Cache Distillation",
    "#d9602b",
    kava,
    "as pccot, and the latents' keys and values follow the teacher's compressed cache",
    "thinks in hidden states refined all at once, distilled from its own CoT and cache",
)
