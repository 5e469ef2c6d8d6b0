"""One or many processes: start, who am I, and gathers that the loss can differentiate through.

Everything here works without a process group too; then there is one process of rank 0. The gradient of
`gather_with_grad` sums over ranks, so that DDP's mean over ranks is the gradient of the mean loss of the
joined batch.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "all_mean",
    "any_rank",
    "barrier",
    "broadcast_buffers",
    "cleanup",
    "gather",
    "gather_rows",
    "gather_with_grad",
    "init",
    "is_main",
    "local_rank",
    "rank",
    "world",
]


def init(kind: str, timeout_minutes: float = 30) -> torch.device:
    """Join the process group that torchrun announced (none: a single process) and return our device.

    Args:
        kind: "gpu" (NCCL, one GPU per process by LOCAL_RANK) or "cpu" (gloo).
        timeout_minutes: how long to wait for a slow or dead peer before the run fails.

    Raises:
        ValueError: there is no GPU for this process.
    """
    device = torch.device("cpu")
    if kind == "gpu":
        if local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank()} of this machine finds {torch.cuda.device_count()} GPUs; "
                "start fewer processes or set device to cpu"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    elif kind != "cpu":
        raise ValueError(f"device kind should be gpu or cpu, not {kind!r}")
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if kind == "gpu" else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if kind == "gpu" else None,
        )
    return device


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if _joined():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _joined() else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0; chooses the GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process writes files and the log."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (B, ...) -> (world * B, ...), with gradient; B equal on all ranks."""
    return cast(Tensor, _Gather.apply(x)) if world() > 1 else x


def gather(x: Tensor) -> Tensor:
    """As `gather_with_grad`, but without gradient."""
    x = x.detach()
    if world() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def gather_rows(x: Tensor) -> Tensor:
    """As `gather`, but the number of rows may differ between ranks."""
    if world() == 1:
        return x.detach()
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    parts = gather(padded).reshape(world(), *padded.shape) if max(counts) else [padded] * world()
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def all_mean(x: Tensor) -> Tensor:
    """Mean of a tensor over ranks, element by element, without gradient."""
    if world() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if world() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return bool(count.item())


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks rank 0's buffers, so that running statistics agree where ranks evaluate together."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
