"""Memory of a training step on one GPU, from sizes alone: model states, activations, logits. Bytes everywhere.

Model states under ZeRO 2 and 3 are DeepSpeed's own estimates, the rest is written out here; docs/internals/plan.md has
every formula with its reason, tests/test_memory.py compares with what live objects hold. Left out: the CUDA context
(about a gigabyte), fragmentation, and validation, which decodes with a cache but without gradients.
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
    Level(1, "optimizer"),
    Level(2, "optimizer"),
    Level(3, "optimizer"),
    Level(3, "parameters"),
)


class Weights(NamedTuple):
    """The parameters of everything a stage holds, tied ones once.

    Attributes:
        trained: number of trained parameters.
        trained_bytes: what they take.
        frozen_bytes: what the frozen ones take.
        largest: parameters of the largest single module (a table or a matrix).
        width: bytes of one of those.
        trains_head: whether the LM head is trained.
    """

    trained: int
    trained_bytes: int
    frozen_bytes: int
    largest: int
    width: int
    trains_head: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of one copy of everything."""
        return self.trained_bytes + self.frozen_bytes


class Shape(NamedTuple):
    """Sizes of a dense decoder, as in its config.json.

    Attributes:
        layers: number of layers.
        hidden: width D of the residual stream.
        query: heads x head size.
        key: key-value heads x head size.
        inner: width of the MLP.
        vocab: rows of the tables.
    """

    layers: int
    hidden: int
    query: int
    key: int
    inner: int
    vocab: int


class Backbone(NamedTuple):
    """One language model: its sizes, parameters, those of an untied head, its largest module, and LoRA's."""

    shape: Shape
    size: int
    head: int
    largest: int
    adapters: int


