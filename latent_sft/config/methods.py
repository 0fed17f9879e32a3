"""Settings of the methods Latent-SFT is compared with: Coconut, CODI, PCCoT, KaVa and Soft Thinking.

Sources of the values stand in the configurations (`configs/`) and in the pages of the methods (`docs/methods/`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latent_sft.config.training import TrainConfig, need


def _off() -> TrainConfig:
    return TrainConfig(enabled=False)


@dataclass(frozen=True, kw_only=True)
class CoconutConfig:
    """Coconut: stage by stage one more CoT step gives way to latents, which are hidden states fed back as they are."""

    train: TrainConfig = field(default_factory=_off)
    init: Literal["base", "cot"] = "cot"
    """What it starts from: the base model, or the `cot` stage's checkpoint."""
    latents_per_step: int = 2
    """Latents that take the place of a step (paper: c)."""
    first_stage: int = 1
    """0 begins with the whole CoT, which `init: cot` has learned already."""
    max_stage: int = 3
    """Stage k has the first k steps replaced; after this one all remaining steps are left out, with as many latents. 0:
    nothing is ever replaced, which is CoT fine-tuning."""
    stage_share: float = 0.15
    """Of all training steps, spent at each stage; the last one, without any written step, takes the rest."""
    uniform_prob: float = 0.0
    """Chance of an example to be shown at a stage drawn uniformly instead of the current one."""
    pad_latents: bool = True
    """An example with fewer steps than the stage still gets the stage's number of latents."""
    reset_optimizer: bool = True
    """Forget the optimizer's moments whenever a stage begins."""

    def __post_init__(self) -> None:
        need(self.latents_per_step >= 1, "coconut.latents_per_step", self.latents_per_step, "an integer >= 1")
        need(self.max_stage >= 0, "coconut.max_stage", self.max_stage, "an integer >= 0")
        last = self.max_stage + 1 if self.max_stage else 0
        need(0 <= self.first_stage <= max(last, 1), "coconut.first_stage", self.first_stage, f"0 to {max(last, 1)}")
        share = self.stage_share * max(0, last - self.first_stage)
        need(self.stage_share > 0 and share < 1, "coconut.stage_share", self.stage_share, "shares that sum to below 1")
        need(0 <= self.uniform_prob <= 1, "coconut.uniform_prob", self.uniform_prob, "0 to 1")
        self.train.check("coconut.train")

    @property
    def num_latents(self) -> int:
        """Latents of the finished model."""
        return self.latents_per_step * self.max_stage


@dataclass(frozen=True, kw_only=True)
class KvDistillConfig:
    """KaVa's loss on keys and values: the teacher's cache over its CoT, compressed to M entries a head."""

    weight: float = 0.0
    """Of the loss (paper: alpha_2); 0 computes none of it."""
    loss: Literal["l1", "smooth_l1", "mse"] = "smooth_l1"
    layer_std: bool = False
    """Divide keys and values of a layer by the teacher's standard deviation there."""
    selector: Literal["rkv", "cosine", "attention", "crop", "uniform", "random"] = "rkv"
    """Which trace tokens a head keeps: rkv by importance and diversity, cosine by diversity alone, attention by
    importance alone; crop the first ones; uniform evenly spaced ones; random ones (controls)."""
    importance: float = 0.1
    """Share of importance in the score of rkv (paper: lambda)."""
    queries: Literal["answer", "tail"] = "answer"
    """Whose attention is importance: answer tokens, or those of `</think>` too. The paper says answer tokens."""
    pooling: Literal["mean", "max"] = "mean"
    """Query heads that share a key head: mean of their attention, or maximum of their logits before the softmax (R-KV).
    The paper does not say."""
    normalise: Literal["trace", "all"] = "trace"
    """Softmax over the trace alone, or over all the query sees and then restricted. The paper's formula says trace."""
    span: Literal["steps", "delimiter"] = "steps"
    """What can be kept: the steps shown to the teacher, or `</think>` too."""
    short: Literal["mask", "zero"] = "mask"
    """A trace shorter than M leaves slots over: left out of the loss, or drawn to zero."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over heads, head size and slots: mean, or sum over them divided by 2M as the formula is printed."""


@dataclass(frozen=True, kw_only=True)
class SelfDistillConfig:
    """CODI, PCCoT or KaVa: one model, as teacher with the written CoT and as student with M latents, both trained.
    Defaults that are not those below: codi has num_latents=6, iterations=6 and hidden_embedding=true, pccot
    projection=false, kava hidden_weight=10, kv.weight=1 and kv.layer_std=true."""

    train: TrainConfig = field(default_factory=_off)
    """`ce_weight` weighs the student's cross-entropy."""
    init: Literal["base", "cot"] = "base"
    num_latents: int = 24
    """M."""
    iterations: int = 3
    """T Jacobi iterations over all latents at once; M (or more) is one latent after another, 0 pause tokens."""
    projection: bool = True
    """Latents are hidden states through Linear-GELU-Linear-LayerNorm; false: as they are."""
    projection_dropout: float = 0.0
    drop_last_step: bool = True
    """The teacher does not see the last step (of two or more), or the token before the answer would tell nothing."""
    teacher_weight: float = 1.0
    """Of the teacher's cross-entropy on steps and answer."""
    hidden_weight: float = 1.0
    """Of the distance between hidden states at the token before the answer (CODI: gamma, KaVa: alpha_1)."""
    hidden_loss: Literal["smooth_l1", "l1", "mse"] = "smooth_l1"
    hidden_std: Literal["layer", "all", "none"] = "layer"
    """Divided by the teacher's standard deviation: of each layer, of all layers together, or not."""
    hidden_embedding: bool = False
    """Count the embedding's output as a layer (CODI's code does)."""
    kv: KvDistillConfig = field(default_factory=KvDistillConfig)

    def check(self, section: str) -> None:
        """Raise a ConfigError for a value out of range; `section` is `codi`, `pccot` or `kava`."""
        need(self.num_latents >= 1, f"{section}.num_latents", self.num_latents, "an integer >= 1")
        need(self.iterations >= 0, f"{section}.iterations", self.iterations, "an integer >= 0")
        need(0 <= self.projection_dropout < 1, f"{section}.projection_dropout", self.projection_dropout, "0 to below 1")
        for key in ("teacher_weight", "hidden_weight"):
            need(getattr(self, key) >= 0, f"{section}.{key}", getattr(self, key), "a number >= 0")
        need(self.kv.weight >= 0, f"{section}.kv.weight", self.kv.weight, "a number >= 0")
        need(0 <= self.kv.importance <= 1, f"{section}.kv.importance", self.kv.importance, "0 to 1")


def codi() -> SelfDistillConfig:
    """Return CODI's defaults: six latents one after another (arXiv 2502.21074)."""
    return SelfDistillConfig(num_latents=6, iterations=6, hidden_embedding=True)


def pccot() -> SelfDistillConfig:
    """Return PCCoT's defaults: 24 latents in three iterations, no projection (arXiv 2506.18582)."""
    return SelfDistillConfig(projection=False)


def kava() -> SelfDistillConfig:
    """Return KaVa's defaults, those of Llama-3.2-1B on GSM8K-Aug (arXiv 2510.02312)."""
    return SelfDistillConfig(hidden_weight=10.0, kv=KvDistillConfig(weight=1.0, layer_std=True))


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
