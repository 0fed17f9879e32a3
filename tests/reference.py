"""Slow, independent definitions of the method, for tests to compare the package with.

Written from the published description (Latent-SFT, arXiv 2510.15522, and its released code), not from the package: it
imports nothing of `latent_sft`, handles one example at a time, never pads, keeps no cache, builds every mask entry by
entry, computes all logits, and writes each loss as the sum in its definition, in float64. Symbols are the paper's:
P prompt with `<think>`, S_i chunks of the chain of thought, z_i latents, E closing delimiter, A answer, W the table of
input embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a reference result depends on besides weights and examples."""

    rate: int = 2
    top_k: int = 10
    temperature: float = 1.0
    projection: str = "input"
    marker_positions: str = "stretched"
    exclude_end: bool = False
    loss_reduction: str = "token"
    ce_weight: float = 1.0
    kl_weight: float = 1.0


# as the published code computes, and as the project does unless told otherwise
PUBLISHED = Settings()
DEFAULTS = Settings(marker_positions="transparent", exclude_end=True)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized problem; `prompt` ends with `<think>`, `answer` with the end-of-sequence token.

    `segment_lengths` cuts the chain of thought where it is not cut by count (one latent per step).
    """

    prompt: list[int]
    cot: list[int]
    end_think: list[int]
    answer: list[int]
    segment_lengths: list[int] | None = None


class Slot(NamedTuple):
    """One place of a sequence.

    Attributes:
        kind: prompt, text (chain of thought), marker, latent, end (delimiter) or answer.
        chunk: i of S_i for text, i of the marker or of z_i; 0 elsewhere.
        token: the token there; None for a marker and for a latent.
        position: position id.
    """

    kind: str
    chunk: int
    token: int | None
    position: int


# ---------------------------------------------------------------------------------------------- chunks and sequences


def chunks(cot: Sequence[int], rate: int) -> list[list[int]]:
    """S_1..S_N: `rate` tokens each, the last may be shorter (section 1.1)."""
    found: list[list[int]] = []
    for j, token in enumerate(cot):
        if j % rate == 0:
            found.append([])
        found[-1].append(token)
    return found


def pieces_of(example: Example, rate: int) -> list[list[int]]:
    """The chunks of an example: cut by its own lengths, or by count."""
    if example.segment_lengths is None:
        return chunks(example.cot, rate)
    rest, found = list(example.cot), []
    for length in example.segment_lengths:
        found.append([rest.pop(0) for _ in range(length)])
    return found


def encoder_slots(example: Example, pieces: Sequence[Sequence[int]], marker_positions: str) -> list[Slot]:
    """U = [P, S_1, marker, S_2, marker, ..., S_N, marker, E] (section 1.3).

    `stretched`: position ids are 0, 1, 2, ... over everything. `transparent`: a marker repeats the position id of the
    chain-of-thought token before it, and the text counts as if there were no markers.
    """
    plain: list[tuple[str, int, int | None]] = [("prompt", 0, token) for token in example.prompt]
    for i, piece in enumerate(pieces, start=1):
        plain += [("text", i, token) for token in piece]
        plain.append(("marker", i, None))
    plain += [("end", 0, token) for token in example.end_think]
    slots: list[Slot] = []
    for index, (kind, chunk, token) in enumerate(plain):
        markers_before = sum(1 for other in plain[:index] if other[0] == "marker")
        if marker_positions == "stretched":
            position = index
        elif kind == "marker":
            position = slots[-1].position
        else:
            position = index - markers_before
        slots.append(Slot(kind, chunk, token, position))
    return slots


def decoder_slots(example: Example, pieces: Sequence[Sequence[int]]) -> list[Slot]:
    """X = [P, z_1, S_2, z_2, S_3, ..., z_{N-1}, S_N, z_N, E, A] with dual-track positions (section 1.4)."""
    p, n = len(example.prompt), len(pieces)
    slots = [Slot("prompt", 0, token, position) for position, token in enumerate(example.prompt)]
    for i in range(1, n + 1):
        slots.append(Slot("latent", i, None, p - 1 + i))
        if i < n:
            for j, token in enumerate(pieces[i], start=1):  # pieces[i] is S_{i+1}
                slots.append(Slot("text", i + 1, token, p - 1 + i + j))
    for j, token in enumerate(example.end_think, start=1):
        slots.append(Slot("end", 0, token, p - 1 + n + j))
    for j, token in enumerate(example.answer, start=1):
        slots.append(Slot("answer", 0, token, p - 1 + n + len(example.end_think) + j))
    return slots


def latent_slots(example: Example, num_latents: int) -> list[Slot]:
    """Stage 2: [P, z_1, ..., z_N, E, A] at positions 0, 1, 2, ... (section 1.8)."""
    kinds: list[tuple[str, int, int | None]] = [("prompt", 0, token) for token in example.prompt]
    kinds += [("latent", i, None) for i in range(1, num_latents + 1)]
    kinds += [("end", 0, token) for token in example.end_think]
    kinds += [("answer", 0, token) for token in example.answer]
    return [Slot(kind, chunk, token, position) for position, (kind, chunk, token) in enumerate(kinds)]


def ce_pairs(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """(index that predicts, index predicted) for every token of S_2..S_N, E and A: each is read one slot earlier."""
    return [(t - 1, t) for t, slot in enumerate(slots) if slot.kind in ("text", "end", "answer")]


# -------------------------------------------------------------------------------------------------------------- masks


def induction_visible(slots: Sequence[Slot], query: int, key: int) -> bool:
    """Table of section 1.3: text and markers see the text before them and themselves, nobody an earlier marker."""
    if query == key:
        return True
    return key < query and slots[key].kind != "marker"


def supervision_visible(slots: Sequence[Slot], query: int, key: int) -> bool:
    """Table of section 1.4, one `if` for each of its rows."""
    q, k = slots[query], slots[key]
    if query == key:
        return True
    if key > query:
        return False
    if q.kind == "prompt":
        return k.kind == "prompt"
    if q.kind == "latent":
        return k.kind in ("prompt", "latent")
    if q.kind == "text":
        return (k.kind == "latent" and k.chunk == q.chunk - 1) or (k.kind == "text" and k.chunk == q.chunk)
    return k.kind in ("prompt", "latent", "end", "answer")


def dense_mask(slots: Sequence[Slot], visible: Any) -> list[list[bool]]:
    """`visible` for every pair of slots."""
    return [[visible(slots, query, key) for key in range(len(slots))] for query in range(len(slots))]


def padded_masks(batch: Sequence[Sequence[Slot]], length: int, visible: Any) -> list[list[list[bool]]]:
    """Masks of a right-padded batch by a triple loop; nobody sees padding, and a padding row sees itself (or it would
    be empty)."""
    out = []
    for slots in batch:
        rows = []
        for query in range(length):
            row = []
            for key in range(length):
                real = query < len(slots) and key < len(slots)
                row.append(visible(slots, query, key) if real else query == key)
            rows.append(row)
        out.append(rows)
    return out


# ------------------------------------------------------------------------------------------------------ superposition


def softmax(values: Sequence[float]) -> list[float]:
    """exp(x_i) / sum_j exp(x_j)."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / math.fsum(powers) for power in powers]


