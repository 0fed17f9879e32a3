"""Keys as they were before their rotation (RoPE), for any family: the family's own rotation, turned back.

A rotation by an angle is undone by the same function with the sine negated; dividing by `cos^2 + sin^2` undoes the
factor that some scaled variants put on both. Layers without rotation (SmolLM3 has some) are found by trying.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from latent_sft.errors import ConfigError
from latent_sft.models.backbone import core
from latent_sft.models.thought_attention import ARGUMENT, Result, run

# largest difference of keys that should be equal, as a share of the largest key; a rotation moves them by all of it
ALIKE = {torch.float64: 1e-3, torch.float32: 1e-3}
ALIKE_HALF = 5e-2
PLACES = (0, 1, 5, 11)


def watch_rotation(model: nn.Module) -> None:
    """Let every pass keep the cosines and sines its layers rotate keys by (`Result.turned`)."""

    def keep(module: nn.Module, _: Any, options: dict[str, Any]) -> None:
        given, turned = options.get(ARGUMENT), options.get("position_embeddings")
        if given is not None and not given.over and isinstance(turned, tuple):
            given.turned[module.layer_idx] = turned

    for module in core(model).get_decoder().modules():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(keep, with_kwargs=True)


@torch.no_grad()
def rotated_layers(model: nn.Module) -> tuple[bool, ...]:
    """Return which layers rotate their keys, having checked that `unrotated` undoes it.

    Tried on one input, repeated: whatever a layer does, all its places hold the same state, so that keys before the
    rotation are equal. Calls the model (under ZeRO-3 by every process), without dropout.

    Raises:
        ConfigError: a layer's keys depend on their place in a way that is not undone.
    """
    lm = core(model)
    was_training = lm.training
    lm.eval()
    table = lm.get_input_embeddings().weight
    # made up: a token's embedding may be zero, as that of padding is
    state = torch.linspace(-1, 1, lm.config.get_text_config().hidden_size, device=table.device, dtype=table.dtype)
    position = torch.tensor([PLACES], device=table.device)
    result = run(lm, state.expand(1, len(PLACES), -1), position, torch.ones_like(position, dtype=torch.bool))
    lm.train(was_training)
    found = []
    for layer, key in enumerate(result.piece.keys):
        rotates = layer in result.turned and not _alike(key)
        if rotates and not _alike(_turned_back(lm, key, *result.turned[layer])):
            found.clear()
            break
        # absolute positions (GPT-2) are part of the state, and nothing to undo; a rotation that is not seen is
        if not rotates and not _alike(key) and _has_rope(lm):
            found.clear()
            break
        found.append(rotates)
    if not found:
        raise ConfigError(
            f"kv.keys: the rotation of {type(lm).__name__}'s keys is done in a way this version cannot undo; set "
            "kv.keys=post_rope."
        )
    return tuple(found)


def unrotated(model: nn.Module, result: Result, rotated: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Return the keys `[B, H_kv, S, d]` of every layer of a pass, before their rotation.

    Args:
        model: on which `watch_rotation` was called.
        result: of the pass.
        rotated: of `rotated_layers`.
    """
    return tuple(
        _turned_back(model, key, *result.turned[layer]) if rotates else key
        for layer, (key, rotates) in enumerate(zip(result.piece.keys, rotated, strict=True))
    )


def _turned_back(model: nn.Module, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # the function that the family's own file rotates with, whatever its order of pairs and its share of the head
    family = sys.modules[type(core(model).get_decoder()).__module__]
    rotate = getattr(family, "apply_rotary_pos_emb", None)
    if rotate is None:
        return key
    square = cos.square() + sin.square()
    return rotate(key, key, cos / square, -sin / square)[1]


def _alike(key: Tensor) -> bool:
    allowed = ALIKE.get(key.dtype, ALIKE_HALF)
    return bool((key - key[:, :, :1]).abs().max() <= allowed * key.abs().max())


def _has_rope(lm: nn.Module) -> bool:
    config = lm.config.get_text_config()
    return getattr(config, "rope_parameters", None) is not None or getattr(config, "rope_theta", None) is not None
