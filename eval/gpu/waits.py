"""Where the host waits for the device, found without one.

On a GPU `torch.cuda.set_sync_debug_mode("error")` raises. Elsewhere `NoWaits` looks at every operation and raises for
those that would wait on a GPU: values read by the host, shapes that depend on values, copies between devices. Real
tensors on a CPU go through forward and backward pass, but reading one by `tolist` is no operation there, and
everything is on one device. Tensors that only pretend to be on a GPU (`on_fake_gpu`) show both, in forward passes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# with an index: without one, torch asks which device is current
FAKE_GPU = torch.device("cuda:0")
CUDA, META = 1, 14  # of c10::DeviceType
# values that the host reads, and results whose shape depends on values
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_, aten.copy}


class HostWait(RuntimeError):
    """The host would wait for the device here."""


class NoWaits(TorchDispatchMode):
    """Raises a HostWait for every operation that would make the host wait, and for tensors of two devices in one.

    Attributes:
        paused: set where waiting is allowed.
    """

    paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operation and run it."""
        kwargs = kwargs or {}
        reason = None if self.paused else why_it_waits(func, args, kwargs)
        if reason:
            raise HostWait(f"{func}: {reason}")
        return func(*args, **kwargs)


def why_it_waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why an operation would make the host wait on a GPU (or fail there), or None."""
    packet = getattr(func, "overloadpacket", None)
    if packet in READS:
        return "the host reads values, or the shape of the result depends on them"
    if packet is aten.repeat_interleave and isinstance(args[0], Tensor) and func is aten.repeat_interleave.Tensor:
        return None if kwargs.get("output_size") is not None else "the shape of the result depends on values"
    if packet in INDEXING and any(i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None):
        return "indexing by a boolean mask: the shape depends on values"
    if packet in COPIES:
        from_device = args[1].device if packet is not aten._to_copy else args[0].device
        to_device = args[0].device if packet is not aten._to_copy else kwargs.get("device") or from_device
        waits = torch.device(to_device).type != from_device.type and not _asynchronous(packet, args, kwargs)
        return f"a copy from {from_device} to {to_device} that is not non_blocking" if waits else None
    # a scalar on the CPU is handed over by value
    devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}
    return f"tensors of two devices, {' and '.join(sorted(devices))}" if len(devices) > 1 else None


def _asynchronous(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or (packet is not aten._to_copy and len(args) > 2 and args[2]))


class Watch:
    """Regions in which the host must not wait for the device, on a GPU or, by a NoWaits, elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda, self.mode = device == "cuda", NoWaits()
        self.entered = 0

    @contextmanager
    def region(self) -> Iterator[None]:
        """Raise where the host waits inside."""
        self.entered += 1
        if not self.cuda:
            with self.mode:
                yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Allow it inside, within a region."""
        before = torch.cuda.get_sync_debug_mode() if self.cuda else self.mode.paused
        self._set(0 if self.cuda else True)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, value: Any) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode(value)
        else:
            self.mode.paused = value

    def inside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a region."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.region():
                return call(*args, **kwargs)

        return watched

    def outside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with waiting allowed."""

        def allowed(*args: Any, **kwargs: Any) -> Any:
            with self.pause():
                return call(*args, **kwargs)

        return allowed


@contextmanager
def on_fake_gpu(*modules: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let modules pretend to be on a GPU, with all that is made inside; yield what moves a tensor there.

    Nothing is computed: tensors have a shape, a type and a device. There is no backward pass, for which autograd asks
    the driver. The modules are of no use afterwards.
    """
    # a tensor of one number keeps its value, and what is made of it would be computed for real
    valued = patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)
    with _guarded(), valued, FakeTensorMode(allow_non_fake_inputs=True):
        moved: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:  # tied weights stay tied
                there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=FAKE_GPU)
                is_parameter = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(there, requires_grad=tensor.requires_grad) if is_parameter else there
            return moved[id(tensor)]

        for module in {m for whole in modules for m in whole.modules()}:
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    held[name] = None if tensor is None else fake(tensor)
        yield fake


@contextmanager
def _guarded() -> Iterator[None]:
    """Give CUDA the device guard of meta tensors, which does nothing, where torch was built without one.

    Indexing and autograd ask for a guard even where nothing is computed; there is no other way to say that none is
    needed.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    own = guards[CUDA]
    guards[CUDA] = own or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = own