def superpose(logits: Sequence[float], top_k: int, temperature: float) -> dict[int, float]:
    """{vocabulary id: weight}: softmax over the `top_k` largest logits only (section 1.2)."""
    kept = sorted(range(len(logits)), key=lambda v: -logits[v])[:top_k]
    return dict(zip(kept, softmax([logits[v] / temperature for v in kept]), strict=True))


def mixture(weights: dict[int, float], table: Sequence[Sequence[float]]) -> list[float]:
    """z = sum_v alpha[v] W[v]."""
    return [math.fsum(alpha * table[v][j] for v, alpha in weights.items()) for j in range(len(table[0]))]


def noisy_weights(
    weights: Sequence[float], gumbel: Sequence[float], scale: float, temperature: float, clip: tuple[float, float]
) -> list[float]:
    """softmax((log(a + 1e-10) + clamp(scale * g)) / temperature) of section 1.8; ids stay as they are."""
    clamped = [min(max(scale * g, clip[0]), clip[1]) for g in gumbel]
    return softmax([(math.log(a + 1e-10) + g) / temperature for a, g in zip(weights, clamped, strict=True)])


# ------------------------------------------------------------------------------------------------------------- losses


def log_probability(logits: Sequence[float], token: int) -> float:
    """log p(token) over the full vocabulary."""
    top = max(logits)
    return logits[token] - top - math.log(math.fsum(math.exp(value - top) for value in logits))


