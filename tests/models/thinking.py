"""What the tests of models that think in hidden states share: a tiny Llama, examples, and comparing gradients."""

from __future__ import annotations

from typing import Any

import torch
from reference_distill import Example
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from latent_sft.method.types import LatentSpec

VOCAB, HIDDEN, EOS, PAD, END = 29, 16, 1, 1, (5, 6)
SPEC = LatentSpec(think_ids=(4,), end_think_ids=END, eos_id=EOS, pad_id=PAD, vocab_size=VOCAB, top_k=4)

# traces longer than M, shorter, of one step (empty once it is dropped), and equal to M
EXAMPLES = [
    Example([8, 9, 3, 4], [[10, 11, 12], [13, 14, 10], [16]], list(END), [20, EOS]),
    Example([8, 4], [[15, 13], [17]], list(END), [21, 22, 23, EOS]),
    Example([8, 9, 9, 3, 2, 4], [[11, 10]], list(END), [20, EOS]),
    Example([9, 3, 4], [[16, 17], [10], [18, 19, 12, 13]], list(END), [24, 20, EOS]),
]


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, grouped heads, float64, weights large enough that masks and positions matter."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).double()


def rows_of(examples: list[Example]) -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "hash": f"{number:04x}",
            "prompt": e.prompt,
            "cot": [token for step in e.steps for token in step],
            "step_lengths": [len(step) for step in e.steps],
            "answer": e.answer,
        }
        for number, e in enumerate(examples)
    ]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters that are trained; what a loss does not depend on has zeros."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rel: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-6)
        assert (found[name] - value).abs().max() <= rel * scale, name
