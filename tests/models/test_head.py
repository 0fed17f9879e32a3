"""The head's losses equal those of the model's own logits, whatever the head is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.families import FAMILIES, build
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from latent_sft.method.losses import weighted_cross_entropy, weighted_sparse_kl
from latent_sft.method.superposition import superpose
from latent_sft.method.types import Superposition
from latent_sft.models.backbone import embed, hidden_states, unwrap_peft
from latent_sft.models.head import ce_total, kl_total
from latent_sft.models.logits import head

IDS = torch.arange(4, 20).view(2, 8)
M, K, VOCAB = 16, 3, 40


def labels() -> tuple[Tensor, Superposition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCAB, (M,), generator=generator)
    teacher = superpose(torch.randn(M, VOCAB, generator=generator), K)
    return targets, teacher, torch.rand(M, generator=generator)


def expected_total(model: nn.Module) -> Tensor:
    """Both losses, unequally weighted, from the logits that transformers computes."""
    targets, teacher, weights = labels()
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    return weighted_cross_entropy(logits, targets, weights) + 0.3 * weighted_sparse_kl(logits, teacher, weights)


def found_total(model: nn.Module) -> Tensor:
    targets, teacher, weights = labels()
    hidden = hidden_states(model, embed(model, IDS)).flatten(0, 1)
    return ce_total(model, hidden, targets, weights) + 0.3 * kl_total(model, hidden, teacher, weights)


def with_gradients(model: nn.Module, total: Callable[[nn.Module], Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = total(model)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: nn.Module) -> None:
    expected, found = with_gradients(model, expected_total), with_gradients(model, found_total)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.fixture(autouse=True)
def five_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows become four chunks, the last one short."""
    monkeypatch.setattr("latent_sft.method.losses.CHUNK_BYTES_CPU", 5 * 4 * VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_every_family(family: str) -> None:
    assert_equal(build(family, scale=4.0))


def test_a_bias_of_the_head_counts() -> None:
    model = build("llama", scale=4.0)
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    assert_equal(model)


def lora_on_the_head() -> nn.Module:
    model = get_peft_model(build("llama", scale=4.0), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


def trained_copy_of_the_head() -> nn.Module:
    adapters = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(build("llama", scale=4.0), adapters).eval()


def hooked_head() -> nn.Module:
    model = build("llama", scale=4.0)
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    return model


def patched_head() -> nn.Module:
    model = build("llama", scale=4.0)
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: inner(hidden) + hidden.sum(-1, keepdim=True) * torch.arange(VOCAB)
    return model


@pytest.mark.parametrize("make", [lora_on_the_head, trained_copy_of_the_head, hooked_head, patched_head])
def test_a_head_that_is_not_one_matrix_is_called(make: Callable[[], nn.Module]) -> None:
    assert_equal(make())


def test_a_frozen_head_gets_no_gradient() -> None:
    model = build("llama", scale=4.0)
    model.lm_head.requires_grad_(False)
    assert_equal(model)
    assert model.lm_head.weight.grad is None


def test_under_autocast_the_sums_stay_float32() -> None:
    model = build("llama", scale=4.0)
    precise = expected_total(model).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        allowed = abs(expected_total(model).item() - precise)
        found = found_total(model)
    assert found.dtype == torch.float32
    assert 0 < abs(found.item() - precise) <= 2 * allowed + 1e-3 * precise


@pytest.mark.parametrize("make", [lambda: build("llama"), lora_on_the_head])
def test_no_labelled_position(make: Callable[[], nn.Module]) -> None:
    """Zero, and a gradient of zero for every parameter that another process has one for."""
    model = make()
    targets, teacher, weights = labels()
    full = with_gradients(model, found_total)[1]

    def empty(model: nn.Module) -> Tensor:
        hidden = hidden_states(model, embed(model, IDS)).flatten(0, 1)[:0]
        kl = kl_total(model, hidden, Superposition(teacher.ids[:0], teacher.weights[:0]), weights[:0])
        return kl + ce_total(model, hidden, targets[:0], weights[:0])

    value, none = with_gradients(model, empty)
    assert value == 0.0
    assert none.keys() == full.keys()
    assert not any(gradient.any() for gradient in none.values())


def test_a_plain_head_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through the sum in chunks, which reads the weight."""
    model = build("llama")
    targets, _, weights = labels()
    monkeypatch.setattr(nn.Linear, "forward", None)
    assert ce_total(model, torch.randn(M, 32), targets, weights).item() > 0


# --------------------------------------------------------------------------------------------------------- partitioned


def partition(module: nn.Module, calls: list[str]) -> None:
    """Do to a module what ZeRO-3 does: parameters are empty, except during its call and its backward."""
    full = {p: p.detach().clone() for p in module.parameters()}
    for p in full:
        p.ds_id = 0

    def gather(*_: object) -> None:
        calls.append("gather")
        for p, value in full.items():
            p.data = value

    def release(*_: object) -> None:
        for p in full:
            p.data = torch.empty(0)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
    module.register_full_backward_pre_hook(gather)
    release()


@pytest.mark.parametrize("rows", [0, 3, M])
def test_a_partitioned_head_is_gathered_once_whatever_the_number_of_rows(rows: int) -> None:
    """Processes with different numbers of labels must make the same collective calls, or they wait for ever."""
    model = build("llama", scale=4.0)
    targets, _, weights = labels()
    torch.manual_seed(0)
    hidden = torch.randn(rows, 32, requires_grad=True)

    def run() -> tuple[float, Tensor, Tensor]:
        hidden.grad = model.lm_head.weight.grad = None
        total = ce_total(model, hidden, targets[:rows], weights[:rows])
        total.backward()
        return total.item(), hidden.grad, model.lm_head.weight.grad

    expected = run()
    calls: list[str] = []
    partition(model.lm_head, calls)
    found = run()
    assert calls == ["gather", "gather"]  # forward and backward
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    assert "forward" not in vars(model.lm_head)


def test_a_partitioned_head_with_adapters_is_called_once() -> None:
    model = lora_on_the_head()
    for parameter in unwrap_peft(model).get_output_embeddings().parameters():
        parameter.ds_id = 0
    calls: list[int] = []
    unwrap_peft(model).get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    expected = expected_total(model).item()
    calls.clear()
    assert found_total(model).item() == pytest.approx(expected, rel=1e-5)
    assert len(calls) == 2  # once for each loss


def test_an_error_leaves_the_partitioned_head_as_it_was() -> None:
    model = build("llama")
    partition(model.lm_head, [])
    with pytest.raises(RuntimeError):
        ce_total(model, torch.randn(2, 31), torch.zeros(2, dtype=torch.long), torch.ones(2))
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2", "llama"])
def test_head_gives_the_logits_of_the_model(family: str) -> None:
    model = build(family, scale=4.0)
    with torch.no_grad():
        found = head(model)(hidden_states(model, embed(model, IDS)))
        torch.testing.assert_close(found, model(input_ids=IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5)
