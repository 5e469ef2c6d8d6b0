"""Where a loader runs: which process it is of how many, and on which device."""

from __future__ import annotations

import torch


def rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and world size as given, else from torch.distributed, else 0 of 1.

    Raises:
        ValueError: if only one is given, or they contradict each other.
    """
    if (rank is None) != (world is None):
        raise ValueError("Give both rank and world, or neither.")
    if rank is None or world is None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside range({world}).")
    return rank, world


def torch_device(device: str) -> torch.device:
    """This process's device of the kind ``"gpu"`` or ``"cpu"``.

    Raises:
        ValueError: for any other word; RuntimeError: if there is no GPU.
    """
    if device == "cpu":
        return torch.device("cpu")
    if device != "gpu":
        raise ValueError(f'device {device!r} is neither "gpu" nor "cpu".')
    if not torch.cuda.is_available():
        raise RuntimeError('No GPU was found (torch.cuda.is_available() is False); use device="cpu".')
    return torch.device("cuda", torch.cuda.current_device())
