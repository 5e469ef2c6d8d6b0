"""A GPU that computes nothing: fake CUDA tensors, and a watch for what makes the host wait for the device.

A fake tensor (PyTorch's `FakeTensorMode`) has a shape, a type, strides and a device, but no values. So
operators run without a GPU, and whatever needs a value on the host is an error.

Not seen: backward passes, whose engine needs a driver (`Watch` also works on the CPU); kernels, streams and
what C++ does inside an operator; values, so no overflow either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = (torch.float16, torch.bfloat16)

# The size of the result, or what the host does next, depends on values. PyTorch tags most of these operators.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_UNTAGGED = {"equal", "allclose", "is_nonzero", "_linalg_check_errors"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # by rows or a mask
_COPIES = {"_to_copy", "copy_"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "linear"}
_SOFTMAX = {"_softmax", "_log_softmax", "logsumexp"}


class Watch(TorchDispatchMode):
    """An AssertionError at the first operator that makes the host wait for the device or is wrong there.

    A copy between devices does not wait if it is `non_blocking` and, to a GPU, starts in pinned memory. Other
    errors are tensors of two devices in one operator, CPU tensors in a collective (NCCL takes none), and a
    softmax of a product that was rounded to half precision. (An encoder whose attention is not one operator
    would fail here, although its softmax may be in half precision.)

    Args:
        device: whose operators are watched. Real tensors on the CPU can play those of a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.halves: list[str] = []
        """Operators with a result in half precision, in their order."""
        self.copies = 0
        """Copies between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = _tensors(args, kwargs)
        self._check(func, name, args, given)
        if self.device == CUDA and name in _STANDINS:
            result = _STANDINS[name](*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if self.device == CUDA and name == "convolution":
            result = _as_cudnn(result, *args[:2])
        made = _tensors(result)
        self._check_devices(name, args, kwargs, given, made)
        self._follow_rounding(name, given, made)
        self.halves += [name for one in made if one.dtype in HALF]
        return result

    def _check(self, func: Any, name: str, args: Any, given: list[Tensor]) -> None:
        here = any(one.device == self.device for one in given)
        dependent = name in _UNTAGGED or (_TAGS & set(func.tags) and name not in _INDEXED)
        if here and (dependent or (name in _INDEXED and _masked(name, args))):
            raise AssertionError(f"{name} waits for the device")
        if func.namespace == "c10d" and any(one.device != self.device for one in given):
            raise AssertionError(f"{name} has a tensor that is not on the device")

    def _check_devices(
        self, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        copies = name in _COPIES
        # A number of the host, such as Python's, is an argument of a kernel, but it may be copied as well.
        devices = {one.device for one in given if one.ndim or copies} | {one.device for one in made}
        if len(devices) < 2 or name in _STANDINS:
            return
        source, blocking = args[0], not kwargs.get("non_blocking")
        if name == "copy_":
            source, blocking = args[1], not any(args[2:])
        pageable = source.device != self.device and not hasattr(source, "pinned")
        if not copies or blocking or pageable:
            places = " and ".join(sorted(map(str, devices)))
            raise AssertionError(f"{name} waits for the device: it has tensors on {places}")
        self.copies += 1

    def _follow_rounding(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        """Note what stems from a product in half precision; vectors that are normalised begin anew."""
        if name in _SOFTMAX and getattr(given[0], "rounded", False):
            raise AssertionError(f"{name} of a product in half precision")
        length = name == "linalg_vector_norm" or (
            name in ("clamp_min", "clamp", "expand") and getattr(given[0], "length", False)
        )
        unit = name == "div" and len(given) == 2 and getattr(given[1], "length", False)
        rounded = not unit and any(getattr(one, "rounded", False) for one in given)
        for one in made:
            one.length = length  # type: ignore[attr-defined]
            one.rounded = one.dtype in HALF if name in _PRODUCTS else rounded  # type: ignore[attr-defined]


def _tensors(*trees: Any) -> list[Tensor]:
    return [one for one in tree_leaves(trees) if isinstance(one, Tensor)]


def _masked(name: str, args: Any) -> bool:
    """Whether a mask chooses the places of an `_INDEXED` operator; one value fills them without a wait."""
    masked = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return masked and (name in ("index", "_unsafe_index") or args[2].numel() > 1)


def _as_cudnn(result: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """The result of a convolution in cuDNN's format; without a GPU, PyTorch chooses another library."""
    last = torch.channels_last in map(suggest_memory_format, (source, weight))
    return torch.empty_like(result, memory_format=torch.channels_last if last else torch.contiguous_format)


def _pinned(source: Tensor, *_: Any) -> Tensor:
    copy = source.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def _statistics(source: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(source.shape[1], device=source.device) for _ in range(2))


# What fake tensors do not know: the kernels of synchronised batch norm and of fused SGD, pinned memory.
_STANDINS = {
    "batch_norm_stats": _statistics,
    "batch_norm_gather_stats_with_counts": _statistics,
    "batch_norm_elemt": lambda source, *_: torch.empty_like(source),
    "_fused_sgd_": lambda *_, **__: None,
    "is_pinned": lambda source, *_: hasattr(source, "pinned"),
    "_pin_memory": _pinned,
}


class _Stream:
    """A stream in which nothing ever comes to its end."""

    def record_event(self) -> _Stream:
        return self

    def query(self) -> bool:
        return False


@contextmanager
def fake_gpu() -> Iterator[None]:
    """A GPU that computes in bf16 seems to be there; tensors made inside are fake, also on the CPU."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
        patch.setattr(torch.backends.cudnn, "benchmark", False)  # which is undone in any case
        yield


def move(module: nn.Module) -> None:
    """Give a module on the CPU fake parameters and buffers on the GPU instead, in their memory format."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, old in kept.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=CUDA)
                    learns = isinstance(old, nn.Parameter)
                    kept[name] = nn.Parameter(new, old.requires_grad) if learns else new


@contextmanager
def one_of(world: int) -> Iterator[None]:
    """This process is one of `world` ranks; collectives return at once, with any values."""
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=world // 2, world_size=world)
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()
