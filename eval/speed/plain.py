"""The plain path: the same numbers as the package, computed the way the published implementation computes them.

- stage 1: the published interleaved order `[P, z_1, S_2, z_2, .., S_N, z_N, E, A]`; one dense additive `[1, T, T]` mask
  a sample, filled in a Python loop on the CPU; logits of the decoder over the full vocabulary at every position;
  shifted cross-entropy that ignores -100.
- stage 2: logits at every position; KL from a log-softmax over the full vocabulary, row by row.
- labels: one forward per example.
- decoding: one problem at a time; the cache is dropped after thinking and the whole prefix is read again for the
  answer.

The published encoder has no head: its hidden states are projected at the markers only, and so they are here. Written
from the description of the method, for the published settings (`marker_positions: stretched`, `marker_input: learned`,
`exclude_end: false`, no noise), and left plain on purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional

from latent_sft.method.types import LatentSpec, Superposition

Row = Mapping[str, Any]
IGNORE = -100


class Answered(NamedTuple):
    """What one problem produced: latents `[n, K]` and the answer without EOS."""

    latent: Superposition
    answer_ids: list[int]


def stage1_inputs(rows: Sequence[Row], spec: LatentSpec) -> dict[str, Any]:
    """Lay out and mask a batch: what a data loader does.

    Returns:
        `encoder_ids, ids, labels, position` `[B, T]`, `encoder_mask, mask` `[B, 1, T, T]`, and per sample the indices
        `markers` and `latents`.
    """
    return {**encoder_inputs(rows, spec), **_decoder_inputs(rows, spec)}


def encoder_inputs(rows: Sequence[Row], spec: LatentSpec) -> dict[str, Any]:
    """The encoder's half of `stage1_inputs`: `[P, S_1, m, .., S_N, m, E]`."""
    texts, kinds = [], []
    for row in rows:
        ids, kind, cot = list(row["prompt"]), ["main"] * len(row["prompt"]), iter(row["cot"])
        for length in row["segment_lengths"]:
            ids += [*itertools.islice(cot, length), 0]
            kind += [*["main"] * length, "marker"]
        texts.append([*ids, *spec.end_think_ids])
        kinds.append([*kind, *["main"] * len(spec.end_think_ids)])
    markers = [_places(kind, "marker") for kind in kinds]
    return {"encoder_ids": _padded(texts, spec.pad_id), "encoder_mask": _dense(kinds), "markers": markers}


def _decoder_inputs(rows: Sequence[Row], spec: LatentSpec) -> dict[str, Any]:
    texts, labels, positions, kinds = [], [], [], []
    for row in rows:
        # labels are those of the token at its own place, not shifted
        ids, kind, at = list(row["prompt"]), ["main"] * len(row["prompt"]), list(range(len(row["prompt"])))
        label, cot, place = [IGNORE] * len(ids), iter(row["cot"][row["segment_lengths"][0] :]), len(ids)
        for length in [*row["segment_lengths"][1:], 0]:
            chunk = list(itertools.islice(cot, length))
            ids += [0, *chunk]
            label += [IGNORE, *chunk]
            kind += ["latent", *["branch"] * length]
            at += range(place, place + 1 + length)
            place += 1
        tail = [*spec.end_think_ids, *row["answer"]]
        texts.append(ids + tail)
        labels.append(label + tail)
        kinds.append(kind + ["main"] * len(tail))
        positions.append([*at, *range(place, place + len(tail))])
    return {
        "ids": _padded(texts, spec.pad_id),
        "labels": _padded(labels, IGNORE),
        "position": _padded(positions, 0),
        "latents": [_places(kind, "latent") for kind in kinds],
        "mask": _dense(kinds),
    }


def _dense(kinds: Sequence[Sequence[str]]) -> Tensor:
    """Return `[B, 1, T, T]`: all see the main track before; markers are not seen, a branch sees from its latent."""
    longest = max(map(len, kinds))
    masks = torch.full((len(kinds), 1, longest, longest), torch.finfo(torch.float32).min)
    for (mask,), kind in zip(masks, kinds, strict=True):
        seen, latent = mask[0].clone(), 0
        for t, what in enumerate(kind):
            if what == "branch":
                mask[t, latent : t + 1] = 0.0
                continue
            mask[t] = seen
            mask[t, t] = 0.0
            if what != "marker":
                seen[t], latent = 0.0, t
    return masks


def _places(kinds: Sequence[str], what: str) -> list[int]:
    return [t for t, kind in enumerate(kinds) if kind == what]


def _padded(lists: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, lists))
    return torch.tensor([[*ids, *[value] * (longest - len(ids))] for ids in lists])


