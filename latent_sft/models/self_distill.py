"""CODI, PCCoT and KaVa: one model, as student with M latents and as teacher with the written CoT, trained together.

    L = ce / n_A + w_T teacher_ce / (n_C + n_A) + w_H hidden + w_KV kv

CODI (arXiv 2502.21074): latents one after another, `hidden`. PCCoT (arXiv 2506.18582): the same with Jacobi iterations.
KaVa (arXiv 2510.02312): `kv` besides, over the last iteration. The prompt is read once for both, and the teacher once
for its own loss and for its targets, which carry no gradient (published CODI code reads all of it three times).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latent_sft.config.methods import SelfDistillConfig
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
from latent_sft.method.types import LatentSpec
from latent_sft.models.head import ce_total
from latent_sft.models.thought_passes import (
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

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        """Return the sums of the terms over a batch of `data.thought_batches.distill_batch`.

        Returns:
            `ce_total`, and where their weights are not 0 `teacher_ce_total`, `hidden_total` and `kv_total`; `observed`:
            name -> (sum, count) of what describes the loss on keys and values: `kv_short` share of rows with fewer
            trace tokens than latents, `kv_kept` share of a trace that is kept, `kv_cosine` of student's and kept
            teacher's keys.

        Raises:
            ConfigError: the family's attention cannot be used this way.
            TrainingError: a layer did not leave its keys and values.
        """
        use, kv, sequential = self.settings, self.settings.kv, self.thoughts.spec.sequential
        count, columns = self.thoughts.spec.num_latents, batch["prompt_ids"].shape[1]
        check_length(self.lm, columns + max(count + batch["tail_ids"].shape[1], batch["teacher_ids"].shape[1]))
        prompt = read(self.lm, batch["prompt_ids"], batch["prompt_length"], None if sequential else self.thoughts)
        if sequential:
            every = torch.ones(len(prompt.length), count, dtype=torch.bool, device=prompt.length.device)
            thought = think_in_turn(self.lm, self.thoughts, prompt, every)
        else:
            thought = think_at_once(self.lm, self.thoughts, prompt)
        student = read_on(
            self.lm,
            batch["tail_ids"],
            batch["tail_length"],
            thought.position,
            (prompt.piece, *thought.pieces),
            layers=use.hidden_weight > 0,
        )
        out: dict[str, Any] = {"ce_total": self._ce(thought.last, student, batch, ""), "observed": {}}
        if not (use.teacher_weight or use.hidden_weight or kv.weight):
            return out
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
            out["teacher_ce_total"] = self._ce(prompt.last, teacher, batch, "teacher_")
        if use.hidden_weight:
            out["hidden_total"] = self._hidden(student, teacher, batch).sum()
        if kv.weight:
            distances, out["observed"] = self._kv(thought, teacher, batch)
            out["kv_total"] = distances.sum()
        return out

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
        options = {"loss": kv.loss, "std": kv.layer_std, "short": kv.short, "reduction": kv.reduction}
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
            "kv_short": ((length < count).sum(), torch.tensor(len(length), device=length.device)),
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
