"""The decoding engine: batched, KV-cached, no second prefill; every row in its own phase (`method.thinking`).

Prompt ids in, latents and answer ids out; knows nothing about tokenizers or files. The same code evaluates,
serves the command line and is shipped inside exported checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latent_sft.method import thinking
from latent_sft.method.superposition import NOISE_DRAWS, gumbel
from latent_sft.method.thinking import ANSWER, DONE, THINK, ThinkState
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import core, embed, mix_latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampled answers (and explicit CoT) and noisy latents, reproducible per problem whatever the batch.

    Attributes:
        temperature: of the token distribution; 0 is greedy.
        top_p: nucleus mass.
        latent_noise: perturb latents with the spec's Gumbel noise (`noise_scale`).
        seed: together with a problem's number in the call it decides all its draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    latent_noise: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What one problem produced.

    Attributes:
        latent_ids: `[n, K]` on the CPU, or None where thinking was explicit.
        latent_weights: `[n, K]` float32, likewise.
        thought_ids: explicit tokens between the delimiters; for latents their top-1 ids.
        answer_ids: answer without EOS.
        num_steps: latents, or explicit CoT tokens.
        forward_passes: model calls this row took part in, prefill included.
        finished: EOS was written.
    """

    latent_ids: Tensor | None
    latent_weights: Tensor | None
    thought_ids: list[int]
    answer_ids: list[int]
    num_steps: int
    forward_passes: int
    finished: bool


@torch.inference_mode()
def generate(
    model: nn.Module,
    spec: LatentSpec,
    prompts: Sequence[Sequence[int]],
    *,
    thinker: str,
    latents: Sequence[Superposition] | None = None,
    max_cot_tokens: int = 512,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[Decoded]:
    """Decode every prompt.

    Args:
        model: causal LM (PEFT wrapper allowed), on its device; put into eval mode for the call.
        spec: settings.
        prompts: token ids, each ending with the opening delimiter.
        thinker: `latent` (feed superpositions back) or `explicit` (write the CoT out).
        latents: given latents `[n_i, K]` a prompt; thinking is skipped, `</think>` is fed and the answer decoded (the
            gold path of stage 1).
        max_cot_tokens: cap of explicit thinking; 0 skips it (No-CoT).
        sampling: None is greedy without noise.
        batch_size: rows decoded together.
        progress: called with the number of problems just finished.

    Returns:
        One `Decoded` a prompt, in order.
    """
    if thinker not in ("latent", "explicit"):
        raise ValueError(f"thinker must be 'latent' or 'explicit', not {thinker!r}")
    was_training = model.training
    model.eval()
    # similar lengths together: less padding, and rows that end together
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + (len(latents[i].ids) if latents else 0))
    results: dict[int, Decoded] = {}
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        given = [latents[i] for i in rows] if latents is not None else None
        noise = _Noise(sampling, rows, spec, core(model).device) if sampling is not None else None
        batch = _decode_batch(model, spec, [prompts[i] for i in rows], thinker, given, max_cot_tokens, noise)
        results.update(zip(rows, batch, strict=True))
        if progress is not None:
            progress(len(rows))
    model.train(was_training)
    return [results[i] for i in range(len(prompts))]


