"""How much of the GPU a training step uses, and memory against the forecast of `latent-sft plan --gpus`.

Models have the sizes of the recipes' and random weights; settings are those of the recipes. Before a step is timed, its
losses are compared with plain ones on a short row: stage 1 with the dense masks, the others with all logits at once.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from eval.gpu.compare import GIB, peak_gib, seconds
from eval.gpu.parts import ROOT, Case, Result, Settings
from latent_sft import forecast
from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config
from latent_sft.config.schema import ModelConfig
from latent_sft.memory import Level
from latent_sft.method.losses import weighted_cross_entropy, weighted_sparse_kl
from latent_sft.method.types import Superposition
from latent_sft.methods import STAGES, cot, latent_sft
from latent_sft.methods.base import Setup
from latent_sft.models.backbone import unwrap_peft
from latent_sft.models.logits import head
from latent_sft.runs import write_json
from latent_sft.train.flops import peak_of, step_flops
from latent_sft.train.loop import make_optimizer
from latent_sft.train.run import checkpoint_activations

SHAPES = ROOT / "tests" / "fixtures" / "plans"
NAMED = ["cot.enabled=true", "stage1.union.enabled=true", "stage2.enabled=true", "launch.nproc=1"]
FULL = ["model.lora.rank=0"]
ALONE = ["train.micro_batch_size=1", "stage2.micro_batch_size=1", "train.global_batch_size=1"]
ALONE += ["stage2.global_batch_size=1", "train.gradient_checkpointing=true", "stage2.gradient_checkpointing=true"]
STAGE1, ALL = "stage1-union", ("cot", "stage1-union", "stage2")
# of two losses in bf16
APART = 2e-2
TINY_SHAPE = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
}


class Work(NamedTuple):
    """What is measured: a recipe with other settings, and the tokens of a row: prompt, CoT, answer."""

    shape: str
    recipe: str
    overrides: list[str]
    tokens: tuple[int, int, int]


LLAMA = partial(Work, "llama-3.2-1b", "gsm8k_llama1b.yaml")
QWEN = partial(Work, "qwen2.5-7b", "math_qwen7b.yaml")


def llama_cases(settings: Settings) -> Sequence[Case]:
    """Return the cases of Llama-1B on rows as of GSM8K."""
    rows = (100, 48, 8)
    larger = [
        f"{name}.{size}" for name in ("train", "stage2") for size in ("micro_batch_size=64", "global_batch_size=64")
    ]
    works = {"8 rows": LLAMA(FULL, rows), "64 rows": LLAMA([*FULL, *larger], rows), "LoRA, 8 rows": LLAMA([], rows)}
    return _cases(settings, works, ALL, 0.7)


def qwen_cases(settings: Settings) -> Sequence[Case]:
    """Return the cases of Qwen-7B with LoRA on rows as of competition mathematics."""
    works = {"CoT 2k": QWEN([], (200, 2048, 300))}
    longer = {"CoT 4k": QWEN([], (200, 4096, 300))}
    return [*_cases(settings, works, ALL, 1.5), *_cases(settings, longer, ALL[:2], 1.5)]


def long_llama_cases(settings: Settings) -> Sequence[Case]:
    """Return the cases of Llama-1B on long CoTs, one row at a time with gradient checkpointing."""
    works = {f"CoT {k}k": LLAMA([*FULL, *ALONE, "latent.rate=16"], (200, 1000 * k, 300)) for k in (4, 16, 32)}
    return _cases(settings, works, ALL, 0.8)


def long_qwen_cases(settings: Settings) -> Sequence[Case]:
    """Return the cases of Qwen-7B with LoRA on long CoTs."""
    works = {f"CoT {k}k": QWEN(ALONE, (200, 1000 * k, 300)) for k in (4, 16, 32)}
    return _cases(settings, works, ALL[:2], 1.3)


def _cases(settings: Settings, works: dict[str, Work], stages: Sequence[str], minutes: float) -> list[Case]:
    if settings.tiny:  # the first one, on a few tokens
        works = {name: work._replace(tokens=(9, 32, 4)) for name, work in list(works.items())[:1]}
    each = [(name, work, stage) for name, work in works.items() for stage in stages]
    return [Case(f"{stage}, {name}", partial(_case, settings, work, stage), minutes) for name, work, stage in each]


def _case(settings: Settings, work: Work, stage: str) -> Result:
    folder = SHAPES / work.shape
    if settings.tiny:
        folder = settings.out / "tiny-shape"
        write_json(folder / "config.json", TINY_SHAPE)
    given = [f"model.name_or_path={folder}", f"run_dir={settings.out / 'mfu'}"]
    config = load_config(ROOT / "configs" / work.recipe, [*NAMED, *given, *work.overrides])
    with _random_weights(folder, settings.device):
        examples = forecast.given_examples(config, 1, work.tokens)
        setup = forecast.plan_setup(config, stage, examples)
        model = STAGES[stage].model(setup).to(settings.device)
    result = _checked(model, config, stage, work.tokens, settings.device)
    if not result["same"]:
        return result
    load = forecast.load_of(stage, setup, examples)
    need = forecast.need_of(config, stage, Level(0), 1, forecast.measure(config, 0), examples, load)
    if setup.train.gradient_checkpointing:
        checkpoint_activations(model)
    batch = _batch(setup, stage, examples.longest[0], load.rows, settings.device)
    step = _step(model.train(), setup, stage, batch, config.precision(stage))
    duration = seconds(step)
    result |= {"rows": load.rows, "s per step": duration, "tokens/s": load.rows * load.tokens / duration}
    operations, gpu = step_flops(model, batch), torch.cuda.get_device_name() if settings.device == "cuda" else ""
    if operations is not None and peak_of(gpu) is not None:
        result["MFU"] = float(operations) / duration / peak_of(gpu)
    measured = peak_gib(step, settings.device)
    result |= {"forecast (GiB)": need.total / GIB, "measured (GiB)": measured}
    return result if measured is None else {**result, "measured/forecast": measured * GIB / need.total}


@contextmanager
def _random_weights(folder: Path, device: str) -> Iterator[None]:
    """Let the stages begin with random weights of a folder's sizes, made on the device."""

    def load_lm(_: Any, config: ModelConfig) -> nn.Module:
        with torch.device(device):
            sizes, dtype = AutoConfig.from_pretrained(folder), getattr(torch, config.dtype)
            return AutoModelForCausalLM.from_config(sizes, dtype=dtype, attn_implementation=config.attention)

    with patch.object(cot, "load_lm", load_lm), patch.object(latent_sft, "load_lm", load_lm):
        yield


