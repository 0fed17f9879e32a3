"""The plain path: the same numbers as the package, computed the way the published implementation computes them.

- stage 1: the published interleaved order `[P, z_1, S_2, z_2, .., S_N, z_N, E, A]`; one dense additive `[1, T, T]` mask
  a sample, filled in a Python loop on the CPU; logits of the decoder over the full vocabulary at every position;
  shifted cross-entropy that ignores -100.
- stage 2: logits at every position; KL from a log-softmax over the full vocabulary, row by row.
- labels: one forward an example.
- decoding: one problem at a time; the cache is dropped after thinking and the whole prefix is read again for the
  answer.

The published encoder has no head: its hidden states are projected at the markers only, and so they are here. Written
from the description of the method, for the published settings (`marker_positions: stretched`, `marker_input: learned`,
`exclude_end: false`, no noise), and left plain on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_sft.method.types import LatentSpec, Superposition

Row = Mapping[str, Any]
IGNORE = -100


class Answered(NamedTuple):
    """What one problem produced: latents `[n, K]`, the answer without EOS, and how often the model was called."""

    latent: Superposition
    answer_ids: list[int]
    forward_passes: int


def stage1_inputs(rows: Sequence[Row], spec: LatentSpec) -> dict[str, Any]:
    """Lay out and mask a batch: what a data loader does.

    Returns:
        `encoder_ids, ids, labels, position` `[B, T]`, `encoder_mask, mask` `[B, 1, T, T]`, and per sample the indices
        `markers` and `latents`.
    """
    return {**encoder_inputs(rows, spec), **_decoder_inputs(rows, spec)}


def encoder_inputs(rows: Sequence[Row], spec: LatentSpec) -> dict[str, Any]:
    """The encoder's half of `stage1_inputs`: `[P, S_1, m, .., S_N, m, E]`."""
    texts, markers = [], []
    for row in rows:
        ids, at, start = list(row["prompt"]), [], 0
        for length in row["segment_lengths"]:
            ids += row["cot"][start : start + length]
            at.append(len(ids))
            ids.append(0)
            start += length
        texts.append(ids + list(spec.end_think_ids))
        markers.append(at)
    longest = max(map(len, texts))
    masks = []
    for ids, at in zip(texts, markers, strict=True):
        mask = _nobody(longest)
        for t in range(len(ids)):
            mask[t, : t + 1] = 0.0
        for t in at:  # nobody reads an earlier marker
            mask[t + 1 :, t] = torch.finfo(mask.dtype).min
        masks.append(mask)
    return {"encoder_ids": _padded(texts, spec.pad_id), "encoder_mask": torch.stack(masks)[:, None], "markers": markers}


def _decoder_inputs(rows: Sequence[Row], spec: LatentSpec) -> dict[str, Any]:
    laid = [_decoder_row(row, spec) for row in rows]
    longest = max(len(ids) for ids, *_ in laid)
    masks = []
    for row, (ids, _, _, latents) in zip(rows, laid, strict=True):
        mask, main = _nobody(longest), list(range(len(row["prompt"])))
        for t in main:
            mask[t, : t + 1] = 0.0
        for t, length in zip(latents, [*row["segment_lengths"][1:], 0], strict=True):
            main.append(t)
            mask[t, torch.tensor(main)] = 0.0
            for c in range(t + 1, t + 1 + length):  # a chunk sees its latent and itself
                mask[c, t : c + 1] = 0.0
        for t in range(latents[-1] + 1, len(ids)):
            main.append(t)
            mask[t, torch.tensor(main)] = 0.0
        masks.append(mask)
    return {
        "ids": _padded([ids for ids, *_ in laid], spec.pad_id),
        "labels": _padded([labels for _, labels, *_ in laid], IGNORE),
        "position": _padded([position for *_, position, _ in laid], 0),
        "latents": [latents for *_, latents in laid],
        "mask": torch.stack(masks)[:, None],
    }


def _decoder_row(row: Row, spec: LatentSpec) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return ids, labels (of the token at its own place, not shifted), positions and the places of the latents."""
    ids = list(row["prompt"])
    labels, position, latents = [IGNORE] * len(ids), list(range(len(ids))), []
    start, next_position = row["segment_lengths"][0], len(ids)
    for length in [*row["segment_lengths"][1:], 0]:
        chunk = row["cot"][start : start + length]
        latents.append(len(ids))
        ids += [0, *chunk]
        labels += [IGNORE, *chunk]
        position += range(next_position, next_position + 1 + length)
        start, next_position = start + length, next_position + 1
    tail = [*spec.end_think_ids, *row["answer"]]
    position += range(next_position, next_position + len(tail))
    return ids + tail, labels + tail, position, latents


def _nobody(length: int) -> Tensor:
    return torch.full((length, length), torch.finfo(torch.float32).min)


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
    """Return the latents of every row: layout, mask and one forward an example."""
    device = model.marker.device
    return [model.encode(to_device(encoder_inputs([row], model.spec), device), full_logits)[0] for row in rows]


@torch.no_grad()
def answer(lm: nn.Module, spec: LatentSpec, prompt: Sequence[int]) -> Answered:
    """Solve one problem: latents with a cache; then prompt, latents and `</think>` are read again for the answer."""
    table = lm.get_input_embeddings().weight
    prefix = table[torch.tensor([prompt], device=table.device)]
    embeds, cache, ids, weights, calls = prefix, None, [], [], 0
    while True:
        out = lm(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        calls += 1
        logits, cache = out.logits[0, -1], out.past_key_values
        if int(logits.argmax()) == spec.end_think_ids[0] or len(ids) == spec.max_latents:
            break
        kept, top = logits.topk(spec.top_k)
        ids.append(top)
        weights.append(torch.softmax(kept.float(), dim=-1))
        embeds = _mixed(Superposition(top, weights[-1]), table)[None, None]
    width = spec.top_k
    latent = Superposition(
        torch.stack(ids) if ids else table.new_zeros(0, width, dtype=torch.long),
        torch.stack(weights) if weights else table.new_zeros(0, width),
    )
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
    return Answered(latent, [t for t in written if t != spec.eos_id], calls + len(written))


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move every tensor of a batch, also inside lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, Superposition):
        return Superposition(*(to_device(v, device) for v in batch))
    return [to_device(v, device) for v in batch] if isinstance(batch, list) else batch


def _mixed(latent: Superposition, table: Tensor) -> Tensor:
    return (latent.weights[..., None].to(table.dtype) * table[latent.ids]).sum(-2)


def _shifted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    shifted = logits[:, :-1].contiguous().float()
    return functional.cross_entropy(shifted.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
