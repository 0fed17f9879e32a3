"""Slow, independent definitions of how models think in hidden states and in soft mixtures, for tests to compare with.

Written from the descriptions of Coconut, CODI (arXiv 2502.21074), PCCoT (arXiv 2506.18582), KaVa (arXiv 2510.02312) and
Soft Thinking (arXiv 2505.15778), not from the package: one problem at a time, no padding, no cache, the whole sequence
through the model's own `forward` again for every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Solved:
    """What one problem gave.

    Attributes:
        inputs: of the latents, `[D]` each (thoughts in hidden states).
        said: logits `[V]` of the states they were made of.
        mixtures: {token: weight} of each soft step.
        thought: likeliest token of each soft step.
        answer: tokens, EOS included.
        passes: calls of the model that a cache would need.
    """

    inputs: list[Tensor] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)
    mixtures: list[dict[int, float]] = field(default_factory=list)
    thought: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    passes: int = 0


def states_and_logits(model, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states `[T, D]` after the final norm and logits `[T, V]` of a plain causal pass."""
    out = model(inputs_embeds=torch.stack(list(inputs))[None], use_cache=False, output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def projected(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Linear, GELU, Linear, LayerNorm of one state `[D]`, from a state dict; the state itself where there is none."""
    if "projection.1.weight" not in weights:
        return hidden
    inner = weights["projection.1.weight"] @ hidden + weights["projection.1.bias"]
    inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    out = weights["projection.3.weight"] @ inner + weights["projection.3.bias"]
    out = (out - out.mean()) / torch.sqrt(out.var(unbiased=False) + 1e-5)
    return out * weights["projection.4.weight"] + weights["projection.4.bias"]


@torch.no_grad()
def one_after_another(model, f: Callable[[Tensor], Tensor], count: int, prompt, end, eos: int, most: int) -> Solved:
    """Coconut, CODI: z_i = f(state before it), then `</think>`, then the answer."""
    embed = model.get_input_embeddings()
    inputs, found = [embed(torch.tensor(t)) for t in prompt], Solved()
    for _ in range(count):
        states, logits = states_and_logits(model, inputs)
        found.inputs.append(f(states[-1]))
        found.said.append(logits[-1])
        inputs.append(found.inputs[-1])
    _answer(model, found, inputs, end, eos, most)
    found.passes = 1 + count + len(end) + len(found.answer) - 1
    return found


@torch.no_grad()
def all_at_once(
    model, f: Callable[[Tensor], Tensor], placeholder: Tensor, count: int, times: int, prompt, end, eos: int, most: int
) -> Solved:
    """PCCoT, KaVa: z_1 = f(state of <think>) for good; z_i = f(state of z_{i-1} in the iteration before).

    Iteration 0 is over placeholders. The latents of an iteration see the prompt and each other, causally; the answer
    sees those of the last one. With `times` 0 it sees the placeholders.
    """
    embed = model.get_input_embeddings()
    before, found = [embed(torch.tensor(t)) for t in prompt], Solved(inputs=[placeholder] * count)
    at = len(prompt) - 1
    states, logits = states_and_logits(model, [*before, *found.inputs])
    made_of = [states[at + i] for i in range(count)]
    found.said = [logits[at + i] for i in range(count)]
    for iteration in range(times):
        found.inputs = [f(state) for state in made_of]
        if iteration < times - 1:
            states, logits = states_and_logits(model, [*before, *found.inputs])
            made_of = [made_of[0]] + [states[at + i] for i in range(1, count)]
            found.said = [found.said[0]] + [logits[at + i] for i in range(1, count)]
    _answer(model, found, [*before, *found.inputs], end, eos, most)
    found.passes = 1 + times + len(found.answer) - 1
    return found


def mixture(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The nucleus of softmax(logits / T): at most k tokens, renormalised."""
    shares = torch.softmax(logits.double() / temperature, 0).tolist()
    order = sorted(range(len(shares)), key=lambda v: -shares[v])
    kept: list[int] = []
    for token in order[:top_k]:
        if sum(shares[v] for v in kept) >= top_p or shares[token] < min_p * shares[order[0]]:
            break
        kept.append(token)
    total = sum(shares[v] for v in kept)
    return {v: shares[v] / total for v in kept}


@torch.no_grad()
def softly(
    model, prompt, end, eos: int, most: int, cap: int, *, temperature, top_k, top_p, min_p, cold_entropy, cold_steps
) -> Solved:
    """Soft Thinking; tokens that spell the delimiter are fed plainly, and all of it spelled ends thinking."""
    embed, end = model.get_input_embeddings(), list(end)
    inputs, found = [embed(torch.tensor(t)) for t in prompt], Solved()
    cold, steps = 0, 0
    while steps < cap:
        _, logits = states_and_logits(model, inputs)
        token = int(logits[-1].argmax())
        log_shares = torch.log_softmax(logits[-1].double() / temperature, 0)
        cold = cold + 1 if float(-(log_shares.exp() * log_shares).sum()) < cold_entropy else 0
        if cold_entropy > 0 and cold >= cold_steps:
            break
        steps += 1
        found.thought.append(token)
        spelled = any(found.thought[-n:] == end[:n] for n in range(1, len(end) + 1))
        weights = {token: 1.0} if spelled else mixture(logits[-1], temperature, top_k, top_p, min_p)
        found.mixtures.append(weights)
        if token == eos:
            found.passes = steps
            return found
        inputs.append(sum(w * embed(torch.tensor(v)) for v, w in weights.items()))
        if found.thought[-len(end) :] == end:
            del found.thought[-len(end) :], found.mixtures[-len(end) :]
            _answer(model, found, inputs, [], eos, most)
            found.passes = steps + len(found.answer)
            return found
    _answer(model, found, inputs, end, eos, most)
    found.passes = steps + len(end) + len(found.answer)
    return found


def _answer(model, found: Solved, inputs: list[Tensor], end, eos: int, most: int) -> None:
    embed = model.get_input_embeddings()
    inputs = [*inputs, *(embed(torch.tensor(t)) for t in end)]
    while len(found.answer) < most and eos not in found.answer:
        found.answer.append(int(states_and_logits(model, inputs)[1][-1].argmax()))
        inputs.append(embed(torch.tensor(found.answer[-1])))
