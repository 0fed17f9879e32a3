"""Memory of a training step on one GPU, from sizes alone: model states, activations, logits. Bytes everywhere.

docs/internals/plan.md gives every formula with its reason; tests/test_memory.py compares
them with what live objects hold.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import NamedTuple

from latent_sft.config.schema import ModelConfig

GIB = 2**30
GPUS_PER_NODE = 8
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# DeepSpeed's stage3_max_live_parameters: gathered weights that may stand on a GPU at once
MAX_LIVE = 1_000_000_000


class Level(NamedTuple):
    """How a job shares its memory: `launch.zero` and `launch.offload`."""

    zero: int
    offload: str = "none"

    def __str__(self) -> str:
        return f"ZeRO {self.zero}" + ("" if self.offload == "none" else f" +{self.offload}")


# in the order in which they are worth trying: offloading costs more time than any sharing
LEVELS = (
    *(Level(zero) for zero in range(4)),
    *(Level(zero, "optimizer") for zero in (1, 2, 3)),
    Level(3, "parameters"),
)


class Weights(NamedTuple):
    """The parameters of everything a stage holds, tied ones once."""

    trained: int  # number of trained parameters
    trained_bytes: int
    frozen_bytes: int
    largest: int  # parameters of the largest single module, a table or a matrix
    width: int  # bytes of one of those
    trains_head: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of one copy of everything."""
        return self.trained_bytes + self.frozen_bytes


class Shape(NamedTuple):
    """Sizes of a dense decoder, as in its config.json."""

    layers: int
    hidden: int
    query: int  # heads x head size
    key: int  # key-value heads x head size
    inner: int  # width of the MLP
    vocab: int


class Backbone(NamedTuple):
    """One language model: its sizes, parameters, those of an untied head, its largest module, and LoRA's."""

    shape: Shape
    size: int
    head: int
    largest: int
    adapters: int


class Numbers(NamedTuple):
    """Bytes per element in one stage."""

    weight: int  # of the frozen and fully trained weights, and so of the residual stream
    compute: int  # of matrix products: 2 under autocast, else as `weight`
    adapter: int = 0  # of LoRA's matrices, which PEFT keeps in float32; 0 without them
    dropout: bool = False  # whether LoRA drops inputs


class States(NamedTuple):
    """Model states: bytes on each GPU, and in the host memory of each node."""

    gpu: int
    host: int


def itemsize(model: ModelConfig) -> int:
    """Return the bytes of one weight of the base model."""
    return DTYPE_BYTES[model.dtype]


def one_model(backbone: Backbone, model: ModelConfig, trained: ModelConfig, extra: int = 0) -> Weights:
    """Return the parameters of a stage that holds one language model, and `extra` in float32 beside it.

    Args:
        backbone: sizes of the model.
        model: how it is loaded where adapters are trained.
        trained: how it is loaded where it is trained as a whole.
        extra: further trained parameters.
    """
    item, whole, adapters = itemsize(model), itemsize(trained), backbone.adapters
    if adapters:  # in float32, as PEFT keeps them
        return Weights(adapters + extra, 4 * (adapters + extra), item * backbone.size, backbone.largest, item)
    return Weights(backbone.size + extra, whole * (backbone.size + extra), 0, backbone.largest, whole, True)


def model_states(weights: Weights, level: Level, gpus: int) -> States:
    """Return weights, gradients and AdamW states on `gpus` GPUs, on nodes of GPUS_PER_NODE.

    ZeRO 2 and 3 are DeepSpeed's own estimates. They take every parameter as trained and 2 bytes wide, with a float32
    copy: what is frozen is added by its bytes, and wider weights need no float32 copy of their gradients.
    """
    trained, frozen = weights.trained_bytes, weights.frozen_bytes
    if level.zero == 0:  # weight, gradient and two states, and the gradient buckets of data parallelism
        return States((4 if gpus == 1 else 5) * trained + frozen, 0)
    with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed's log goes is settled by its first import
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    offload, on_host = level.offload != "none", level.offload == "parameters"
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    cluster = {"num_gpus_per_node": math.ceil(gpus / nodes), "num_nodes": nodes, "cpu_offload": offload}
    wider = trained - 2 * weights.trained
    if level.zero == 3:
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            weights.trained, weights.largest, cpu_offload_params=on_host, zero_init=True, **cluster
        )
        gpu += 2 * (weights.width - 2) * weights.largest  # it stands whole on every GPU, with its gradient
        if on_host:
            return States(gpu, host + math.ceil((frozen + wider) / nodes))
        return States(gpu + wider // gpus + math.ceil(frozen / gpus), host if offload else 0)
    host, gpu = estimate_zero2_model_states_mem_needs(weights.trained, **cluster)
    gpu += wider - (0 if offload else wider // gpus)
    if level.zero == 1:  # gradients stay whole until the step
        gpu += trained - (0 if offload else trained // gpus)
    return States(gpu + frozen, host if offload else 0)


def buffers(weights: Weights, level: Level, bucket: int) -> int:
    """Return DeepSpeed's buffers: two of `bucket` gradients and one of weights, and what ZeRO 3 gathers."""
    if level.zero == 0 or weights.trained == 0:
        return 0
    buckets = 3 * min(bucket * weights.trained_bytes // weights.trained, weights.trained_bytes)
    return buckets + (min(MAX_LIVE * weights.width, weights.bytes) if level.zero == 3 else 0)


def activations(shape: Shape, numbers: Numbers, positions: int, *, checkpointing: bool) -> int:
    """Return what the layers of one model keep between forward and backward pass; those of a Llama.

    Args:
        shape: of the model.
        numbers: bytes per element.
        positions: rows x padded length of a micro-batch.
        checkpointing: whether layers are computed again in the backward pass: then each keeps its input only.
    """
    d, q, k, i = shape.hidden, shape.query, shape.key, shape.inner
    weight, compute = numbers.weight, numbers.compute
    autocast = compute != weight
    position = 2 * d * (4 + weight)  # inputs of both norms, in float32 and normalised
    position += (5 if autocast else 2) * d * compute  # inputs of the projections; under autocast a cast for each
    position += (2 * q + 2 * k + 4 * i) * compute  # q, k, v, output (SDPA keeps no T x T scores); MLP
    if numbers.adapter:
        cast = compute if autocast else numbers.adapter if numbers.adapter != weight else 0
        position += (5 * d + q + i) * (cast + (numbers.adapter + 1 if numbers.dropout else 0))
    layer = positions * position
    if autocast:  # 16-bit copies of the weights
        layer += compute * (2 * d * q + 2 * d * k + 3 * d * i)
    return shape.layers * positions * d * weight + layer if checkpointing else shape.layers * layer


def logits(shape: Shape, numbers: Numbers, labels: int, *, trained: bool, chunk: int) -> int:
    """Return what the loss needs beside the activations (`method.losses.linear_nll`).

    Args:
        shape: of the model.
        numbers: bytes per element.
        labels: labelled positions of a micro-batch.
        trained: whether the head's weight is trained.
        chunk: bytes of a chunk of logits.
    """
    half = numbers.compute != 4
    at_once = min(chunk, 4 * shape.vocab * labels) * (2 if half else 1)
    table = shape.vocab * shape.hidden * (6 if half else 4)  # gradient in float32, and the 16-bit product
    return at_once + 4 * labels * shape.hidden + (table if trained else 0)
