"""What parts share: losses with gradients and how far two of them are apart, medians of times, peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import benchmark

GIB = 2**30
Gradients = dict[str, Tensor]


def gradients(module: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Gradients]:
    """Return a loss and every gradient, under autocast to `dtype` where that is given."""
    module.zero_grad(set_to_none=True)
    device = next(module.parameters()).device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        value = loss()
    value.backward()
    return value.detach().float(), {
        n: p.grad.float().clone() for n, p in module.named_parameters() if p.grad is not None
    }


def distance(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> dict[str, float]:
    """Return relative differences: `loss`, and `gradient`, the norm of all differences over that of all gradients."""
    assert found[1].keys() == expected[1].keys(), found[1].keys() ^ expected[1].keys()
    apart = _norm([found[1][name] - gradient for name, gradient in expected[1].items()])
    loss = ((found[0] - expected[0]).abs() / expected[0].abs().clamp(min=1e-12)).item()
    return {"loss": loss, "gradient": (apart / _norm(list(expected[1].values())).clamp(min=1e-12)).item()}


def _norm(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values]).norm()


def seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median time of a call, after one that warms up."""
    call()
    found = []
    for _ in range(repeats):
        start = benchmark.timer()  # waits for the accelerator
        call()
        found.append(benchmark.timer() - start)
    return statistics.median(found)


def peak_gib(call: Callable[[], Any], device: str) -> float | None:
    """Return the most GiB allocated during a call, weights counted; None on a CPU, which does not count them."""
    if device != "cuda":
        call()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB
