"""What a benchmark case is, and the random models and rows all of them use."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from latent_sft.method.layout import fixed_segments
from latent_sft.method.types import LatentSpec, Superposition

TOP_K = 10
MAX_POSITIONS = 32_768


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama with untied head and as many key heads as query heads."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int


FULL = Size(hidden=256, layers=4, heads=4, intermediate=768, vocab=32_000)
QUICKSTART = Size(hidden=64, layers=4, heads=4, intermediate=192, vocab=130)
TINY = Size(hidden=32, layers=2, heads=2, intermediate=64, vocab=512)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table.

    Attributes:
        part: what is measured: stage1, decoder (stage 1's decoder alone), stage2, labels, decode, step, quickstart.
        name: unique within the part.
        size: of the model.
        paths: what is compared, interleaved.
        items: problems or examples that one call of each path handles.
        prompt: tokens of a prompt; decoding draws 1/3 to 1 of it.
        cot: CoT tokens of each row; for decoding the cap of thinking steps.
        rate: CoT tokens a latent.
        answer: tokens of an answer, EOS included.
        timed: False where only memory is measured.
        memory: paths whose peak memory is measured, each in a process of its own.
        seed: of the random rows.
        limit_gib: where set, a process that grows beyond it is stopped and counts as not able.
    """

    part: str
    name: str
    size: Size
    paths: tuple[str, ...] = ("plain", "fast")
    items: tuple[int, ...] = (1, 1)
    prompt: int = 64
    cot: tuple[int, ...] = ()
    rate: int = 4
    answer: int = 16
    timed: bool = True
    memory: tuple[str, ...] = ()
    seed: int = 0
    limit_gib: float = 0.0


class Path(NamedTuple):
    """One way of doing a case.

    Attributes:
        module: whose gradients are cleared before a step.
        prepare: what a data loader does; returns the batch, on the device. Timed apart from the step.
        step: batch -> result; the part that is timed.
    """

    module: nn.Module
    prepare: Callable[[], Any]
    step: Callable[[Any], Any]


def spec_of(size: Size, **changes: Any) -> LatentSpec:
    """Return the published settings: stretched positions, learned marker, no noise; `</think>` is three tokens."""
    values: dict[str, Any] = {
        "think_ids": (1, 2, 3),
        "end_think_ids": (4, 5, 6),
        "eos_id": 7,
        "pad_id": 0,
        "vocab_size": size.vocab,
        "top_k": TOP_K,
        "exclude_end": False,
        "marker_positions": "stretched",
        "marker_input": "learned",
    }
    return LatentSpec(**{**values, **changes})


def build_lm(size: Size, seed: int, device: str) -> LlamaForCausalLM:
    """Return a random model in float32; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=7,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)


def rows_of(case: Case) -> list[dict[str, Any]]:
    """Return random tokenised rows, one for each length in `case.cot`."""
    rng = random.Random(case.seed)
    spec = spec_of(case.size)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(8, case.size.vocab) for _ in range(count)]

    rows = []
    for number, length in enumerate(case.cot):
        prompt = [*tokens(case.prompt - len(spec.think_ids)), *spec.think_ids]
        rows.append(
            {
                "id": str(number),
                "hash": f"{number:016x}",
                "prompt": prompt,
                "cot": tokens(length),
                "segment_lengths": fixed_segments(length, case.rate),
                "answer": [*tokens(case.answer - 1), spec.eos_id],
                "length": len(prompt) + length + case.answer,
            }
        )
    return rows


@cache
def random_labels(count: int, vocab: int, seed: int) -> Superposition:
    """Return `count` random latents, distinct ids `[count, K]` with weights that sum to 1, as a label store would."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocab, (count, 1), generator=generator)
    ids = (first + torch.arange(TOP_K) * (vocab // TOP_K)) % vocab
    return Superposition(ids, torch.softmax(torch.randn(count, TOP_K, generator=generator), dim=-1))
