"""The decoding engine: batched, KV-cached, no second prefill; every row in its own phase (`method.thinking`).

Prompt ids in, latents and answer ids out; knows nothing about tokenizers or files. The same code evaluates,
serves the command line and is shipped inside exported checkpoints. How rows share a batch is in `inference.slots`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latent_sft.inference.advance import Job, Write
from latent_sft.inference.noise import Sampling
from latent_sft.inference.slots import Finished, Slots
from latent_sft.method.thinking import THINK, answer_phase
from latent_sft.method.types import LatentSpec, Soft, Superposition
from latent_sft.models.backbone import core, embed, mix_latents
from latent_sft.models.thoughts import Thoughts, placeholders

THINKERS = ("latent", "explicit", "continuous", "soft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What one problem produced.

    Attributes:
        latent_ids: `[n, K]` on the CPU, or None where thinking was explicit. For hidden states these say what the LM
            head makes of the state that a latent was made of.
        latent_weights: `[n, K]` float32, likewise.
        thought_ids: explicit tokens between the delimiters; for latents their top-1 ids.
        answer_ids: answer without EOS.
        num_steps: latents, or explicit CoT tokens.
        forward_passes: model calls this row took part in, prefill included.
        finished: EOS was written.
        latent_embeds: `[n, D]` float32 on the CPU, what the latents were fed as, where that was not a superposition.
    """

    latent_ids: Tensor | None
    latent_weights: Tensor | None
    thought_ids: list[int]
    answer_ids: list[int]
    num_steps: int
    forward_passes: int
    finished: bool
    latent_embeds: Tensor | None = None


@torch.inference_mode()
def generate(
    model: nn.Module,
    spec: LatentSpec,
    prompts: Sequence[Sequence[int]],
    *,
    thinker: str,
    latents: Sequence[Superposition | Tensor] | None = None,
    thoughts: Thoughts | None = None,
    soft: Soft | None = None,
    max_cot_tokens: int = 512,
    sampling: Sampling | None = None,
    write: Write | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    static: bool = False,
    compile: bool = False,
    together: Callable[[bool], bool] | None = None,
) -> list[Decoded]:
    """Decode every prompt.

    Args:
        model: causal LM (PEFT wrapper allowed), on its device; put into eval mode for the call.
        spec: settings.
        prompts: token ids, each ending with the opening delimiter.
        thinker: `latent` (feed superpositions back), `explicit` (write the CoT out), `continuous` (feed hidden states
            back, by `thoughts`) or `soft` (Soft Thinking, by `soft`).
        latents: given latents, for each prompt a superposition `[n_i, K]` or input embeddings `[n_i, D]`; thinking is
            skipped whatever the thinker, `</think>` is fed and the answer decoded (the gold path of stage 1).
        thoughts: for `continuous`, on the model's device; put into eval mode for the call.
        soft: for `soft`.
        max_cot_tokens: cap of explicit and soft thinking; 0 skips it (No-CoT).
        sampling: None is greedy without noise.
        write: chooses answer tokens in place of that, a problem being its place in `prompts`; not for `explicit`.
        batch_size: rows decoded together; a row that ends makes room for the next problem.
        progress: called with the number of problems just finished.
        static: the same shapes at every step, at the price of attention over the whole buffer.
        compile: run steps through `torch.compile` with CUDA graphs; implies `static`. Pays on a GPU, for many problems.
        together: whether this process has problems left -> whether any of the job has. Where calls of the model are
            collectives, all processes then make equally many; give each as many prompts, and not more than are read
            at once.

    Returns:
        One `Decoded` a prompt, in order.

    Raises:
        ConfigError: the model has layers of a kind that decoding does not know.
    """
    if thinker not in THINKERS:
        raise ValueError(f"thinker must be one of {', '.join(THINKERS)}, not {thinker!r}")
    for needed, there in {"continuous": thoughts, "soft": soft}.items():
        if thinker == needed and there is None and latents is None:
            raise ValueError(f"thinker {thinker!r} needs its settings: generate(..., thoughts=...) or soft=...")
    if not prompts:
        return []
    thinks = thinker if latents is None else "explicit"
    job = Job(
        model=model,
        spec=spec,
        thinker=thinks,
        phase=THINK,
        max_cot_tokens=max_cot_tokens,
        longest=0,
        sampling=sampling,
        static=static or compile,
        compiled=compile,
        thoughts=thoughts if thinks == "continuous" else None,
        soft=soft if thinks == "soft" else None,
        write=write,
    )
    given: Sequence[Any] | None = latents
    if job.parallel is not None:
        assert thoughts is not None
        given = [placeholders(thoughts, 1)[0]] * len(prompts)
    tail = 0 if given is None else len(spec.end_think_ids)
    sizes = [len(p) + (tail + _count(given[i]) if given is not None else 0) for i, p in enumerate(prompts)]
    job = job._replace(
        phase=THINK if given is None else answer_phase(spec),
        longest=max(sizes) + (_most_steps(job) if given is None else 0) + spec.max_answer_tokens,
    )

    def prefix(problems: Sequence[int]) -> tuple[Tensor, Tensor]:
        own = None if given is None else [given[i] for i in problems]
        return _prefix(model, spec, [prompts[i] for i in problems], own)

    queue = deque(sorted(range(len(prompts)), key=lambda i: -sizes[i]))
    results: dict[int, Decoded] = {}
    was_training, attention = model.training, core(model).config._attn_implementation
    thoughts_trained = thoughts is not None and thoughts.training
    model.eval()
    if thoughts is not None:
        thoughts.eval()
    try:
        if "flash" in attention:  # takes no mask, and columns that rows do not have in common need one
            core(model).config._attn_implementation = "sdpa" if core(model)._supports_sdpa else "eager"
        slots = Slots(job, min(batch_size, len(prompts)), max(sizes))
        while (together or bool)(len(results) < len(prompts)):
            slots.refill(queue, prefix, sizes)
            finished = slots.harvest()
            for row in finished:
                results[row.problem] = _decoded(row, job, None if latents is None else latents[row.problem])
            if finished and progress is not None:
                progress(len(finished))
            slots.tidy(more=bool(queue))
            if slots.live() or together is not None:
                slots.step()
    finally:
        core(model).config._attn_implementation = attention
        model.train(was_training)
        if thoughts is not None:
            thoughts.train(thoughts_trained)
    return [results[i] for i in range(len(prompts))]


