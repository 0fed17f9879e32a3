"""Parameters that DeepSpeed ZeRO-3 has shared out among the processes: reading them, and calling their modules.

A partitioned parameter is empty except while its module is called (DeepSpeed fills it by hooks around the call) or
inside `gathered_parameters` or `held_parameters`. These are collectives: every process must come by, in the same
order. Without ZeRO-3 all of this does nothing, and DeepSpeed is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_HOLDER = -1  # stands for a module in DeepSpeed's account of those that use a parameter


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether ZeRO-3 has taken over any of these parameters."""
    return any(hasattr(p, "ds_id") for p in parameters)


@contextmanager
def gathered_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Fill partitioned parameters on every process while the context lasts, for reading."""
    partitioned = [p for p in parameters if _HOLDER not in getattr(p, "ds_active_sub_modules", (_HOLDER,))]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


@contextmanager
def held_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Fill partitioned parameters as above and let calls of their modules leave them so.

    Such calls are no collectives: every process may make as many as it likes.
    """
    partitioned: list[Any] = [p for p in parameters if hasattr(p, "ds_id")]
    with gathered_parameters(partitioned):
        for parameter in partitioned:
            parameter.ds_active_sub_modules.add(_HOLDER)  # DeepSpeed empties none that a module is using
        try:
            yield
        finally:
            for parameter in partitioned:
                parameter.ds_active_sub_modules.discard(_HOLDER)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another `forward` while the context lasts; its hooks stay."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def call_with(module: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """Call a module, hooks included, with another `forward`: the way to use its weight in a formula of ours."""
    with replaced_forward(module, forward):
        return module(*args)
