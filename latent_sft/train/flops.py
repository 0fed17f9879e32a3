"""Floating-point operations a training step has to do, and what the device could do in that time: the MFU.

Counted is what the method needs, not what is computed: real tokens, the head at labelled positions, causal pairs.
Recomputed activations (gradient checkpointing) and padding lower the MFU, as they should.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from latent_sft.method.layout import Kind
from latent_sft.models.backbone import head_table, unwrap_peft

# dense bf16 tensor-core peak of one device, FLOP/s, from the makers' data sheets; part of the device's name -> peak
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def device_peak() -> float | None:
    """Return the peak of this process's CUDA device, or None where there is none or it is not in the table."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def peak_of(device_name: str) -> float | None:
    """Return FLOP/s of a device by its name.

    >>> peak_of("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    """
    return next((peak for name, peak in PEAK.items() if name in device_name), None)


def step_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the operations of one forward and backward pass, a float64 scalar on the batch's device.

    A weight costs a multiplication and an addition a token forward, the same again for the gradient of its input
    and, where it is trained, for its own: 6 N tokens for a model that is trained as a whole. Attention costs
    4 x heads x head size a layer for every pair of a query and a key, and twice that backward. The few keys of a chunk
    are left out, as are embeddings, norms and activation functions.

    Args:
        model: `ExplicitModel`, `Stage1Model` or `Stage2Model`, not wrapped.
        batch: what its forward takes.

    Returns:
        None for a model that thinks in hidden states: what its passes have to do is not counted.
    """
    if hasattr(model, "thoughts"):
        return None
    if not hasattr(model, "encoder"):
        labels = len(batch["target_index"]) + len(batch.get("kl_index", ()))
        return _body(model.lm, batch["kind"], back=True) + _head(model.lm, labels)
    learns = model.marker.requires_grad
    # a frozen decoder passes gradients on to the encoder; a frozen encoder has none to pass
    total = _body(model.decoder, batch["kind"], back=True) + _head(model.decoder, len(batch["target_index"]))
    if "encoder_kind" in batch:
        markers = (batch["encoder_kind"] == Kind.MARKER).sum()
        projection = (4 if learns else 2) * _size([head_table(model.decoder)]) * markers
        total = total + _body(model.encoder, batch["encoder_kind"], back=learns) + projection
    return total


def _body(lm: nn.Module, kind: Tensor, *, back: bool) -> Tensor:
    table = head_table(lm)
    weights = [
        p
        for module in lm.modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
        if p is not table
    ]
    trained = [p for p in weights if p.requires_grad]
    config = unwrap_peft(lm).config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * head_size * (3 if back else 1)
    a_token = (4 if back else 2) * _size(weights) + (2 * _size(trained) if back else 0)
    markers = (kind == Kind.MARKER).sum(1).double()
    main = ((kind != Kind.PAD) & (kind != Kind.CHUNK)).sum(1).double() - markers
    # a marker sees, on average, half of the text
    pairs = (main * (main + 1) / 2 + markers * main / 2).sum()
    return a_token * (kind != Kind.PAD).sum().double() + a_pair * pairs


def _head(lm: nn.Module, labels: int) -> int:
    table = head_table(lm)
    return (6 if table.requires_grad else 4) * _size([table]) * labels


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # ZeRO-3 leaves a shard of each
