"""Is the reasoning used? The answer is decoded again, behind thoughts that were changed by hand.

    given      the thoughts as they were: a check, since it must give the accuracy of the normal decoding
    zero       every input embedding of a thought is 0
    mean       each is the mean over all thoughts of all problems
    shuffle    those of another problem
    truncate   the first half of them (rounded down)

Thoughts are what a model was fed between prompt and `</think>`: latents, or the tokens of a written CoT. Where the
accuracy stays the same whatever stands there, the model does not read it. Answers are decoded greedily.

`latent_sweep` asks how the accuracy depends on the number of latents, fewer and more than in training.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latent_sft.evaluation.answers import Grader, is_correct
from latent_sft.evaluation.intervals import accuracy_error, derangement, paired_difference
from latent_sft.inference.generate import Decoded, generate
from latent_sft.inference.solve import Thinker, solve
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import embed, mix_latents, unwrap_peft

log = logging.getLogger(__name__)

PROBLEMS_AT_ONCE = 512  # their thoughts are in memory as embeddings


def intervene(
    model: nn.Module,
    spec: LatentSpec,
    rows: Sequence[Mapping[str, Any]],
    decoded: Sequence[Decoded],
    *,
    names: Sequence[str],
    decode_text: Callable[[list[int]], str],
    grader: Grader,
    batch_size: int,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return for `given` and each intervention `accuracy, accuracy_se, difference, difference_ci`.

    `difference` is to `given`, with a paired bootstrap interval of 95 %. A problem whose thinking never came to
    `</think>` has no answer and stays wrong. Nothing is returned where no problem has a thought; `shuffle` is left out
    where only one has an answer.

    Args:
        model: causal LM (for the oracle latents of stage 1 its decoder).
        spec: of the model.
        rows: the problems (`prompt`, `reference`).
        decoded: what each gave, one sample per problem.
        names: interventions, see the module.
        decode_text: token ids to text.
        grader: how answers are compared.
        batch_size: problems decoded together.
        seed: of the exchange.
    """
    answered = [i for i, sample in enumerate(decoded) if sample.answer_ids or sample.finished]
    if not names or not any(decoded[i].num_steps for i in answered):
        return {}
    mean = _mean_thought(model, [decoded[i] for i in answered])
    partner = (
        dict(zip(answered, (answered[j] for j in derangement(len(answered), seed)), strict=True))
        if (len(answered) > 1)
        else {}
    )

    def changed(name: str, problem: int) -> Tensor:
        if name == "shuffle":
            return thought(model, decoded[partner[problem]])
        own = thought(model, decoded[problem])
        if name == "zero":
            return torch.zeros_like(own)
        if name == "mean":
            return mean.expand_as(own).clone()
        return own[: len(own) // 2] if name == "truncate" else own

    def correct(name: str) -> np.ndarray:
        right = np.zeros(len(rows))
        for first in range(0, len(answered), PROBLEMS_AT_ONCE):
            chunk = answered[first : first + PROBLEMS_AT_ONCE]
            again = generate(
                model,
                spec,
                [rows[i]["prompt"] for i in chunk],
                thinker="explicit",
                latents=[changed(name, i) for i in chunk],
                batch_size=batch_size,
            )
            for i, sample in zip(chunk, again, strict=True):
                right[i] = is_correct(decode_text(sample.answer_ids), rows[i]["reference"], grader)
        return right[None]

    asked = [name for name in names if name != "shuffle" or partner]
    table = {name: correct(name) for name in ("given", *asked)}
    return {name: _result(right, table["given"]) for name, right in table.items()}


def latent_sweep(
    thinker: Thinker,
    spec: LatentSpec,
    rows: Sequence[Mapping[str, Any]],
    counts: Sequence[int],
    *,
    decode_text: Callable[[list[int]], str],
    grader: Grader,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """Return for each number of latents `accuracy` and `accuracy_se` where every problem is thought in so many.

    Args:
        thinker: one that thinks in latents: superpositions, whose end is then put off or brought forward, or hidden
            states, which one after another can be more or fewer than in training.
        spec: of the model.
        rows: the problems (`prompt`, `reference`).
        counts: numbers of latents.
        decode_text: token ids to text.
        grader: how answers are compared.
        batch_size: problems decoded together.
    """
    found = {}
    for count in counts:
        how, limits = thinker, replace(spec, min_latents=count, max_latents=count)
        if thinker.thoughts is not None:
            shape, thoughts = thinker.thoughts.spec, copy.copy(thinker.thoughts)
            thoughts.spec = replace(
                shape, num_latents=count, iterations=count if shape.sequential else shape.iterations
            )
            how = thinker._replace(thoughts=thoughts)
        decoded = solve(how, limits, rows, batch_size=batch_size, max_cot_tokens=count)
        pairs = zip(decoded, rows, strict=True)
        right = np.array([[is_correct(decode_text(d.answer_ids), r["reference"], grader) for d, r in pairs]], float)
        found[str(count)] = {"accuracy": float(right.mean()), "accuracy_se": accuracy_error(right)}
    return found


@torch.inference_mode()
def thought(model: nn.Module, sample: Decoded) -> Tensor:
    """Return the input embeddings `[n, D]` of what was fed between prompt and `</think>`, float32 on the CPU."""
    device = unwrap_peft(model).device
    if sample.latent_embeds is not None:
        return sample.latent_embeds
    if sample.latent_ids is not None and sample.latent_weights is not None:
        latent = Superposition(sample.latent_ids.to(device), sample.latent_weights.to(device))
        return mix_latents(model, latent).float().cpu()
    ids = torch.tensor(sample.thought_ids, dtype=torch.long, device=device)
    return embed(model, ids[None])[0].float().cpu()


def check_given(found: Mapping[str, Mapping[str, Any]], accuracy: float, name: str) -> None:
    """Warn where thoughts that were fed back unchanged did not give the accuracy of the normal greedy decoding."""
    if found and abs(found["given"]["accuracy"] - accuracy) > 1e-9:
        log.warning(
            "eval %s: its own thoughts fed back give accuracy %.4f instead of %.4f (rounding can move single answers); "
            "differences of interventions are to the former.",
            name,
            found["given"]["accuracy"],
            accuracy,
        )


def _mean_thought(model: nn.Module, samples: Sequence[Decoded]) -> Tensor:
    total, count = torch.zeros(()), 0
    for sample in samples:
        own = thought(model, sample)
        total, count = total + own.double().sum(0), count + len(own)
    return (total / count).float()


def _result(right: np.ndarray, given: np.ndarray) -> dict[str, Any]:
    difference = paired_difference(right, given)
    return {
        "accuracy": float(right.mean()),
        "accuracy_se": accuracy_error(right),
        "difference": difference.value,
        "difference_ci": [difference.low, difference.high],
    }
