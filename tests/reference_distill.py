"""Slow definitions of Coconut, CODI, PCCoT and KaVa for one example and a plain Llama: whole sequences and loops.

Every Jacobi iteration, and every latent of the sequential way, is a new pass over everything from the first token on,
through the Hugging Face model with its own eager attention; keys and values are read off the cache it returns. Scores,
selection and distances are loops over heads and tokens. Nothing is shared with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Example:
    """Tokens of one example; `steps` are the parts of its CoT."""

    prompt: list[int]
    steps: list[list[int]]
    end: list[int]
    answer: list[int]


@dataclass
class Rules:
    """What the methods leave open, under the names of the configuration."""

    num_latents: int = 3
    iterations: int = 2
    drop_last_step: bool = True
    hidden_loss: str = "smooth_l1"
    hidden_std: str = "layer"
    hidden_embedding: bool = False
    selector: str = "rkv"
    importance: float = 0.1
    queries: str = "answer"
    pooling: str = "mean"
    normalise: str = "trace"
    span: str = "steps"
    kv_loss: str = "smooth_l1"
    layer_std: bool = False
    short: str = "mask"
    reduction: str = "mean"


@dataclass
class Seen:
    """A pass over a whole sequence: `[T, D]` hidden states of embedding and layers, logits `[T, V]`, and for each layer
    keys and values `[H_kv, T, d]` and queries before and after their rotation `[H, T, d]`."""

    layers: list[Tensor]
    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor] = field(default_factory=list)


def look(lm: nn.Module, embeds: Tensor) -> Seen:
    """Run the model over embeddings `[T, D]` of one whole sequence."""
    projected: list[Tensor] = []
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda _module, _inputs, output: projected.append(output[0]))
        for layer in lm.model.layers
    ]
    out = lm(inputs_embeds=embeds[None], use_cache=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    cache = out.past_key_values
    size = cache.layers[0].keys.shape[-1]
    seen = Seen(
        [states[0] for states in out.hidden_states],
        out.logits[0],
        [layer.keys[0] for layer in cache.layers],
        [layer.values[0] for layer in cache.layers],
    )
    for query in projected:
        seen.queries.append(rotated(query.unflatten(-1, (-1, size)).transpose(0, 1)))
    return seen


def rotated(states: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotate `[H, T, d]` by position: the pair (i, i + d/2) by the angle t * theta^(-2i/d)."""
    half = states.shape[-1] // 2
    turned = []
    for t in range(states.shape[1]):
        angles = torch.tensor([t * theta ** (-i / half) for i in range(half)], dtype=states.dtype)
        a, b = states[:, t, :half], states[:, t, half:]
        turned.append(torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1))
    return torch.stack(turned, dim=1)


def next_input(hidden: Tensor, projection: nn.Module) -> Tensor:
    """Linear, GELU, Linear, LayerNorm; or the hidden state itself."""
    if isinstance(projection, nn.Identity):
        return hidden
    _, first, _, second, norm = projection
    inner = functional.gelu(functional.linear(hidden, first.weight, first.bias))
    out = functional.linear(inner, second.weight, second.bias)
    return functional.layer_norm(out, out.shape[-1:], norm.weight, norm.bias, norm.eps)


def latents(
    lm: nn.Module, projection: nn.Module, placeholder: Tensor, prompt: Tensor, count: int, rounds: int
) -> Tensor:
    """Return the latents' inputs `[M, D]` of the pass that the answer reads; `prompt` `[P, D]`."""
    if rounds >= count:
        inputs = prompt
        for _ in range(count):
            inputs = torch.cat([inputs, next_input(look(lm, inputs).layers[-1][-1:], projection)])
        return inputs[len(prompt) :]
    inputs = placeholder.expand(count, -1)
    for _ in range(rounds):
        hidden = look(lm, torch.cat([prompt, inputs])).layers[-1]
        # z_1 comes from the prompt's last token, which never sees a latent
        inputs = next_input(hidden[len(prompt) - 1 : -1], projection)
    return inputs


def cross_entropy(logits: Tensor, ids: list[int], first: int) -> Tensor:
    """Sum over the targets `ids[first:]`, each predicted one place earlier."""
    total = logits.new_zeros(())
    for t in range(first, len(ids)):
        total = total - torch.log_softmax(logits[t - 1], dim=-1)[ids[t]]
    return total


def teacher_steps(example: Example, rules: Rules) -> list[list[int]]:
    return example.steps[:-1] if rules.drop_last_step else example.steps


def terms(lm: nn.Module, projection: nn.Module, placeholder: Tensor, example: Example, rules: Rules, seed: int = 0):
    """Return the four terms of one example, and the kept tokens of every layer and head."""
    table = lm.get_input_embeddings().weight
    prompt, tail = table[torch.tensor(example.prompt)], [*example.end, *example.answer]
    thoughts = latents(lm, projection, placeholder, prompt, rules.num_latents, rules.iterations)
    student = look(lm, torch.cat([prompt, thoughts, table[torch.tensor(tail)]]))
    start = len(prompt) + len(thoughts)  # of the tail
    ids = [*example.prompt, *[0] * len(thoughts), *tail]
    trace = [token for step in teacher_steps(example, rules) for token in step]
    teacher_ids = [*example.prompt, *trace, *tail]
    teacher = look(lm, table[torch.tensor(teacher_ids)])
    behind = len(example.prompt) + len(trace)  # of the teacher's tail
    before = len(example.end) - 1
    first = 0 if rules.hidden_embedding else 1
    hidden = hidden_term(
        [s[start + before] for s in student.layers[first:]],
        [s[behind + before].detach() for s in teacher.layers[first:]],
        rules,
    )
    kv, kept = kv_term(student, teacher, example, len(trace), rules)
    return {
        "ce": cross_entropy(student.logits, ids, start + len(example.end)),
        "teacher_ce": cross_entropy(teacher.logits, teacher_ids, len(example.prompt)),
        "hidden": hidden,
        "kv": kv,
    }, kept


