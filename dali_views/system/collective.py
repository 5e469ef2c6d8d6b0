"""Arrays and bytes of all ranks, whatever the backend of the default process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray


def world() -> int:
    """How many ranks there are; 1 without torch.distributed."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather(array: NDArray[Any]) -> list[NDArray[Any]]:
    """The array of every rank, in rank order; shapes must agree."""
    import torch
    import torch.distributed as dist

    # A mixed "cpu:gloo,cuda:nccl" group takes CPU tensors; NCCL alone does not.
    backend = str(dist.get_backend())
    device = f"cuda:{torch.cuda.current_device()}" if "nccl" in backend and "gloo" not in backend else "cpu"
    mine = torch.from_numpy(array).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [tensor.cpu().numpy() for tensor in everyone]


def all_gather_bytes(content: bytes) -> list[bytes]:
    """The bytes of every rank, in rank order, of any length."""
    lengths = np.concatenate(all_gather(np.array([len(content)], np.int64)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    everyone = zip(all_gather(padded), lengths.tolist(), strict=True)
    return [array[:length].tobytes() for array, length in everyone]


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if there is an error on any, so that none is left waiting; a collective call.

    Raises:
        Exception: `error`, if there is one.
        RuntimeError: another rank has one; its message is told.
    """
    told = all_gather_bytes(b"" if error is None else f"{type(error).__name__}: {error}".encode())
    if error is not None:
        raise error
    for rank, message in enumerate(told):
        if message:
            raise RuntimeError(f"Rank {rank} failed: {message.decode()}")


@contextmanager
def failing_together() -> Iterator[None]:
    """A block whose error is raised on every rank, see `raise_together`; its end is a collective call."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error)
