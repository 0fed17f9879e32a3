"""ZeRO: DeepSpeed's configuration made from ours, and what DeepSpeed leaves to us.

    settings            the JSON DeepSpeed gets; nothing in it says how the model is optimised but the configuration
    loading             a model that no process could hold is cut up while it is loaded
    trained_parameters  whole tensors out of a partitioned model
    check_checkpoint    can this job resume from that checkpoint

DeepSpeed is imported where ZeRO is asked for, and nowhere else.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from latent_sft.config.experiment import Config
from latent_sft.config.schema import LaunchConfig
from latent_sft.config.training import TrainConfig
from latent_sft.errors import ConfigError, TrainingError
from latent_sft.experiment.workspace import processes
from latent_sft.launcher import is_worker
from latent_sft.models.sharding import gathered_parameters, is_partitioned

# elements reduced at once; DeepSpeed's own 5e8 reserves 2 GB on every GPU for buckets that are no faster
BUCKET = 50_000_000
# what the configuration decides: set in a JSON file as well, one of the two would be silently ignored
OURS = {
    "optimizer": "learning_rate, weight_decay, beta2",
    "scheduler": "schedule, warmup_ratio, min_lr_ratio",
    "train_batch_size": "micro_batch_size, gradient_accumulation_steps, global_batch_size, launch.nproc",
    "train_micro_batch_size_per_gpu": "micro_batch_size, max_tokens",
    "gradient_accumulation_steps": "gradient_accumulation_steps, global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "prescale_gradients": "loss_reduction",
    "gradient_predivide_factor": "loss_reduction",
    "fp16": "mixed_precision, model.dtype",
    "bf16": "mixed_precision, model.dtype",
    "bfloat16": "mixed_precision, model.dtype",
    "amp": "mixed_precision",
    "torch_autocast": "mixed_precision",
    "data_types": "model.dtype",
    "zero_force_ds_cpu_optimizer": "launch.offload",
    "zero_optimization.stage": "launch.zero",
    "zero_optimization.offload_optimizer": "launch.offload",
    "zero_optimization.offload_param": "launch.offload",
    "zero_optimization.cpu_offload": "launch.offload",
}


def settings(config: Config, train: TrainConfig) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration of a stage, or None without ZeRO.

    The optimizer and its schedule are the loop's, as without ZeRO; so are their numbers.

    Raises:
        ConfigError: `launch.deepspeed` is no readable JSON object, or sets what the configuration decides.
    """
    launch = config.launch
    if launch.zero == 0:
        return None
    extra = _extra(launch)
    zero: dict[str, Any] = {"stage": launch.zero, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if launch.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if launch.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    made = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "steps_per_print": 1_000_000_000,  # we log ourselves
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | extra.pop("zero_optimization", {}),
    }
    if config.model.dtype == "bfloat16" and config.model.lora.rank == 0:
        made["bf16"] = {"enabled": True}  # trained weights in bf16, with float32 copies in the optimizer
    elif train.mixed_precision == "bf16":
        # weights and their gradients travel as they are, so that the numbers are those without ZeRO
        made["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return made | extra


def _extra(launch: LaunchConfig) -> dict[str, Any]:
    if not launch.deepspeed:
        return {}
    where = f"launch.deepspeed: {launch.deepspeed}"
    try:
        extra = json.loads(Path(launch.deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: not a readable JSON file ({error}).") from error
    if not isinstance(extra, dict) or not isinstance(extra.get("zero_optimization", {}), dict):
        raise ConfigError(f"{where}: expected a JSON object, with an object for zero_optimization.")
    given = [*extra, *(f"zero_optimization.{key}" for key in extra.get("zero_optimization", {}))]
    for key in given:
        if key in OURS:
            raise ConfigError(
                f"{where}: sets {key!r}, which this experiment's configuration decides ({OURS[key]}); remove it there."
            )
    return extra


def begin(launch: LaunchConfig) -> None:
    """Prepare this process for ZeRO; does nothing without it.

    Raises:
        TrainingError: this process was not started by a launcher.
    """
    if launch.zero == 0:
        return
    if not torch.distributed.is_initialized() and is_worker():
        torch.distributed.init_process_group("gloo")  # a single process on the CPU, for which accelerate makes none
    if not torch.distributed.is_initialized():
        raise TrainingError(
            f"launch.zero={launch.zero} needs a process group, also on one GPU: start with `latent-sft train STAGE "
            "CONFIG`, which calls torchrun, or by one of the files in launch/."
        )
    # DeepSpeed calls collectives by names that torch has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # on the CPU DeepSpeed would compile a shared-memory kernel and, where a killed job left its lock, wait for ever
        deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def loading(config: Config) -> Iterator[None]:
    """Load models cut up among the processes while the context lasts, with ZeRO-3; else do nothing.

    transformers reads the weights on the first process and sends them on, parameter by parameter.
    """
    if config.launch.zero < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    zero = {"stage": 3}
    if config.launch.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    kept = HfDeepSpeedConfig(  # transformers holds a weak reference to it
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            # here these only say in which type the pieces are kept
            "bf16": {"enabled": config.model.dtype == "bfloat16"},
            "fp16": {"enabled": config.model.dtype == "float16"},
        }
    )
    try:
        yield
    finally:
        del kept
        unset_hf_deepspeed_config()


def one_dtype(model: nn.Module, deepspeed: dict[str, Any] | None) -> None:
    """Round marker and thoughts beside bfloat16 weights to their type, as DeepSpeed does but for ZeRO-3."""
    if deepspeed and "bf16" in deepspeed:
        for parameter in model.parameters():
            if not is_partitioned([parameter]):
                parameter.data = parameter.data.bfloat16()


def limit_waiting(timeout: timedelta) -> None:
    """Let every group of processes give up after `timeout`; DeepSpeed makes groups of its own, with torch's default."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters whole, by name, on the CPU of the main process; the others get an empty one.

    Every process must call this; under ZeRO-3 the parameters are put together one by one.
    """
    keep, found = processes().is_main_process, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered_parameters([parameter]):
                if keep:
                    found[name] = parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
    return found


def check_checkpoint(checkpoint: str, launch: LaunchConfig) -> None:
    """Refuse to resume where the optimizer's state is laid out otherwise than this job would read it.

    Raises:
        TrainingError: what differs, and the two ways out.
    """
    folder = Path(checkpoint)
    levels = ["0"] if not any(folder.glob("global_step*")) else ["1", "2"]
    if any(folder.glob("global_step*/zero_pp_rank_*_model_states.pt")):
        levels = ["3"]
    if str(launch.zero) not in levels:
        raise TrainingError(
            f"{checkpoint}: written with launch.zero={' or '.join(levels)}, got {launch.zero}; each keeps "
            "the optimizer's state in its own way. Go on with the same level, or delete the checkpoints of this stage."
        )