def _batch(setup: Setup, stage: str, row: dict[str, Any], count: int, device: str) -> dict[str, Tensor]:
    draw = random.Random(0)
    rows = []
    for _ in range(count):  # with the id of the one whose latents are given
        tokens = {
            key: [draw.randrange(1, setup.spec.vocab_size) for _ in row[key]] for key in ("prompt", "cot", "answer")
        }
        rows.append({**row, **tokens})
    return send_to_device(STAGES[stage].batch(setup)(rows), device)


def _step(model: nn.Module, setup: Setup, stage: str, batch: dict[str, Tensor], precision: str) -> Any:
    optimizer, weights = make_optimizer(model, setup.train), STAGES[stage].terms(setup)
    device = next(model.parameters()).device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, precision == "bf16"):
            sums = model(**batch).loss_sums
        parts = [weights[name] * total / batch[f"count_{name}"].clamp(min=1) for name, total in sums.items()]
        functools.reduce(operator.add, parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), setup.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def _checked(model: Any, config: Config, stage: str, tokens: tuple[int, int, int], device: str) -> Result:
    """Compare losses on one short row; without dropout and noise."""
    examples = forecast.given_examples(config, 1, (min(tokens[0], 64), min(tokens[1], 256), min(tokens[2], 32)))
    setup = forecast.plan_setup(config, stage, examples)
    batch = _batch(setup, stage, examples.longest[0], 1, device)
    with torch.autocast(device, torch.bfloat16, config.precision(stage) == "bf16"):
        found = sum(model.eval()(**batch).loss_sums.values())
        if stage == STAGE1:
            chosen = model.encoder_attention, model.decoder_attention
            model.encoder_attention = model.decoder_attention = "dense"
            expected = model(**batch).loss_sums["ce"]
            model.encoder_attention, model.decoder_attention = chosen
        else:
            expected = _plain_loss(model, batch)
    apart = float((found - expected).abs() / expected.abs())
    return {"same": apart <= APART, "loss apart": apart}


def _plain_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    if "latent_ids" not in batch:
        logits = unwrap_peft(model.lm)(input_ids=batch["ids"], use_cache=False).logits.flatten(0, 1)
    else:
        latent = Superposition(batch["latent_ids"], batch["latent_weights"])
        logits = head(model.lm)(model.states(batch, latent))
    loss = weighted_cross_entropy(logits[batch["target_index"]], batch["targets"], batch["target_weights"])
    if "latent_ids" not in batch:
        return loss
    teacher = Superposition(*(part.flatten(0, 1)[batch["kl_latent"]] for part in latent))
    return loss + weighted_sparse_kl(logits[batch["kl_index"]], teacher, batch["kl_weights"])
