"""Ranks: which process this is, on which device, and small arrays of all processes.

Everything works without a process group too: then there is one process of rank 0. PyTorch is imported when a
function needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return rank_and_world()[1]


def rank_and_world(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """Rank and world size as given, else those of torch.distributed, else 0 of 1.

    Raises:
        ValueError: only one of them is given, or they contradict each other.
    """
    if (rank is None) != (world is None):
        raise ValueError("Give both rank and world, or neither.")
    if rank is not None and world is not None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside range({world}).")
        return rank, world
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def torch_device(device: str | torch.device) -> torch.device:
    """This process's device of the kind ``"gpu"`` or ``"cpu"``, which may have PyTorch's name.

    Raises:
        ValueError: another word, or a GPU that is not the current one. RuntimeError: there is no GPU.
    """
    import torch

    kind, _, number = str(device).partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind not in ("gpu", "cuda") or not (number or "0").isdecimal():
        raise ValueError(f'device {str(device)!r} is neither "gpu" nor "cpu".')
    if not torch.cuda.is_available():
        raise RuntimeError('No GPU was found (torch.cuda.is_available() is False); use device="cpu".')
    current = torch.cuda.current_device()
    if number and int(number) != current:
        raise ValueError(
            f'device "{kind}:{number}" is not the current GPU, which is {current}; call '
            f'torch.cuda.set_device({number}) first and pass "gpu".'
        )
    return torch.device("cuda", current)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device; the host does not wait for it.

    A copy from pageable memory would wait for all work of the stream.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def all_gather(array: NDArray[Any]) -> list[NDArray[Any]]:
    """The arrays of all ranks, in rank order; shapes and types must agree. A collective call."""
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
    """The bytes of all ranks, in rank order, of any length. A collective call."""
    lengths = np.concatenate(all_gather(np.array([len(content)], np.int64)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    everyone = zip(all_gather(padded), lengths.tolist(), strict=True)
    return [array[:length].tobytes() for array, length in everyone]
