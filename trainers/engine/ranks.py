"""One process or many: start, collectives, and gathers that the loss can differentiate through.

All work without a process group too: then there is one process of rank 0. The gradient of `gather_with_grad`
sums over ranks, so that DDP's mean over ranks is the gradient of the mean loss of the joined batch.
"""

from __future__ import annotations

import inspect
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.nn.functional import all_gather
from torch.distributed.rendezvous import rendezvous

from dali_views.plan import rng
from dali_views.system.ranks import rank_and_world
from dali_views.system.ranks import world as world

_TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may take minutes to list images


def init(kind: str) -> torch.device:
    """Join the process group that torchrun announced (none: a single process) and return our device.

    `kind` is "gpu" (NCCL; LOCAL_RANK chooses the GPU) or "cpu" (gloo).

    Raises:
        ValueError: there is no GPU for this process.
        ConnectionError: some of the other processes have not come.
    """
    device = torch.device("cpu")
    if kind == "gpu":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if not count:
            raise ValueError("there is no GPU (torch.cuda.is_available() is False); set run.device=cpu")
        if local >= count:
            raise ValueError(
                f"process {local} finds {count} GPUs; start fewer processes or set run.device=cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # views have few shapes
    elif kind != "cpu":
        raise ValueError(f"device kind should be gpu or cpu, not {kind!r}")
    if os.environ.keys() >= {"WORLD_SIZE", "RANK"} and not dist.is_initialized():
        try:
            store, number, count = next(rendezvous("env://", timeout=_TIMEOUT))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            told = str(error).partition("\n")[0]
            raise ConnectionError(f"process {os.environ['RANK']} met no others ({told})") from error
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The agent's store outlives an attempt, and holds the addresses of processes that have ended.
            store = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend, bound = ("nccl", device) if kind == "gpu" else ("gloo", None)
        dist.init_process_group(
            backend, timeout=_TIMEOUT, store=store, rank=number, world_size=count, device_id=bound
        )
        dist.barrier()  # a rank that ended before all are connected would leave the others waiting
    return device


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Leave the process group at the end of the block; an error in it also goes into torchrun's report.

    Other ranks end with a ConnectionError: a collective with a process that has ended fails at once (gloo)
    or is aborted (NCCL), and torchrun ends what is left.
    """
    try:
        yield
    except BaseException as error:
        if world() == 1:
            cleanup()  # with others it would wait for those that are in a collective
        elif isinstance(error, RuntimeError) and re.search("[Cc]onnection|remote process", str(error)):
            time.sleep(2)  # launchers report the process that ends first, which should be the one at fault
            told = f"rank {rank()} lost another rank, which has failed or was killed; see its log"
            raise ConnectionError(told) from error
        if isinstance(error, Exception):
            get_error_handler().record_exception(error)
        raise
    cleanup()


def rank() -> int:
    """Number of this process among all, from 0."""
    return rank_and_world()[0]


def is_main() -> bool:
    """Whether this process writes files and the log."""
    return rank() == 0


def seed_step(seed: int, step: int) -> None:
    """Let dropout and stochastic depth draw by seed, step and rank: alike after a resume, apart on ranks."""
    drawn = int(rng.keys([seed], step, rank())[0] >> np.uint64(1))
    # torch.manual_seed seeds all kinds of devices, which takes longer than some steps' whole bookkeeping.
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call, unused-ignore]
        torch.cuda.manual_seed(drawn)


def barrier() -> None:
    """Wait for all processes."""
    any_rank(False)


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (B, ...) -> (world * B, ...), with gradient; B equal on all ranks."""
    return torch.cat(all_gather(x.contiguous())) if world() > 1 else x  # type: ignore[no-untyped-call]


def gather(x: Tensor) -> Tensor:
    """As `gather_with_grad`, but without gradient."""
    return gather_with_grad(x.detach())


def gather_rows(x: Tensor) -> Tensor:
    """As `gather`, but the number of rows may differ between ranks."""
    if world() == 1:
        return x.detach()
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    parts = gather(padded[None]) if max(counts) else padded[None]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=False)])


def all_mean(x: Tensor) -> Tensor:
    """Mean of a tensor over ranks, element by element, without gradient."""
    return gather(x.detach()[None]).mean(0) if world() > 1 else x.detach()


def greatest(*values: float) -> list[float]:
    """The greatest of all ranks, of each value."""
    device = "cuda" if world() > 1 and dist.get_backend() == "nccl" else "cpu"
    most = gather(torch.tensor([values], dtype=torch.float64, device=device)).amax(0)
    return cast(list[float], most.tolist())


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(greatest(flag)[0])


def all_equal(value: float) -> bool:
    """Whether all ranks have the same value."""
    most, least = greatest(value, -value)
    return most == -least


def spread(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients averaged over ranks; buffers stay apart until `broadcast_buffers`."""
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"  # before 2.14
    settings: dict[str, Any] = {name: False, "device_ids": None if device.type == "cpu" else [device]}
    return nn.parallel.DistributedDataParallel(network, **settings)


def averaged(network: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Around forward and backward passes of a spread network: whether this backward pass averages gradients.

    If not, they add up on each rank, and the next pass that averages takes all of them together.
    """
    if now or not isinstance(network, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[None], network.no_sync())


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks rank 0's buffers, so that running statistics agree where ranks evaluate together."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
