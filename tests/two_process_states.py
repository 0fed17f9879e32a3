"""Started by torchrun: what the objects of a ZeRO job hold on this process, bytes a case; see test_memory.py.

two_process_states.py RESULT.json
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 2000,
}
CASES = [(zero, dtype, frozen) for zero in (1, 2, 3) for dtype, frozen in (("float32", False), ("bfloat16", True))]
# nothing of a bucket's size stays behind, so that what is left are the states
ZERO = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}


def build(dtype: str, *, frozen: bool) -> Any:
    """Return a Llama; `frozen`: with trained tables only, as adapters leave most of a model frozen."""
    config = AutoConfig.for_model("llama", **SIZES, pad_token_id=0, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if frozen:
        model.model.layers.requires_grad_(False)
    return model


def held() -> int:
    """Return the bytes of all living tensors, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(zero: int, dtype: str, frozen: bool) -> int:
    """Return the bytes held between the second backward pass and its step."""
    before, model = held(), build(dtype, frozen=frozen)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "bf16": {"enabled": dtype == "bfloat16"},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": zero, **ZERO},
        },
    )
    ids = torch.arange(8)[None] + dist.get_rank()
    found = 0
    for _ in range(2):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        del loss
        found = held() - before
        engine.step()
    engine.destroy()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}  # no kernel is compiled
    deepspeed.init_distributed("gloo")
    results = [measure(*case) for case in CASES]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