def distance(a: Tensor, b: Tensor, kind: str) -> Tensor:
    gap = (a - b).abs()
    if kind == "l1":
        return gap
    if kind == "mse":
        return gap**2
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5)


def spread(values: Tensor) -> Tensor:
    """Standard deviation, divided by the number of values."""
    return (values - values.mean()).square().mean().sqrt()


def hidden_term(student: list[Tensor], teacher: list[Tensor], rules: Rules) -> Tensor:
    total = student[0].new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        value = distance(ours, theirs, rules.hidden_loss).mean()
        if rules.hidden_std == "layer":
            value = value / spread(theirs)
        if rules.hidden_std == "all":
            value = value / spread(torch.stack(teacher))
        total = total + value
    return total / len(student)


def attention_to(
    teacher: Seen, layer: int, head: int, tokens: list[int], queries: list[int], rules: Rules
) -> list[float]:
    """Importance of each of `tokens` for a key head."""
    keys, groups = teacher.keys[layer][head], len(teacher.queries[layer]) // len(teacher.keys[layer])
    size = keys.shape[-1]
    total = [0.0] * len(tokens)
    for query in queries:
        visible = range(query + 1)
        heads = []
        for g in range(groups):
            q = teacher.queries[layer][head * groups + g][query]
            heads.append([(q @ keys[t]).item() / math.sqrt(size) for t in visible])
        if rules.pooling == "max":
            heads = [[max(values) for values in zip(*heads, strict=True)]]
        for scores in heads:
            among = list(visible) if rules.normalise == "all" else [t for t in tokens if t <= query]
            sum_of = sum(math.exp(scores[t]) for t in among)
            for i, t in enumerate(tokens):
                if t <= query:
                    total[i] += math.exp(scores[t]) / sum_of / len(heads) / len(queries)
    return total


def unlike(keys: list[Tensor]) -> list[float]:
    """Softmax of the negated sum of cosines with the others over the number of keys."""
    means = []
    for i, a in enumerate(keys):
        cosines = [(a @ b / ((a.norm() + 1e-8) * (b.norm() + 1e-8))).item() for j, b in enumerate(keys) if j != i]
        means.append(-sum(cosines) / len(keys))
    return [math.exp(m) / sum(math.exp(n) for n in means) for m in means]


def keep(
    teacher: Seen, keys: Tensor, layer: int, head: int, tokens: list[int], queries: list[int], rules: Rules
) -> list[int]:
    """Return which of `tokens` a head keeps, in time order."""
    count = rules.num_latents
    if len(tokens) <= count:
        return tokens
    if rules.selector == "crop":
        return tokens[:count]
    if rules.selector == "uniform":
        return [tokens[math.floor((i + 0.5) * len(tokens) / count)] for i in range(count)]
    important = attention_to(teacher, layer, head, tokens, queries, rules)
    diverse = unlike([keys[t] for t in tokens])
    share = {"rkv": rules.importance, "cosine": 0.0, "attention": 1.0}[rules.selector]
    scores = [share * a + (1 - share) * b for a, b in zip(important, diverse, strict=True)]
    best = sorted(range(len(tokens)), key=lambda i: -scores[i])[:count]
    return [tokens[i] for i in sorted(best)]


def kv_term(student: Seen, teacher: Seen, example: Example, trace: int, rules: Rules) -> tuple[Tensor, list]:
    first, count = len(example.prompt), rules.num_latents
    tokens = list(range(first, first + trace + (len(example.end) if rules.span == "delimiter" else 0)))
    answers = range(first + trace + len(example.end), first + trace + len(example.end) + len(example.answer))
    queries = list(answers) if rules.queries == "answer" else list(range(first + trace, answers.stop))
    slots = count if rules.short == "zero" else min(count, len(tokens))
    total, kept = student.logits.new_zeros(()), []
    for layer in range(len(student.keys)):
        theirs = teacher.keys[layer]
        chosen = [keep(teacher, theirs[h], layer, h, tokens, queries, rules) for h in range(len(theirs))]
        kept.append(chosen)
        for ours, targets in ((student.keys[layer], theirs), (student.values[layer], teacher.values[layer])):
            targets = targets.detach()
            taken = [targets[h][t] for h in range(len(targets)) for t in chosen[h]]
            scale = spread(torch.stack(taken)) if rules.layer_std and taken else torch.ones(())
            values = []
            for h in range(len(targets)):
                for m in range(slots):
                    goal = targets[h][chosen[h][m]] if m < len(chosen[h]) else torch.zeros_like(targets[h][0])
                    values.append(distance(ours[h][first + m] / scale, goal / scale, rules.kv_loss))
            if values:
                every = torch.stack(values)
                value = every.mean() if rules.reduction == "mean" else every.sum() / count
                total = total + value / 2
    return total / len(student.keys), kept


def coconut(lm: nn.Module, example: Example, replaced: int, count: int) -> Tensor:
    """Cross-entropy of the steps from `replaced` on, delimiter and answer, after `count` latents."""
    table = lm.get_input_embeddings().weight
    prompt = table[torch.tensor(example.prompt)]
    thoughts = latents(lm, nn.Identity(), prompt[0], prompt, count, count)
    rest = [token for step in example.steps[replaced:] for token in step] + example.end + example.answer
    seen = look(lm, torch.cat([prompt, thoughts, table[torch.tensor(rest)]]))
    return cross_entropy(seen.logits, [*example.prompt, *[0] * count, *rest], len(prompt) + count)
