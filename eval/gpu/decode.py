"""Tokens per second against transformers' `generate`, at a batch of equal prompts, with and without CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eval.gpu.compare import seconds
from eval.gpu.mfu import SHAPES, TINY_SHAPE
from eval.gpu.parts import Case, Result, Settings
from latent_sft.inference.generate import generate
from latent_sft.method.types import LatentSpec

THINK, END, EOS = 1, 2, 3


def cases(settings: Settings) -> Sequence[Case]:
    """Return a case for every batch size."""
    return [
        Case(f"batch {b}", partial(_case, settings, b), 1.9) for b in ((1, 4) if settings.tiny else (1, 16, 64, 256))
    ]


def _case(settings: Settings, batch: int) -> Result:
    length, tokens = (5, 8) if settings.tiny else (64, 128)
    torch._dynamo.reset()
    lm = _model(settings)
    vocab = lm.config.vocab_size
    draw = random.Random(0)
    prompts = [[*(draw.randrange(4, vocab) for _ in range(length - 1)), THINK] for _ in range(batch)]
    spec = LatentSpec(
        **{"think_ids": (THINK,), "end_think_ids": (END,), "eos_id": EOS, "pad_id": 0, "vocab_size": vocab},
        **{"max_latents": tokens, "max_answer_tokens": 1, "top_k": 10},
    )

    def ours(kind: str, **how: Any) -> list[Any]:
        return generate(lm, spec, prompts, thinker=kind, batch_size=batch, max_cot_tokens=tokens, **how)

    def theirs() -> list[list[int]]:
        ids = torch.tensor(prompts, device=settings.device)
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
        return lm.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, length:].tolist()

    # in float32: two logits of random weights in bf16 are often as good as equal
    with torch.inference_mode():
        other = (
            sum(row.thought_ids != expected for row, expected in zip(ours("explicit"), theirs(), strict=True)) / batch
        )
        if other > 0.02:
            return {"same": False, "problems that differ": other}
        lm.to(torch.bfloat16 if settings.device == "cuda" else torch.float32)
        result = {"same": True, "problems that differ": other}
        calls = {"transformers": theirs, "explicit": partial(ours, "explicit"), "latent": partial(ours, "latent")}
        if settings.device == "cuda":
            calls |= {f"{kind}, graph": partial(ours, kind, compile=True) for kind in ("explicit", "latent")}
        for name, call in calls.items():
            result[f"{name} (tokens/s)"] = batch * tokens / seconds(call, 1 if settings.tiny else 3)
    fastest = max(result[f"{name} (tokens/s)"] for name in calls if name.startswith("explicit"))
    return {**result, "times": fastest / result["transformers (tokens/s)"]}


def _model(settings: Settings) -> Any:
    config = (
        AutoConfig.for_model(**TINY_SHAPE) if settings.tiny else AutoConfig.from_pretrained(SHAPES / "llama-3.2-1b")
    )
    torch.manual_seed(0)
    with torch.device(settings.device):
        lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # never the likeliest, so that all rows run as long as they may
        lm.get_output_embeddings().weight[[END, EOS]] = 0.0
    return lm