def normalise(examples: Sequence[Sequence[Sequence[Any]]], loss_reduction: str) -> Any:
    """Reduce losses[example][segment][token], where the segments are S_2, ..., S_N and E with A (sections 1.5, 1.8).

    token: mean over all tokens (published code). segment: mean over an example's segments of the mean over the
    segment's tokens, then over examples (paper). sample: mean over an example's tokens, then over examples.
    """
    if loss_reduction == "token":
        flat = [loss for segments in examples for segment in segments for loss in segment]
        return sum(flat) / len(flat)
    if loss_reduction == "segment":
        means = [sum(sum(segment) / len(segment) for segment in segments) / len(segments) for segments in examples]
        return sum(means) / len(means)
    if loss_reduction == "sample":
        means = []
        for segments in examples:
            flat = [loss for segment in segments for loss in segment]
            means.append(sum(flat) / len(flat))
        return sum(means) / len(means)
    raise ValueError(loss_reduction)


def kl_divergence(teacher: dict[int, float], logits: Sequence[float]) -> float:
    """KL(teacher || student): the teacher renormalised over its kept ids, the student over the full vocabulary."""
    total = math.fsum(teacher.values())
    return math.fsum(
        a / total * (math.log(a / total) - log_probability(logits, v)) for v, a in teacher.items() if a > 0
    )


# ------------------------------------------------------------------------------------- losses of whole models, autograd


def _additive(slots: Sequence[Slot], visible: Any, like: Tensor) -> Tensor:
    rows = [[0.0 if seen else -math.inf for seen in row] for row in dense_mask(slots, visible)]
    return torch.tensor(rows, dtype=like.dtype)[None, None]


