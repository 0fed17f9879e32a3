"""Soft Thinking (arXiv 2505.15778): the `cot` stage's model thinks in mixtures of tokens, without any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latent_sft.config.schema import ModelConfig
from latent_sft.config.training import need
from latent_sft.inference.solve import Thinker
from latent_sft.method.types import LatentSpec, Soft
from latent_sft.methods.base import Method, Model
from latent_sft.models.load import load_lm


@dataclass(frozen=True, kw_only=True)
class SoftThinkingConfig:
    """Soft Thinking (arXiv 2505.15778): the `cot` stage's model thinks in mixtures of tokens, without any training."""

    enabled: bool = False
    temperature: float = 0.6
    """Of the token distribution."""
    top_k: int = 10
    """Tokens of a mixture at most; 1 is greedy decoding."""
    top_p: float = 0.95
    """Nucleus: the fewest tokens with this mass."""
    min_p: float = 0.0
    """Tokens below this share of the likeliest one are left out."""
    cold_stop_entropy: float = 0.01
    """Nats; with `cold_stop_steps` steps in a row below it, thinking is ended. 0 never."""
    cold_stop_steps: int = 256
    noise_scale: float = 0.0
    """Gumbel noise on the logarithms of the mixture's weights (arXiv 2508.03440); 0 none."""
    noise_temperature: float = 0.5
    """Of the softmax after that noise."""

    def __post_init__(self) -> None:
        need(self.temperature > 0, "soft_thinking.temperature", self.temperature, "a number > 0")
        need(self.top_k >= 1, "soft_thinking.top_k", self.top_k, "an integer >= 1")
        need(0 < self.top_p <= 1, "soft_thinking.top_p", self.top_p, "0 < top_p <= 1")
        need(0 <= self.min_p < 1, "soft_thinking.min_p", self.min_p, "0 <= min_p < 1")
        need(self.cold_stop_entropy >= 0, "soft_thinking.cold_stop_entropy", self.cold_stop_entropy, "a number >= 0")
        need(self.cold_stop_steps >= 1, "soft_thinking.cold_stop_steps", self.cold_stop_steps, "an integer >= 1")
        need(self.noise_scale >= 0, "soft_thinking.noise_scale", self.noise_scale, "a number >= 0")
        need(self.noise_temperature > 0, "soft_thinking.noise_temperature", self.noise_temperature, "a number > 0")


def _load(folder: Path, model: ModelConfig, spec: LatentSpec, settings: Any, device: torch.device) -> Thinker:
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k != "enabled"}
    lm = load_lm(folder, model)
    lm.to(device)  # type: ignore[arg-type]  # transformers wraps it in a decorator that loses its types
    return Thinker("soft", lm, mixture=Soft(**values))


def _check(settings: SoftThinkingConfig, model: ModelConfig, stages: Sequence[str]) -> None:
    ready = not settings.enabled or "cot" in stages
    need(ready, "soft_thinking.enabled", settings.enabled, "cot.enabled=true, since it runs that model")


METHOD = Method(
    title="Soft Thinking",
    arxiv="2505.15778",
    paper="Soft Thinking: Unlocking the Reasoning Potential of LLMs in Continuous Concept Space",
    settings="soft_thinking",
    sections={"soft_thinking": SoftThinkingConfig},
    check=_check,
    models=(
        Model(
            name="soft-thinking",
            meaning="the CoT model, fed mixtures of its likeliest tokens; untrained",
            colour="#5aa5d6",
            stages=("cot",),
            enabled=lambda settings: settings.enabled,
            identity=lambda settings: {"soft": dataclasses.asdict(settings)},
            load=_load,
        ),
    ),
)