def _decode_batch(
    model: nn.Module,
    spec: LatentSpec,
    prompts: list[Sequence[int]],
    thinker: str,
    given: list[Superposition] | None,
    max_cot_tokens: int,
    noise: _Noise | None,
) -> list[Decoded]:
    lm = core(model)
    embeds, real = _prefix(model, spec, prompts, given)
    cap = spec.max_latents if thinker == "latent" else max_cot_tokens + len(spec.end_think_ids)
    longest = cap + len(spec.end_think_ids) + spec.max_answer_tokens + 1
    attend = torch.cat([real, real.new_ones(len(prompts), longest)], dim=1)
    position = (real.cumsum(1) - 1).clamp(min=0)
    state = thinking.start(len(prompts), spec, embeds.device, THINK if given is None else ANSWER)
    cache, trace = None, _Trace([], [], [], [])
    width = real.shape[1]
    while True:
        out = lm(
            inputs_embeds=embeds,
            attention_mask=attend[:, :width],
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        answers = logits.argmax(-1) if noise is None else noise.tokens(logits)
        before = state
        if thinker == "latent":
            draws = noise.latent_draws() if noise is not None else None
            fed, state = thinking.latent_step(logits, state, spec, answers, draws)
        else:
            fed, state = thinking.explicit_step(logits, state, spec, answers, max_cot_tokens)
        trace.add(fed, before, state)
        if bool((state.phase == DONE).all()):
            return trace.rows(state, spec, thinker if given is None else "given", given)
        embeds = (embed(model, fed.ids) if thinker == "explicit" else mix_latents(model, fed)[:, None]).to(embeds.dtype)
        position = position[:, -1:] + 1
        width += 1


def _prefix(
    model: nn.Module, spec: LatentSpec, prompts: list[Sequence[int]], given: list[Superposition] | None
) -> tuple[Tensor, Tensor]:
    """Return left-padded prefix embeddings `[B, P, D]` and which positions are real `[B, P]` (1 or 0)."""
    device = core(model).device
    pieces = []
    for b, prompt in enumerate(prompts):
        piece = embed(model, torch.tensor(prompt, device=device))
        if given is not None:
            latent = Superposition(given[b].ids.to(device), given[b].weights.to(device))
            close = embed(model, torch.tensor(spec.end_think_ids, device=device))
            piece = torch.cat([piece, mix_latents(model, latent).to(piece.dtype), close])
        pieces.append(piece)
    width = max(len(piece) for piece in pieces)
    embeds = torch.zeros(len(pieces), width, pieces[0].shape[-1], dtype=pieces[0].dtype, device=device)
    real = torch.zeros(len(pieces), width, dtype=torch.long, device=device)
    for b, piece in enumerate(pieces):
        embeds[b, width - len(piece) :] = piece
        real[b, width - len(piece) :] = 1
    return embeds, real


class _Noise:
    """Random draws of a batch, one generator a problem, so that the batch never changes a problem's draws."""

    def __init__(self, sampling: Sampling, rows: list[int], spec: LatentSpec, device: torch.device) -> None:
        self.sampling, self.spec, self.device = sampling, spec, device
        self.generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + row) for row in rows]

    def _gumbel(self, *shape: int) -> Tensor:
        drawn = [gumbel(shape, g, torch.device("cpu")) for g in self.generators]
        return torch.stack(drawn).to(self.device)

    def latent_draws(self) -> Tensor | None:
        """Return `[R, B, K]` draws, or None where latents are not noisy."""
        if not self.sampling.latent_noise or self.spec.noise_scale == 0:
            return None
        return self._gumbel(NOISE_DRAWS, self.spec.top_k).transpose(0, 1)

    def tokens(self, logits: Tensor) -> Tensor:
        """Return a sampled token a row, `[B]`: Gumbel-max over the nucleus; argmax at temperature 0."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        scaled = logits / self.sampling.temperature
        if self.sampling.top_p < 1:
            ordered, index = scaled.softmax(-1).sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.sampling.top_p  # the entry that crosses the mass stays
            scaled = scaled.masked_fill(outside.gather(-1, index.argsort(-1)), float("-inf"))
        return (scaled + self._gumbel(logits.shape[-1])).argmax(-1)


@dataclass(frozen=True, slots=True)
class _Trace:
    """Everything that was fed, step by step; turned into rows once, at the end."""

    ids: list[Tensor]
    weights: list[Tensor]
    before: list[Tensor]
    after: list[Tensor]

    def add(self, fed: Superposition, before: ThinkState, after: ThinkState) -> None:
        self.ids.append(fed.ids)
        self.weights.append(fed.weights)
        self.before.append(before.phase)
        self.after.append(after.phase)

    def rows(
        self, state: ThinkState, spec: LatentSpec, thinker: str, given: list[Superposition] | None
    ) -> list[Decoded]:
        ids, weights = torch.stack(self.ids, 1).cpu(), torch.stack(self.weights, 1).float().cpu()  # [B, S, K]
        before, after = torch.stack(self.before, 1).cpu(), torch.stack(self.after, 1).cpu()  # [B, S]
        out = []
        for b, steps in enumerate(state.num_steps.tolist()):
            answer = ids[b, before[b] == ANSWER, 0].tolist()
            finished = bool(answer) and answer[-1] == spec.eos_id
            latent: Superposition | None = None
            if thinker == "latent":
                latent = Superposition(ids[b, :steps].clone(), weights[b, :steps].clone())
            elif given is not None:
                latent, steps = Superposition(given[b].ids.cpu(), given[b].weights.cpu()), len(given[b].ids)
            out.append(
                Decoded(
                    latent_ids=None if latent is None else latent.ids,
                    latent_weights=None if latent is None else latent.weights,
                    thought_ids=ids[b, :steps, 0].tolist() if latent is None else latent.ids[:, 0].tolist(),
                    answer_ids=answer[:-1] if finished else answer,
                    num_steps=steps,
                    forward_passes=1 + int((after[b] != DONE).sum()),
                    finished=finished,
                )
            )
        return out
