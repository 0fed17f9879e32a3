"""How one stage is trained: the settings every stage has. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from latent_sft.errors import ConfigError


def need(ok: bool, key: str, value: object, expected: str) -> None:
    """Raise a ConfigError that names the key, the value and what was expected, unless `ok`."""
    if not ok:
        raise ConfigError(f"{key}: got {value!r}, expected {expected}.")


@dataclass(frozen=True, kw_only=True)
class TrainDefaults:
    """How every stage is trained, unless its own section, which has the same keys, says otherwise."""

    max_steps: int = 0
    """Optimizer steps; 0 trains `epochs`."""
    epochs: float = 1.0
    micro_batch_size: int = 32
    """Examples per device and micro-batch."""
    max_tokens: int = 0
    """Instead of `micro_batch_size`: positions per device and micro-batch, rows times the longest with padding, so that
    short examples come in larger batches. 0 counts examples. In stage 1 the longer of encoder and decoder sequence
    counts."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of a process in an optimizer step."""
    global_batch_size: int = 0
    """Examples of an optimizer step, all processes together; `gradient_accumulation_steps` is then what
    `micro_batch_size` and the number of processes leave. 0: the product of the three, so that more processes make
    larger steps."""
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.0
    """Of the peak learning rate, at the end of a cosine."""
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 never."""
    loss_reduction: Literal["token", "segment", "sample"] = "token"
    """token: mean over labelled tokens (published code); segment: mean over segments of per-segment token means,
    then over examples (paper); sample: mean over examples of per-example token means."""
    prompt_targets: bool = False
    """cot and no-cot: learn the prompt's tokens too, as in pretraining; a model from scratch has no language yet."""
    ce_weight: float = 1.0
    kl_weight: float = 1.0
    """Of stages with a KL term."""
    log_every: int = 20
    eval_every: int = 0
    """Steps between evaluations on validation (answers decoded); 0 does so once an epoch."""
    eval_examples: int = 256
    stop_at_accuracy: float = 0.0
    """End the stage once validation accuracy reaches this; 0 never."""
    save_every: int = 0
    """Steps between checkpoints, beside one at each new best evaluation; 0: one at every evaluation."""
    save_total_limit: int = 2
    """Newest checkpoints that stay, the best one among them."""
    keep_checkpoint: bool = True
    """Keep the last checkpoint of a finished stage (and the best one), so that it can go on with more steps: weights
    and optimizer, with AdamW three times the trained parameters in float32. false deletes them."""
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    num_workers: int = 0

    def shared(self, section: str, processes: int) -> Self:
        """Return the settings with the accumulation that `global_batch_size`, where it is given, means for a job.

        Raises:
            ConfigError: this number of processes cannot share that batch.
        """
        if not self.global_batch_size:
            return self
        at_once = self.micro_batch_size * processes
        micro = f"micro_batch_size={self.micro_batch_size} x processes={processes}"
        how = f"a multiple of {at_once} ({micro}); change one of the three"
        need(self.global_batch_size % at_once == 0, f"{section}.global_batch_size", self.global_batch_size, how)
        return replace(self, gradient_accumulation_steps=self.global_batch_size // at_once)

    def check(self, section: str) -> None:
        """Raise a ConfigError for a value out of range; `section` is where these settings stand."""
        need(self.max_steps >= 0, f"{section}.max_steps", self.max_steps, "0 (train `epochs`) or a number of steps")
        need(self.max_steps > 0 or self.epochs > 0, f"{section}.epochs", self.epochs, "a number > 0")
        need(self.micro_batch_size >= 1, f"{section}.micro_batch_size", self.micro_batch_size, "an integer >= 1")
        need(self.max_tokens >= 0, f"{section}.max_tokens", self.max_tokens, "0 (count examples) or a number of tokens")
        need(
            self.gradient_accumulation_steps >= 1,
            f"{section}.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            "an integer >= 1",
        )
        step = self.global_batch_size
        need(step >= 0, f"{section}.global_batch_size", step, "0 or a number of examples")
        need(
            not (step and self.max_tokens), f"{section}.global_batch_size", step, "0, where max_tokens counts positions"
        )
        made = self.gradient_accumulation_steps == 1 or not step
        need(
            made,
            f"{section}.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            f"1, or global_batch_size=0: {step} decides it",
        )
        need(self.learning_rate > 0, f"{section}.learning_rate", self.learning_rate, "a number > 0")
        need(0 <= self.warmup_ratio < 1, f"{section}.warmup_ratio", self.warmup_ratio, "0 <= ratio < 1")
        need(0 <= self.min_lr_ratio <= 1, f"{section}.min_lr_ratio", self.min_lr_ratio, "0 to 1")
        need(0 <= self.stop_at_accuracy <= 1, f"{section}.stop_at_accuracy", self.stop_at_accuracy, "0 to 1")
        need(self.eval_examples >= 1, f"{section}.eval_examples", self.eval_examples, "an integer >= 1")
        need(self.save_every >= 0, f"{section}.save_every", self.save_every, "0 or a number of steps")
        need(self.save_total_limit >= 1, f"{section}.save_total_limit", self.save_total_limit, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainDefaults):
    """How one stage is trained: every key of `train`, and its own."""

    enabled: bool = False
    """On where the section is named in the file or on the command line, unless it says false here."""
    start_from: str = ""
    """Folder of weights to start from instead of what the stage would start from: a finished stage of another run
    (RUN/STAGE), an export, or any folder of transformers with the sizes and the tokenizer of `model`. Known by its
    content, not by its path. A phase of stage 1 takes encoder, decoder and marker from a folder of stage 1; a stage
    that trains one model takes its decoder."""