def _count(latent: Superposition | Tensor) -> int:
    """Return n of a superposition `[n, K]` or of embeddings `[n, D]`."""
    return len(latent) if isinstance(latent, Tensor) else len(latent.ids)


def _most_steps(job: Job) -> int:
    """Return the most steps that thinking takes, `</think>` included."""
    if job.thoughts is not None:
        most = job.thoughts.spec.num_latents
    else:
        most = job.spec.max_latents if job.thinker == "latent" else job.max_cot_tokens
    return most + len(job.spec.end_think_ids)


def _prefix(
    model: nn.Module, spec: LatentSpec, prompts: list[Sequence[int]], given: list[Superposition | Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return left-padded prefix embeddings `[B, W, D]` and which positions are real `[B, W]`."""
    device = core(model).get_input_embeddings().weight.device
    rows = [list(prompt) for prompt in prompts]
    if given is not None:  # any id holds the place of a latent
        rows = [[*row, *[spec.pad_id] * _count(g), *spec.end_think_ids] for row, g in zip(rows, given, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[spec.pad_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    embeds = embed(model, ids)
    for b, latent in enumerate(given or ()):
        end = width - len(spec.end_think_ids)
        if isinstance(latent, Tensor):
            fed = latent.to(device)
        else:
            fed = mix_latents(model, Superposition(latent.ids.to(device), latent.weights.to(device)))
        embeds[b, end - len(fed) : end] = fed.to(embeds.dtype)
    return embeds, torch.arange(width, device=device) >= width - lengths[:, None]


def _decoded(row: Finished, job: Job, given: Superposition | Tensor | None) -> Decoded:
    """Cut what a row was fed into thought, `</think>` and answer."""
    steps, spec = row.num_steps, job.spec
    # an EOS while thinking ends the row before any delimiter
    between = len(spec.end_think_ids) if given is None and row.num_answer else 0
    length = steps + between + row.num_answer
    tokens = row.fed.ids[:length, 0].tolist()
    answer = tokens[steps + between :]
    finished = bool(answer) and answer[-1] == spec.eos_id
    latent, embeds = None, row.thoughts
    if isinstance(given, Tensor):
        embeds, steps = given.detach().float().cpu(), len(given)
    elif given is not None:
        latent, steps = Superposition(given.ids.cpu(), given.weights.cpu()), len(given.ids)
    elif job.thinker != "explicit":
        latent = Superposition(row.fed.ids[:steps].clone(), row.fed.weights[:steps].clone())
    thought = [] if given is not None else tokens[:steps]
    # the last token is not fed, but there was the prefill; latents that were thought at once took T passes more
    passes = length if job.parallel is None else job.parallel.iterations + row.num_answer
    return Decoded(
        latent_ids=None if latent is None else latent.ids,
        latent_weights=None if latent is None else latent.weights,
        thought_ids=thought if latent is None else latent.ids[:, 0].tolist(),
        answer_ids=answer[:-1] if finished else answer,
        num_steps=steps,
        forward_passes=passes,
        finished=finished,
        latent_embeds=embeds,
    )