class Numbers(NamedTuple):
    """Bytes per element in one stage.

    Attributes:
        weight: of the frozen and fully trained weights, and so of the residual stream.
        compute: of matrix products: 2 under autocast, else as `weight`.
        adapter: of LoRA's matrices, which PEFT keeps in float32; 0 without them.
        dropout: whether LoRA drops inputs.
    """

    weight: int
    compute: int
    adapter: int = 0
    dropout: bool = False


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
    """Return weights, gradients and AdamW states.

        ZeRO 0   w T + w T + 2 w T + frozen, and w T for the gradient buckets of data parallelism on several GPUs
        ZeRO 1   ZeRO 2 + w T (1 - 1/N): gradients stay whole until the step
        ZeRO 2   DeepSpeed's estimate for T, + frozen
        ZeRO 3   DeepSpeed's estimate for T, + frozen / N

    with T trained parameters of w bytes on N GPUs. DeepSpeed assumes w = 2 (and keeps a float32 copy of them); for
    w = 4 a weight is 2 bytes larger and a gradient needs no float32 copy. Under ZeRO 3 the largest module stands whole
    on every GPU, with its gradient. Frozen weights have neither gradient nor states; only ZeRO 3 shares them out, or
    moves them to the host.

    Args:
        weights: of the stage.
        level: sharing.
        gpus: N, on nodes of GPUS_PER_NODE.
    """
    if level.zero == 0:
        copies = 4 if gpus == 1 else 5
        return States(copies * weights.trained_bytes + weights.frozen_bytes, 0)
    with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed's log goes is settled by its first import
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    offload, on_host = level.offload != "none", level.offload == "parameters"
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    cluster = {"num_gpus_per_node": math.ceil(gpus / nodes), "num_nodes": nodes, "cpu_offload": offload}
    wider = weights.trained_bytes - 2 * weights.trained
    if level.zero == 3:
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            weights.trained, weights.largest, cpu_offload_params=on_host, zero_init=True, **cluster
        )
        gpu += (0 if on_host else wider // gpus) + 2 * (weights.width - 2) * weights.largest
        frozen = math.ceil(weights.frozen_bytes / gpus)
        if on_host:
            return States(gpu, host + math.ceil((weights.frozen_bytes + wider) / nodes))
        return States(gpu + frozen, host if offload else 0)
    host, gpu = estimate_zero2_model_states_mem_needs(weights.trained, **cluster)
    gpu += wider - (0 if offload else wider // gpus)
    if level.zero == 1:
        gpu += weights.trained_bytes - (0 if offload else weights.trained_bytes // gpus)
    return States(gpu + weights.frozen_bytes, host if offload else 0)


def buffers(weights: Weights, level: Level, bucket: int) -> int:
    """Return DeepSpeed's communication buffers: two buckets of gradients and one of weights; gathered weights.

    Args:
        weights: of the stage.
        level: sharing.
        bucket: elements of a bucket.
    """
    if level.zero == 0 or weights.trained == 0:
        return 0
    buckets = 3 * min(bucket * weights.trained_bytes // weights.trained, weights.trained_bytes)
    return buckets + (min(MAX_LIVE * weights.width, weights.bytes) if level.zero == 3 else 0)


def layer_bytes(shape: Shape, numbers: Numbers) -> int:
    """Return what one layer of a Llama keeps for the backward pass, bytes per position.

    norms       2 D (4 + weight)          input in float32, and normalised, of both norms
    products    m D compute               inputs of the projections; m = 2, or 5 under autocast (a cast for each)
    attention   (2 Q + 2 K) compute       queries, keys, values, output; SDPA keeps no T x T scores
    MLP         4 I compute               gate, up, activation, product
    LoRA        (5 D + Q + I) adapter     where inputs are cast for adapters; with dropout (5 D + Q + I) (adapter + 1)
    """
    d, q, k, i = shape.hidden, shape.query, shape.key, shape.inner
    casts = numbers.compute != numbers.weight
    total = 2 * d * (4 + numbers.weight) + (5 if casts else 2) * d * numbers.compute
    total += (2 * q + 2 * k) * numbers.compute + 4 * i * numbers.compute
    if numbers.adapter:
        inputs = 5 * d + q + i
        cast = numbers.compute if casts else numbers.adapter if numbers.adapter != numbers.weight else 0
        total += inputs * cast + (inputs * (numbers.adapter + 1) if numbers.dropout else 0)
    return total


def activations(shape: Shape, numbers: Numbers, positions: int, *, checkpointing: bool) -> int:
    """Return what the layers of one model keep between forward and backward pass.

        without checkpointing   L positions layer + layer
        with checkpointing      L positions D weight + positions layer

    where `layer` is `layer_bytes`. Under autocast the 16-bit copies of the weights count too: of all layers, or of one.

    Args:
        shape: of the model.
        numbers: bytes per element.
        positions: rows x padded length of a micro-batch.
        checkpointing: whether layers are computed again in the backward pass.
    """
    a_layer = positions * layer_bytes(shape, numbers)
    if numbers.compute != numbers.weight:
        d, q, k, i = shape.hidden, shape.query, shape.key, shape.inner
        a_layer += numbers.compute * (2 * d * q + 2 * d * k + 3 * d * i)
    if checkpointing:
        return shape.layers * positions * shape.hidden * numbers.weight + a_layer
    return shape.layers * a_layer


def logits(shape: Shape, numbers: Numbers, labels: int, *, trained: bool, chunk: int) -> int:
    """Return what the loss needs beside the activations (`method.losses.linear_nll`).

        chunk     min(chunk, 4 V M) of float32 logits, twice where products are in 16 bit
        hidden    4 M D, its gradient
        head      4 V D, its gradient, and 2 V D for the 16-bit product; where it is trained

    Args:
        shape: of the model.
        numbers: bytes per element.
        labels: M labelled positions of a micro-batch.
        trained: whether the head's weight is trained.
        chunk: bytes of a chunk of logits.
    """
    at_once = min(chunk, 4 * shape.vocab * labels) * (1 if numbers.compute == 4 else 2)
    table = shape.vocab * shape.hidden * (4 if numbers.compute == 4 else 6)
    return at_once + 4 * labels * shape.hidden + (table if trained else 0)