def _hidden(backbone: Any, inputs: list[Tensor], slots: Sequence[Slot], visible: Any) -> Tensor:
    embeddings = torch.stack(inputs)[None]
    positions = torch.tensor([[slot.position for slot in slots]])
    mask = _additive(slots, visible, embeddings)
    output = backbone(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state[0]


def _causal(slots: Sequence[Slot], query: int, key: int) -> bool:
    return key <= query


def _superposed(hidden: Tensor, projection: Tensor, settings: Settings, end: int) -> tuple[Tensor, Tensor]:
    logits = projection @ hidden
    if settings.exclude_end:
        allowed = torch.tensor([v != end for v in range(len(logits))])
        logits = torch.where(allowed, logits, torch.full_like(logits, -math.inf))
    values, ids = torch.sort(logits, descending=True)
    kept = values[: settings.top_k].double() / settings.temperature
    return ids[: settings.top_k], torch.exp(kept - torch.logsumexp(kept, 0))


def _token_losses(logits: Tensor, slots: Sequence[Slot]) -> list[list[Tensor]]:
    """-log p of every target, grouped by segment: S_2, ..., S_N, then E with A."""
    groups: dict[int, list[Tensor]] = {}
    for source, target in ce_pairs(slots):
        chunk = slots[target].chunk if slots[target].kind == "text" else 1 << 30
        row = torch.log_softmax(logits[source].double(), dim=-1)
        groups.setdefault(chunk, []).append(-row[slots[target].token])
    return [groups[chunk] for chunk in sorted(groups)]


def _at_markers(
    encoder: Any, marker: Tensor, decoder: Any, example: Example, settings: Settings
) -> tuple[list[Tensor], Tensor]:
    """Hidden states [D] at the markers, and the table [V, D] that projects them."""
    slots = encoder_slots(example, pieces_of(example, settings.rate), settings.marker_positions)
    table = encoder.get_input_embeddings().weight
    inputs = [marker if slot.kind == "marker" else table[slot.token] for slot in slots]
    hidden = _hidden(encoder, inputs, slots, induction_visible)
    owner = decoder.get_input_embeddings() if settings.projection == "input" else decoder.get_output_embeddings()
    return [hidden[t] for t, slot in enumerate(slots) if slot.kind == "marker"], owner.weight.detach()


def encode(
    encoder: Any, marker: Tensor, decoder: Any, example: Example, settings: Settings
) -> list[tuple[Tensor, Tensor]]:
    """(ids [K], weights [K]) of z_1..z_N; gradients reach the encoder and the marker, never the decoder's tables.

    Args:
        encoder: a headless `LlamaModel`.
        marker: [D], the marker's input embedding.
        decoder: a `LlamaForCausalLM`, whose input table or head projects.
    """
    states, projection = _at_markers(encoder, marker, decoder, example, settings)
    return [_superposed(hidden, projection, settings, example.end_think[0]) for hidden in states]


def stage1_loss(encoder: Any, marker: Tensor, decoder: Any, examples: Sequence[Example], settings: Settings) -> Tensor:
    """The loss of stage 1 (sections 1.2 to 1.5)."""
    losses = []
    for example in examples:
        slots = decoder_slots(example, pieces_of(example, settings.rate))
        table = decoder.get_input_embeddings().weight
        latents = encode(encoder, marker, decoder, example, settings)
        mixed = [sum(a * table.detach()[v] for v, a in zip(*latent, strict=True)) for latent in latents]
        inputs = [
            mixed[slot.chunk - 1].to(table.dtype) if slot.kind == "latent" else table[slot.token] for slot in slots
        ]
        hidden = _hidden(decoder.model, inputs, slots, supervision_visible)
        losses.append(_token_losses(decoder.lm_head(hidden), slots))
    return settings.ce_weight * normalise(losses, settings.loss_reduction)


def suffix_slots(example: Example, pieces: Sequence[Sequence[int]], cut: int) -> list[Slot]:
    """u_I and t_I of suffix reconstruction: [P, z_1, ..., z_I, S_{I+1}, ..., S_N, E, A] at positions 0, 1, 2, ..."""
    plain: list[tuple[str, int, int | None]] = [("prompt", 0, token) for token in example.prompt]
    plain += [("latent", i, None) for i in range(1, cut + 1)]
    plain += [("text", i, token) for i, piece in enumerate(pieces, start=1) if i > cut for token in piece]
    plain += [("end", 0, token) for token in example.end_think]
    plain += [("answer", 0, token) for token in example.answer]
    return [Slot(kind, chunk, token, position) for position, (kind, chunk, token) in enumerate(plain)]


def suffix_loss(
    encoder: Any, marker: Tensor, decoder: Any, examples: Sequence[Example], cuts: Sequence[int], settings: Settings
) -> Tensor:
    """The loss of stage 1 where the decoder recovers all that follows z_I, I = cuts[example]."""
    losses = []
    for example, cut in zip(examples, cuts, strict=True):
        slots = suffix_slots(example, pieces_of(example, settings.rate), cut)
        table = decoder.get_input_embeddings().weight
        latents = encode(encoder, marker, decoder, example, settings)
        mixed = [sum(a * table.detach()[v] for v, a in zip(*latent, strict=True)) for latent in latents]
        inputs = [
            mixed[slot.chunk - 1].to(table.dtype) if slot.kind == "latent" else table[slot.token] for slot in slots
        ]
        logits = decoder.lm_head(_hidden(decoder.model, inputs, slots, _causal))
        losses.append(_token_losses(logits, slots))
    return settings.ce_weight * normalise(losses, settings.loss_reduction)


def span_loss(
    encoder: Any,
    marker: Tensor,
    decoder: Any,
    examples: Sequence[Example],
    word_of: Any,
    settings: Settings,
) -> Tensor:
    """KL(code word of a chunk || softmax over the vocabulary at its marker), mean over an example's chunks, then over
    examples; `word_of(chunk)` is {id: mass}. An empty chunk has no word; an example of such chunks does not count."""
    means = []
    for example in examples:
        states, projection = _at_markers(encoder, marker, decoder, example, settings)
        terms = []
        for hidden, piece in zip(states, pieces_of(example, settings.rate), strict=True):
            if piece:
                log_p = torch.log_softmax((projection @ hidden).double() / settings.temperature, dim=-1)
                terms.append(sum(m * (math.log(m) - log_p[v]) for v, m in word_of(piece).items()))
        if terms:
            means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


def stage2_loss(
    model: Any, examples: Sequence[Example], labels: Sequence[Sequence[dict[int, float]]], settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, CE, KL) of stage 2 (section 1.8) without noise; `labels[example][t]` is {id: weight} of z_{t+1}."""
    ce_losses, kl_losses = [], []
    for example, latents in zip(examples, labels, strict=True):
        slots = latent_slots(example, len(latents))
        table = model.get_input_embeddings().weight
        mixed = [sum(a * table.detach()[v] for v, a in latent.items()) for latent in latents]
        inputs = [mixed[slot.chunk - 1] if slot.kind == "latent" else table[slot.token] for slot in slots]
        logits = model.lm_head(_hidden(model.model, inputs, slots, _causal))
        ce_losses.append(_token_losses(logits, slots))
        terms = []
        for t, slot in enumerate(slots):
            if slot.kind == "latent":
                row = torch.log_softmax(logits[t - 1].double(), dim=-1)  # z_t is read one position early
                teacher = latents[slot.chunk - 1]
                total = sum(teacher.values())
                terms.append(sum(a / total * (math.log(a / total) - row[v]) for v, a in teacher.items() if a > 0))
        kl_losses.append(sum(terms) / len(terms))
    ce = normalise(ce_losses, settings.loss_reduction)
    kl = sum(kl_losses) / len(kl_losses)
    return settings.ce_weight * ce + settings.kl_weight * kl, ce, kl


# ----------------------------------------------------------------------------------------------------------- decoding


class Thought(NamedTuple):
    """What decoding one example gives: latents as {id: weight}, answer tokens without eos, whether eos came."""

    latents: list[dict[int, float]]
    answer: list[int]
    finished: bool


@torch.no_grad()
def decode(
    model: Any,
    prompt: Sequence[int],
    *,
    end_think: Sequence[int],
    eos: int,
    top_k: int,
    temperature: float = 1.0,
    min_latents: int = 0,
    max_latents: int = 128,
    max_answer_tokens: int = 64,
    exclude_end: bool = False,
) -> Thought:
    """Latent thinking, then a greedy answer (section 1.9); every step runs the whole sequence again.

    Thinking stops if and only if the most likely next token is the first one of `</think>`, not before `min_latents`
    and at `max_latents` in any case; then all of `</think>` is fed, whatever the model would have said. While it may
    not stop, that token is left out of the mixture as well (the published code has no minimum).
    """
    table = model.get_input_embeddings().weight
    inputs = [table[token] for token in prompt]

    def next_logits() -> list[float]:
        return model(inputs_embeds=torch.stack(inputs)[None], use_cache=False).logits[0, -1].tolist()

    latents: list[dict[int, float]] = []
    while len(latents) < max_latents:
        logits = next_logits()
        most_likely = max(range(len(logits)), key=lambda v: logits[v])
        if most_likely == end_think[0] and len(latents) >= min_latents:
            break
        if exclude_end or len(latents) < min_latents:
            logits[end_think[0]] = -math.inf
        latents.append(superpose(logits, top_k, temperature))
        inputs.append(torch.tensor(mixture(latents[-1], table.tolist()), dtype=table.dtype))
    inputs += [table[token] for token in end_think]
    answer: list[int] = []
    while len(answer) < max_answer_tokens:
        logits = next_logits()
        token = max(range(len(logits)), key=lambda v: logits[v])
        if token == eos:
            return Thought(latents, answer, True)
        answer.append(token)
        inputs.append(table[token])
    return Thought(latents, answer, False)
