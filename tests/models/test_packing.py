"""A packed batch gives the losses and gradients of the padded one, in every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.families import FAMILIES, build

from latent_sft.data.collate import explicit_batch, stage2_batch
from latent_sft.data.packing import packed
from latent_sft.errors import ConfigError
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import core
from latent_sft.models.explicit import ExplicitModel
from latent_sft.models.packing import row_states, use_packing
from latent_sft.models.stage2 import Stage2Model

SPEC = LatentSpec(think_ids=(5,), end_think_ids=(6, 7), eos_id=1, pad_id=0, vocab_size=40, top_k=3, noise_scale=1.0)
ROWS = [(4, 6, 2), (1, 1, 1), (9, 0, 3), (2, 11, 1)]  # prompt, CoT and answer tokens


def rows_of(sizes):
    generator = torch.Generator().manual_seed(len(sizes))

    def tokens(n):
        return torch.randint(8, 40, (n,), generator=generator).tolist()

    return [
        {"id": str(i), "hash": "", "prompt": [*tokens(p), 5], "cot": tokens(c), "answer": [*tokens(a), 1]}
        for i, (p, c, a) in enumerate(sizes)
    ]


def stage2_rows(rows):
    def label_of(id, hash):
        generator = torch.Generator().manual_seed(int(id))
        ids = torch.stack([torch.randperm(40, generator=generator)[:3] for _ in range(int(id) + 1)])
        return Superposition(ids, torch.softmax(torch.randn(len(ids), 3, generator=generator), -1))

    return stage2_batch(rows, SPEC, label_of=label_of, normalisation="sample")


def results(model, batch):
    torch.manual_seed(0)  # of the noise
    model.zero_grad()
    out = model(**batch)
    sum(v for k, v in out.items() if k.endswith("total")).backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_packed_equals_padded(model, batch):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # draws depend on padding
    expected, grads = results(model, batch)
    use_packing(model.lm)
    again, _ = results(model, batch)  # padded batches are not disturbed
    got, packed_grads = results(model, packed(batch))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[name], expected[name], rtol=1e-5, atol=1e-6)
    assert packed_grads.keys() == grads.keys() and grads
    scale = max(g.abs().max() for g in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-4, atol=1e-5 * float(scale))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    rows = rows_of(ROWS)
    assert_packed_equals_padded(Stage2Model(build(family), SPEC).train(), stage2_rows(rows))
    batch = explicit_batch(rows, SPEC, with_cot=True, normalisation="segment", prompt_targets=True)
    assert_packed_equals_padded(ExplicitModel(build(family)).train(), batch)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=5))
def test_any_lengths(sizes):
    model = Stage2Model(build("qwen3"), SPEC).train()
    assert_packed_equals_padded(model, stage2_rows(rows_of(sizes)))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_sliding_windows_shorter_than_a_row(family):
    """The window of 4 cuts what a token sees of its own row, and is not stretched over the packed one."""
    lm = build(family)
    wide = build(family)
    for layer in [lm, *lm.modules()]:
        if getattr(layer, "sliding_window", None) is not None:
            layer.sliding_window = 4
    lm.config.sliding_window = 4
    batch = explicit_batch(rows_of(ROWS), SPEC, with_cot=True, normalisation="token")
    narrow = ExplicitModel(lm)
    assert_packed_equals_padded(narrow, batch)
    assert not torch.allclose(narrow(**batch)["ce_total"], ExplicitModel(wide)(**batch)["ce_total"], rtol=1e-4)


def test_a_packed_batch_by_hand():
    """Two rows of 5 and 7 tokens with one and two latents."""
    rows = rows_of([(0, 0, 0), (1, 0, 0)])
    batch = stage2_rows(rows)
    # P=1 z E E A(=eos) and P=2 z z E E A: 5 and 7 tokens
    out = packed(batch)
    assert out["position"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]
    assert out["kind"].tolist() == [[1, 2, 4, 4, 4, 1, 1, 2, 2, 4, 4, 4]]
    assert out["branch"].tolist() == [[-1, 0, -1, -1, -1, -1, -1, 2, 3, -1, -1, -1]]
    assert out["row_slots"].tolist() == [[0, 1, 2, 3, 4, -1, -1], [5, 6, 7, 8, 9, 10, 11]]
    assert out["row_place"].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13]
    # labels: E E A after the last latent of each row; the KL is read before each latent
    assert out["target_index"].tolist() == [1, 2, 3, 8, 9, 10]
    assert out["kl_index"].tolist() == [0, 6, 7]
    assert out["latent_ids"].shape == (1, 4, 3)
    assert out["kl_latent"].tolist() == [0, 2, 3]


def test_a_model_that_is_not_prepared_is_no_silent_mistake():
    model = build("llama")
    batch = packed(explicit_batch(rows_of(ROWS), SPEC, with_cot=True, normalisation="token"))
    embeds = core(model).get_input_embeddings()(batch["ids"])
    with pytest.raises(RuntimeError, match="use_packing"):
        row_states(model, embeds, batch)
    model._supports_attention_backend = False
    with pytest.raises(ConfigError, match=r"packing: LlamaForCausalLM .*set packing=false"):
        use_packing(model)
