"""Starts ranks without a launcher: nothing ends the others if one fails."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# Imported by the process that is forked for each rank; see conftest.
IMPORTED = ["trainers.cli", "timm", "torch.utils.tensorboard"]


def start(
    world: int, logs: Path, work: Callable[..., int], arguments: Callable[[int], Sequence[object]]
) -> list[BaseProcess]:
    """Processes that call `work(*arguments(rank))`, exit with its result and write to logs/RANK.log."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    logs.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(world):
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank}
        place = {**meeting, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        settings = (place if world > 1 else {}, logs / f"{rank}.log", work, arguments(rank))
        processes.append(CONTEXT.Process(target=_rank, args=settings, daemon=True))
        processes[-1].start()
    return processes


def _rank(place: dict[str, object], log: Path, work: Callable[..., int], arguments: Sequence[object]) -> None:
    import torch

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in place.items()}
    sys.exit(work(*arguments))


def finish(processes: Sequence[BaseProcess], seconds: float = 60) -> list[int | None]:
    """Exit codes after all have ended; None for a rank that has not ended `seconds` after the one before."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