class PlainStage1(nn.Module):
    """Stage 1 over the inputs of `stage1_inputs`."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, marker: Tensor, spec: LatentSpec) -> None:
        super().__init__()
        self.encoder, self.decoder, self.spec = encoder, decoder, spec
        self.marker = nn.Parameter(marker.clone())

    def encode(self, batch: Mapping[str, Any], full_logits: bool = False) -> list[Superposition]:
        """Return the latents `[N, K]` of every sample.

        Args:
            batch: from `encoder_inputs`.
            full_logits: also project every other position, as a model with a head does.
        """
        embeds = self.encoder.get_input_embeddings()(batch["encoder_ids"])
        for b, at in enumerate(batch["markers"]):
            embeds[b, torch.tensor(at, device=embeds.device)] = self.marker
        body = self.encoder.get_decoder()
        hidden = body(inputs_embeds=embeds, attention_mask=batch["encoder_mask"], use_cache=False).last_hidden_state
        table = self.decoder.get_input_embeddings().weight.detach()
        every = hidden @ table.T if full_logits else None
        latents = []
        for b, at in enumerate(batch["markers"]):
            index = torch.tensor(at, device=hidden.device)
            logits = every[b, index] if every is not None else hidden[b, index] @ table.T
            kept, ids = logits.topk(self.spec.top_k, dim=-1)
            latents.append(Superposition(ids, torch.softmax(kept.float(), dim=-1)))
        return latents

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean cross-entropy over labelled tokens."""
        latents = self.encode(batch)
        table = self.decoder.get_input_embeddings().weight.detach()
        embeds = self.decoder.get_input_embeddings()(batch["ids"])
        for b, (latent, at) in enumerate(zip(latents, batch["latents"], strict=True)):
            embeds[b, torch.tensor(at, device=embeds.device)] = _mixed(latent, table)
        out = self.decoder(
            inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["position"], use_cache=False
        )
        return _shifted_cross_entropy(out.logits, batch["labels"])


def stage2_inputs(rows: Sequence[Row], labels: Sequence[Superposition], spec: LatentSpec) -> dict[str, Any]:
    """Pair rows with their stored latents; there is no mask to build."""
    tails = [torch.tensor([*spec.end_think_ids, *row["answer"]]) for row in rows]
    return {"prompts": [torch.tensor(row["prompt"]) for row in rows], "tails": tails, "latents": list(labels)}


def stage2_loss(lm: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return cross-entropy (mean over tokens) plus KL (mean over latents, then over samples)."""
    table = lm.get_input_embeddings().weight
    pieces, labels = [], []
    for prompt, latent, tail in zip(batch["prompts"], batch["latents"], batch["tails"], strict=True):
        pieces.append(torch.cat([table[prompt], _mixed(latent, table.detach()), table[tail]]))
        ignored = tail.new_full((len(prompt) + len(latent.ids),), IGNORE)
        labels.append(torch.cat([ignored, tail]))
    embeds = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    real = nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in labels], batch_first=True)
    target = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    logits = lm(inputs_embeds=embeds, attention_mask=real, use_cache=False).logits
    divergences = []
    for b, (prompt, latent) in enumerate(zip(batch["prompts"], batch["latents"], strict=True)):
        first = len(prompt) - 1
        student = functional.log_softmax(logits[b, first : first + len(latent.ids)].float(), dim=-1)
        chosen = student.gather(-1, latent.ids)
        divergences.append((latent.weights * (latent.weights.log() - chosen)).sum(-1).mean())
    return _shifted_cross_entropy(logits, target) + torch.stack(divergences).mean()


@torch.no_grad()
def labels(model: PlainStage1, rows: Sequence[Row], full_logits: bool = False) -> list[Superposition]:
    """Return the latents of every row: layout, mask and one forward per example."""
    device = model.marker.device
    return [model.encode(send_to_device(encoder_inputs([row], model.spec), device), full_logits)[0] for row in rows]


@torch.no_grad()
def answer(lm: nn.Module, spec: LatentSpec, prompt: Sequence[int]) -> Answered:
    """Solve one problem: latents with a cache; then prompt, latents and `</think>` are read again for the answer."""
    table = lm.get_input_embeddings().weight
    prefix = table[torch.tensor([prompt], device=table.device)]
    embeds, cache, ids, weights = prefix, None, [], []
    while True:
        out = lm(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits[0, -1], out.past_key_values
        if int(logits.argmax()) == spec.end_think_ids[0] or len(ids) == spec.max_latents:
            break
        kept, top = logits.topk(spec.top_k)
        ids.append(top)
        weights.append(torch.softmax(kept.float(), dim=-1))
        embeds = _mixed(Superposition(top, weights[-1]), table)[None, None]
    none = torch.zeros(0, spec.top_k, device=table.device)
    latent = Superposition(torch.stack(ids), torch.stack(weights)) if ids else Superposition(none.long(), none)
    close = table[torch.tensor([spec.end_think_ids], device=table.device)]
    embeds = torch.cat([prefix, _mixed(latent, table)[None], close], dim=1)
    written = lm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=table.device),
        max_new_tokens=spec.max_answer_tokens,
        do_sample=False,
        eos_token_id=spec.eos_id,
        pad_token_id=spec.pad_id,
    )[0].tolist()
    return Answered(latent, [t for t in written if t != spec.eos_id])


def _mixed(latent: Superposition, table: Tensor) -> Tensor:
    return (latent.weights[..., None].to(table.dtype) * table[latent.ids]).sum(-2)


def _shifted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    shifted = logits[:, :-1].contiguous().float()
    return functional.cross_entropy(shifted.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
