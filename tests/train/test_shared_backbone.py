"""Two adapters on one frozen model compute what two models with the same adapters compute, in half the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_sft.data.collate import stage1_batch
from latent_sft.errors import ArtefactError
from latent_sft.experiment.workspace import Workspace
from latent_sft.methods.latent_sft import load_stage1, phase_start, shared_start
from latent_sft.models.load import add_lora
from latent_sft.train.run import checkpoint_activations, train_stage

SHARED = ("model.lora.rank=2", "model.lora.alpha=4", "stage1.share_backbone=true")


def both(work: Workspace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a shared and a separate stage-1 model of the same adapters, none of them zero."""
    shared, separate = shared_start(work.setup("stage1-encoder")), phase_start(work.setup("stage1-encoder"))
    separate.encoder = add_lora(separate.encoder, work.config.model.lora)
    separate.decoder = add_lora(separate.decoder, work.config.model.lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    separate.load_state_dict(shared.state_dict())
    return shared, separate


@pytest.mark.parametrize("tie", ["true", "false"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_two_models(tiny_config, tie, checkpointing):
    """With recomputed activations, too: the backward pass of the encoder comes long after the decoder ran."""
    work = Workspace(tiny_config(*SHARED, f"model.tiny.tie_embeddings={tie}"))
    rows = work.data["train"].select(range(6)).to_list()
    batch = stage1_batch(rows, work.spec, loss_reduction="token")
    gradients = []
    for model in both(work):
        if checkpointing:
            checkpoint_activations(model)
        loss = model.train()(**batch).loss_sums["ce"]
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        gradients.append((loss.item(), found))
    (loss_shared, shared), (loss_separate, separate) = gradients
    assert loss_shared == loss_separate
    assert shared.keys() == separate.keys() and len(shared) == 2 * 2 * 2 * 7 + 1  # halves, A and B, layers, linears
    for name, gradient in separate.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(shared[name], gradient), name


def test_the_weights_are_in_memory_once(tiny_config):
    shared, separate = both(Workspace(tiny_config(*SHARED)))
    adapters = sum(p.numel() for name, p in shared.named_parameters() if ".lora_" in name or name == "marker")
    one = sum(p.numel() for p in shared.encoder.parameters()) - adapters // 2

    def held(model: torch.nn.Module) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
        return sum(storages.values()) // 4

    assert held(separate) - held(shared) == pytest.approx(one, abs=16)
    assert held(shared) == pytest.approx(one + adapters, abs=16)


def test_phases_go_on_from_adapters_and_save_plain_models(tiny_config):
    config = tiny_config(*SHARED)
    finals = {phase: train_stage(config, phase).final for phase in ("stage1-encoder", "stage1-decoder", "stage1-union")}
    adapters = {phase: load_file(final / "adapters.safetensors") for phase, final in finals.items()}
    work = Workspace(config)

    def moved(phase: str, before: str, part: str) -> bool:
        names = [name for name in adapters[phase] if name.startswith(part)]
        return any(not torch.equal(adapters[phase][name], adapters[before][name]) for name in names)

    assert not moved("stage1-decoder", "stage1-encoder", "encoder")
    assert not moved("stage1-decoder", "stage1-encoder", "marker")
    assert moved("stage1-decoder", "stage1-encoder", "decoder")
    for part in ("encoder", "decoder", "marker"):
        assert moved("stage1-union", "stage1-decoder", part)
    # the folders hold each half on its own, as those of two models do
    base = load_file(Path(work.base) / "model.safetensors")
    untrained = load_file(finals["stage1-encoder"] / "decoder" / "model.safetensors")
    assert untrained.keys() == base.keys() and all(torch.equal(untrained[name], base[name]) for name in base)
    plain, live = (
        load_stage1(finals["stage1-union"], config.model, config.model, work.spec).eval(),
        shared_start(work.setup("stage2")).eval(),
    )
    batch = stage1_batch(work.data["train"].select(range(4)).to_list(), work.spec, loss_reduction="token")
    torch.testing.assert_close(plain(**batch).loss_sums["ce"], live(**batch).loss_sums["ce"], rtol=1e-5, atol=0)
    counts = json.loads((finals["stage1-union"].parent / "manifest.json").read_text())
    assert counts["parameters"] < 1.4 * sum(value.numel() for value in base.values())


def test_a_phase_of_two_models_cannot_be_shared_afterwards(tiny_config):
    config = tiny_config("model.lora.rank=2")
    train_stage(config, "stage1-encoder")
    work = Workspace(tiny_config(*SHARED, "model.lora.alpha=128"))
    with pytest.raises(ArtefactError, match=r"adapters.safetensors: missing.*share_backbone"):
        shared_start(work.setup("stage1-decoder"))
    with pytest.raises(ArtefactError, match=r"made by another experiment.*share_backbone"):
        train_stage(tiny_config(*SHARED, "model.lora.alpha=128"), "stage1-encoder")
