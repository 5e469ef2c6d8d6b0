"""One or many processes: start, who am I, and gathers that the loss can differentiate through.

Everything here works without a process group too; then there is one process of rank 0. The gradient of
`gather_with_grad` sums over ranks, so that DDP's mean over ranks is the gradient of the mean loss of the
joined batch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from dali_views.plan import rng

from .meeting import fresh_store
from .watch import Watch

__all__ = [
    "all_equal",
    "all_mean",
    "any_rank",
    "barrier",
    "began",
    "broadcast_buffers",
    "cleanup",
    "gather",
    "gather_rows",
    "gather_with_grad",
    "greatest",
    "init",
    "is_main",
    "launch",
    "local_rank",
    "rank",
    "restartable",
    "spread",
    "together",
    "world",
]

_TIMEOUT = timedelta(minutes=30)  # for a slow or dead peer, after which the run fails
_watch: Watch | None = None


def init(kind: str) -> torch.device:
    """Join the process group that torchrun announced (none: a single process) and return our device.

    From then on the ranks end together, see `Watch`.

    Args:
        kind: "gpu" (NCCL, one GPU per process by LOCAL_RANK) or "cpu" (gloo).

    Raises:
        ValueError: there is no GPU for this process.
        ConnectionError, TimeoutError: some of the other processes have not come.
    """
    global _watch
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
        try:
            store, number, count = next(rendezvous("env://", timeout=_TIMEOUT))
            store = fresh_store(store, number, count, _TIMEOUT)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            told = str(error).partition("\n")[0]
            raise ConnectionError(
                f"process {os.environ['RANK']} met no others at {place} ({told})"
            ) from error
        dist.init_process_group(
            "nccl" if kind == "gpu" else "gloo",
            timeout=_TIMEOUT,
            store=store,
            rank=number,
            world_size=count,
            device_id=device if kind == "gpu" else None,
        )
        _watch = Watch(device) if world() > 1 else None
    return device


def cleanup() -> None:
    """Leave the process group, if there is one."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None
    if _joined():
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Leave the process group at the end of the block; an error in it ends the other ranks, with its message.

    If the error only comes of another rank's end, this process ends here with the reason of that.
    """
    try:
        yield
    except BaseException as error:
        # The others may be in a collective, which leaving would wait for.
        if _watch is not None:
            _watch.fail(error)
        else:
            cleanup()
        raise
    cleanup()


def launch() -> str:
    """What the processes of one torchrun share, be they started again by it; "" without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    # The name of every launch that was given none. But each agent makes a new folder for its workers' errors.
    parents = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return str(parents[2]) if len(parents) > 3 else ""


def began(name: str) -> bool:
    """Whether the processes that noted this `launch` were ours, which torchrun has started again.

    Not by the count of restarts: a launch that was refused is restarted, too.
    """
    return any_rank(name == launch() != "")


def restartable() -> bool:
    """Whether torchrun starts this process again if it ends with another code than 0."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _joined() else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0; chooses the GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def seed_step(seed: int, step: int) -> None:
    """Let dropout and stochastic depth draw by seed, step and rank: alike after a resume, apart on ranks."""
    drawn = int(rng.keys([seed], step, rank())[0] >> np.uint64(1))
    # torch.manual_seed asks for all kinds of devices, which takes longer than some steps' whole bookkeeping.
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call, unused-ignore]
        torch.cuda.manual_seed(drawn)


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


def greatest(*values: float) -> list[float]:
    """Of each value the greatest of all ranks."""
    if world() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    most = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return cast(list[float], most.tolist())


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(greatest(flag)[0])


def all_equal(value: float) -> bool:
    """Whether all ranks have the same value."""
    most, least = greatest(value, -value)
    return most == -least


def spread(network: nn.Module, device: torch.device) -> nn.Module:
    """The network over all processes, which average its gradients. Buffers stay each process's own: they are
    sent when they are about to be used together (`broadcast_buffers`), and not at every step."""
    # Renamed in PyTorch 2.14.
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    settings: dict[str, Any] = {name: False}
    devices = None if device.type == "cpu" else [device]
    return nn.parallel.DistributedDataParallel(network, device_ids=devices, **settings)


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks rank 0's buffers, so that running statistics agree where ranks evaluate together."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
