"""Attention backends of stage 1 and chunked losses equal their definitions: forward and gradients, fp32 and bf16."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from eval.gpu.compare import distance, gradients
from eval.gpu.parts import ROOT, Case, Result, Settings
from eval.speed.cases import Case as Rows
from eval.speed.cases import Size, rows_of, spec_of
from latent_sft.data.collate import stage1_batch
from latent_sft.method.losses import LinearHead, linear_nll, mapped_nll, sparse_nll
from latent_sft.models.load import initial_marker
from latent_sft.models.stage1 import Stage1Model

sys.path.append(str(ROOT / "tests"))  # the families that the tests know, in one list
from models.families import FAMILIES, SIZES

# heads of 32: FlexAttention takes none below 16
SIZE = Size(hidden=128, layers=2, heads=4, intermediate=192, vocab=512)
EXACT = {"cpu": 1e-5, "cuda": 1e-4}
WITHOUT_FLEX = ("gpt2",)  # in transformers
# gradients in bf16 differ from those in float32 by rounding: by at most so many times what the reference's do
TIMES = 2.0


def cases(settings: Settings) -> Sequence[Case]:
    """Return a case for every family, and two for the losses."""
    found = [Case(family, partial(_family, settings, family), 0.4) for family in FAMILIES]
    return [*found, *(Case(f"losses, {name}", partial(_losses, settings, name), 0.2) for name in ("linear", "mapped"))]


def _family(settings: Settings, family: str) -> Result:
    device, backends = settings.device, ["two_track"] + (["flex"] if settings.device == "cuda" else [])
    case = Rows(part="stage1", name="", size=SIZE, prompt=12, cot=(5, 9, 12) if settings.tiny else (37, 90, 151))
    batch = stage1_batch(rows_of(case), spec_of(SIZE), loss_reduction="token")
    batch = send_to_device(batch, device)

    def losses(backend: str, dtype: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
        model = _stage1(family, backend, device)
        return gradients(model, lambda: model(**batch).loss_sums["ce"] / batch["count_ce"], dtype)

    exact, plain = losses("dense", None), losses("dense", torch.bfloat16)
    result: Result = {"same": True, "bf16 dense": distance(plain, exact)["gradient"]}
    for backend in backends:
        if backend == "flex" and family in WITHOUT_FLEX:
            continue
        error, low = distance(losses(backend, None), exact), distance(losses(backend, torch.bfloat16), exact)
        result |= {f"fp32 {backend}": max(error.values()), f"bf16 {backend}": low["gradient"]}
        fits = max(error.values()) <= EXACT[device] and low["gradient"] <= TIMES * result["bf16 dense"]
        result["same"] = result["same"] and fits
    return result


def _stage1(family: str, backend: str, device: str) -> Stage1Model:
    def half(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        head = {"head_dim": SIZE.hidden // SIZE.heads} if "head_dim" in FAMILIES[family] else {}
        sizes: dict[str, Any] = {**SIZES, "hidden_size": SIZE.hidden, "intermediate_size": SIZE.intermediate}
        sizes |= {"vocab_size": SIZE.vocab, "max_position_embeddings": 512, **FAMILIES[family], **head}
        if family == "gpt2":
            own = ("hidden", "num_", "inter", "max_")
            sizes = {k: v for k, v in sizes.items() if not k.startswith(own)} | {"n_embd": SIZE.hidden}
            sizes |= {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        implementation = "eager" if family == "gemma2" else "sdpa"
        config = AutoConfig.for_model(family, **sizes)
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(device)

    encoder, decoder = half(1), half(2)
    spec = spec_of(SIZE)
    return Stage1Model(encoder, decoder, initial_marker(encoder, spec), spec, backend).to(device)


def _losses(settings: Settings, name: str) -> Result:
    """Chunks against all logits at once, with sparse targets, a bias, a scale and a soft-cap."""
    device = settings.device
    rows, vocab, hidden = (50, 300, 16) if settings.tiny else (3000, 32_000, 512)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).to(device)
    ids = torch.randint(vocab, (rows, 4), generator=generator).to(device)
    alpha = torch.softmax(torch.randn(rows, 4, generator=generator), -1).to(device)
    weights = torch.rand(rows, generator=generator).to(device)
    layer = nn.Linear(hidden, vocab).to(device)
    held = nn.ParameterDict({"hidden": nn.Parameter(states), "weight": layer.weight, "bias": layer.bias})

    def logits(hidden: Tensor) -> Tensor:
        x = 0.5 * nn.functional.linear(hidden, held["weight"], held["bias"])
        return 20.0 * torch.tanh(x / 20.0)

    def plain() -> Tensor:
        return (sparse_nll(logits(held["hidden"]), ids, alpha) * weights).sum() / rows

    def chunked() -> Tensor:
        if name == "mapped":
            return mapped_nll(held["hidden"], logits, ids, alpha, weights, rows // 7) / rows
        head = LinearHead(held["weight"], held["bias"], 0.5, 20.0)
        return linear_nll(held["hidden"], head, ids, alpha, weights, rows // 7) / rows

    exact = gradients(held, plain, None)
    error = distance(gradients(held, chunked, None), exact)
    plain_error = distance(gradients(held, plain, torch.bfloat16), exact)
    low = distance(gradients(held, chunked, torch.bfloat16), exact)
    same = max(error.values()) <= EXACT[device] and low["gradient"] <= TIMES * plain_error["gradient"]
    found = {"fp32 two_track": max(error.values()), "bf16 two_track": low["gradient"]}
    return {"same": same, "bf16 dense": plain_error["gradient"], **found}
