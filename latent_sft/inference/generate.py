"""The decoding engine: batched, KV-cached, no second prefill; every row in its own phase (`method.thinking`).

Prompt ids in, latents and answer ids out; knows nothing about tokenizers or files. The same code evaluates,
serves the command line and is shipped inside exported checkpoints. How rows share a batch is in `inference.slots`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latent_sft.inference.noise import Sampling
from latent_sft.inference.slots import Finished, Job, Slots
from latent_sft.method.thinking import THINK, answer_phase
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import core, embed, mix_latents


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
    static: bool = False,
    compile: bool = False,
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
        batch_size: rows decoded together; a row that ends makes room for the next problem.
        progress: called with the number of problems just finished.
        static: the same shapes at every step, at the price of attention over the whole buffer.
        compile: run steps through `torch.compile` with CUDA graphs; implies `static`. Pays on a GPU, for many problems.

    Returns:
        One `Decoded` a prompt, in order.

    Raises:
        ConfigError: the model has layers of a kind that decoding does not know.
    """
    if thinker not in ("latent", "explicit"):
        raise ValueError(f"thinker must be 'latent' or 'explicit', not {thinker!r}")
    if not prompts:
        return []
    tail = 0 if latents is None else len(spec.end_think_ids)
    sizes = [len(p) + (tail + len(latents[i].ids) if latents is not None else 0) for i, p in enumerate(prompts)]
    cap = spec.max_latents if thinker == "latent" else max_cot_tokens
    job = Job(
        model=model,
        spec=spec,
        latent=thinker == "latent" and latents is None,
        phase=THINK if latents is None else answer_phase(spec),
        max_cot_tokens=max_cot_tokens,
        longest=max(sizes) + (0 if latents is not None else cap + len(spec.end_think_ids)) + spec.max_answer_tokens,
        sampling=sampling,
        static=static or compile,
        compiled=compile,
    )

    def prefix(problems: Sequence[int]) -> tuple[Tensor, Tensor]:
        given = None if latents is None else [latents[i] for i in problems]
        return _prefix(model, spec, [prompts[i] for i in problems], given)

    queue = deque(sorted(range(len(prompts)), key=lambda i: -sizes[i]))
    results: dict[int, Decoded] = {}
    was_training, attention = model.training, core(model).config._attn_implementation
    model.eval()
    try:
        if "flash" in attention:  # takes no mask, and columns that rows do not have in common need one
            core(model).config._attn_implementation = "sdpa" if core(model)._supports_sdpa else "eager"
        slots = Slots(job, min(batch_size, len(prompts)), max(sizes))
        while len(results) < len(prompts):
            slots.refill(queue, prefix, sizes)
            finished = slots.harvest()
            for row in finished:
                results[row.problem] = _decoded(row, job, None if latents is None else latents[row.problem])
            if finished and progress is not None:
                progress(len(finished))
            slots.tidy(more=bool(queue))
            if slots.live():
                slots.step()
    finally:
        core(model).config._attn_implementation = attention
        model.train(was_training)
    return [results[i] for i in range(len(prompts))]


def _prefix(
    model: nn.Module, spec: LatentSpec, prompts: list[Sequence[int]], given: list[Superposition] | None
) -> tuple[Tensor, Tensor]:
    """Return left-padded prefix embeddings `[B, W, D]` and which positions are real `[B, W]`."""
    device = core(model).device
    rows = [list(prompt) for prompt in prompts]
    if given is not None:  # any id holds the place of a latent
        rows = [[*row, *[spec.pad_id] * len(g.ids), *spec.end_think_ids] for row, g in zip(rows, given, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[spec.pad_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    embeds = embed(model, ids)
    for b, latent in enumerate(given or ()):
        end = width - len(spec.end_think_ids)
        mixed = mix_latents(model, Superposition(latent.ids.to(device), latent.weights.to(device)))
        embeds[b, end - len(mixed) : end] = mixed.to(embeds.dtype)
    return embeds, torch.arange(width, device=device) >= width - lengths[:, None]


def _decoded(row: Finished, job: Job, given: Superposition | None) -> Decoded:
    """Cut what a row was fed into thought, `</think>` and answer."""
    steps, spec = row.num_steps, job.spec
    # an EOS while thinking ends the row before any delimiter
    between = len(spec.end_think_ids) if given is None and row.num_answer else 0
    length = steps + between + row.num_answer
    tokens = row.fed.ids[:length, 0].tolist()
    answer = tokens[steps + between :]
    finished = bool(answer) and answer[-1] == spec.eos_id
    latent: Superposition | None = None
    if given is not None:
        latent, steps = Superposition(given.ids.cpu(), given.weights.cpu()), len(given.ids)
    elif job.latent:
        latent = Superposition(row.fed.ids[:steps].clone(), row.fed.weights[:steps].clone())
    return Decoded(
        latent_ids=None if latent is None else latent.ids,
        latent_weights=None if latent is None else latent.weights,
        thought_ids=tokens[:steps] if latent is None else latent.ids[:, 0].tolist(),
        answer_ids=answer[:-1] if finished else answer,
        num_steps=steps,
        forward_passes=length,  # the last token is not fed, but there was the prefill
        finished=finished,
    )
