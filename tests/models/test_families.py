"""Every family goes through both stages by the library's own accessors; padding changes no loss and no gradient."""

from __future__ import annotations

import pytest
import torch
from models.families import FAMILIES, build
from transformers import masking_utils

from latent_sft.data.collate import stage1_batch, stage2_batch
from latent_sft.errors import ConfigError
from latent_sft.method.masks import to_additive
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import check_window, hidden_states, input_table
from latent_sft.models.head import check_head
from latent_sft.models.load import add_lora, initial_marker, merged
from latent_sft.models.logits import head
from latent_sft.models.stage1 import Stage1Model
from latent_sft.models.stage2 import Stage2Model

SPEC = LatentSpec(think_ids=(2,), end_think_ids=(3, 4), eos_id=1, pad_id=0, vocab_size=40, rate=2, top_k=4)


def row(number: int, prompt: int, cot: int) -> dict:
    lengths = [2] * (cot // 2) + [1] * (cot % 2)
    tokens = [5 + (7 * number + 3 * i) % 34 for i in range(prompt + cot + 1)]
    return {
        "id": str(number),
        "hash": "",
        "prompt": [*tokens[:prompt], 2],
        "cot": tokens[prompt : prompt + cot],
        "segment_lengths": lengths,
        "answer": [tokens[-1], 1],
    }


ROWS = [row(0, 3, 7), row(1, 6, 1), row(2, 2, 4)]


def stage1(family: str) -> Stage1Model:
    encoder, decoder = build(family, seed=1), build(family, seed=2)
    return Stage1Model(encoder, decoder, initial_marker(encoder, SPEC), SPEC)


def losses_and_gradients(model: torch.nn.Module, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = sum(model(**batch).loss_sums.values())
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (gradient - b[1][name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_one_of_a_padded_batch_equals_single_rows(family):
    model = stage1(family)
    check_head(model.decoder)
    whole = losses_and_gradients(model, [stage1_batch(ROWS, SPEC, loss_reduction="token")])
    single = losses_and_gradients(model, [stage1_batch([r], SPEC, loss_reduction="token") for r in ROWS])
    assert_same(whole, single)
    assert whole[1]["marker"].abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_two_of_a_padded_batch_equals_single_rows(family):
    labels = {
        r["id"]: Superposition(
            torch.arange(5, 9).expand(len(r["segment_lengths"]), 4), torch.full((len(r["segment_lengths"]), 4), 0.25)
        )
        for r in ROWS
    }
    options = {"label_of": lambda row_id, _: labels[row_id], "loss_reduction": "token"}
    model = Stage2Model(build(family), SPEC)
    whole = losses_and_gradients(model, [stage2_batch(ROWS, SPEC, **options)])
    assert_same(whole, losses_and_gradients(model, [stage2_batch([r], SPEC, **options) for r in ROWS]))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_finds_its_targets_and_merges_into_the_plain_model(family):
    from latent_sft.config.schema import LoraConfig

    lm = build(family)
    ids = torch.arange(5, 12)[None]
    wrapped = add_lora(lm, LoraConfig(rank=2, alpha=4))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        before = wrapped(input_ids=ids).logits
        plain = merged(wrapped)
        torch.testing.assert_close(plain(input_ids=ids).logits, before, rtol=1e-3, atol=1e-4)
    assert not any("lora" in n for n, _ in plain.named_parameters())


def test_a_head_that_does_something_unknown_is_refused():
    model = build("llama")
    inner = model.lm_head.forward
    calls = iter(range(10))
    model.lm_head.forward = lambda hidden: inner(hidden) * (1 + next(calls))  # not the same twice
    with pytest.raises(ConfigError, match="computes its logits in a way"):
        check_head(model)


def test_sliding_windows_are_refused_beyond_their_length():
    model = build("mistral")
    model.config.sliding_window = 16
    check_window(model, 16)
    with pytest.raises(ConfigError, match="sliding-window attention of 16 with a stage-1 sequence of 17 tokens"):
        check_window(model, 17)


def test_soft_capping_and_scaling_are_part_of_the_head():
    model = build("gemma2", scale=6.0)
    logits = head(model)(torch.randn(3, 32) * 50)
    assert logits.abs().max() <= 5.0
    assert input_table(model).shape == (40, 32)


def test_positions_with_a_gap_are_one_sequence() -> None:
    """Without a mask transformers would take them for two packed sequences, which do not see each other."""
    lm, looks = build("llama"), masking_utils.find_packed_sequence_indices
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[0, 1, 5, 6]])
    causal = to_additive(torch.ones(4, 4, dtype=torch.bool).tril()[None, None], embeds.dtype)
    torch.testing.assert_close(hidden_states(lm, embeds, position), hidden_states(lm, embeds, position, causal))
    assert masking_utils.find_packed_sequence_indices is looks
