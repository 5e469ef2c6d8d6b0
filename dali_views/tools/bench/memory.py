"""How much memory a loader takes, by batch size and threads, and whether it grows over many batches.

Every setting runs in a process of its own, for memory that a process once had is seldom given back.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch

from .contender import Setup
from .results import Row

_SAMPLES = 50  # readings of a process's memory, evenly spread


@dataclass(frozen=True)
class Reading:
    """Memory of one process, in MiB."""

    peak_host: float
    """Largest resident set, before which stands what Python, torch and DALI take when imported."""
    imported: float
    """Resident set before the loader was made."""
    peak_device: float
    """Largest use of the whole GPU above what was in use before; 0 on the CPU."""
    host: list[float]
    """Resident set at equal distances over the batches."""
    device: list[float]


def measure(
    setup: Setup,
    *,
    batches: int,
    batch_sizes: Sequence[int] = (),
    threads: Sequence[int] = (),
    told: Callable[[str], None] = print,
) -> list[Row]:
    """Rows of peaks for every batch size and number of threads, then of the growth over `batches` batches.

    Args:
        batches: how long the loader of `setup` itself runs; growth compares the second half's highest
            reading with the first half's.
        batch_sizes, threads: the settings whose peaks are taken, over a few batches each.
    """
    rows = []
    for batch_size in batch_sizes:
        for count in threads:
            told(f"memory at batch {batch_size}, {count} threads")
            reading = apart(replace(setup, batch_size=batch_size, workers=count), 24)
            name = f"batch {batch_size}, {count} threads"
            rows += _rows(setup.device, name, reading)
    if batches:
        told(f"memory over {batches} batches of {setup.batch_size}")
        reading = apart(setup, batches)
        name = f"{batches} batches of {setup.batch_size}"
        rows += _rows(setup.device, name, reading)
        rows.append(_row(setup.device, f"{name}: growth on the host", growth(reading.host), reading.host))
        if setup.device == "gpu":
            grown = growth(reading.device)
            rows.append(_row(setup.device, f"{name}: growth on the device", grown, reading.device))
    return rows


def growth(readings: Sequence[float]) -> float:
    """Highest reading of the second half over the highest of the first, after a tenth for warming up."""
    settled = readings[len(readings) // 10 :]
    half = len(settled) // 2
    return max(settled[half:]) - max(settled[:half])


def apart(setup: Setup, batches: int) -> Reading:
    """Run a loader for some batches in a new process and watch its memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_watch, setup, batches).result()


def _watch(setup: Setup, batches: int) -> Reading:
    from . import ours

    gpu = setup.device == "gpu"
    torch.set_num_threads(1)
    before = _device() if gpu else 0.0
    imported = _resident()
    host, device = [], []
    source = ours.batches(setup, setup.views)
    every = max(1, batches // _SAMPLES)
    for number in range(batches):
        next(source)
        if number % every == every - 1:
            host.append(_resident())
            device.append(_device() - before if gpu else 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Reading(peak, imported, max(device), host, device)


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _device() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def _rows(device: str, name: str, reading: Reading) -> list[Row]:
    above = reading.peak_host - reading.imported
    rows = [_row(device, f"{name}: peak on the host", reading.peak_host, []),
            _row(device, f"{name}: of it the loader's", above, [])]  # fmt: skip
    if device == "gpu":
        rows.append(_row(device, f"{name}: peak on the device", reading.peak_device, []))
    return rows


def _row(device: str, name: str, value: float, readings: Sequence[float]) -> Row:
    return Row(
        part="memory",
        name=name,
        measure="MiB",
        value=round(value, 1),
        rounds=" ".join(f"{reading:.0f}" for reading in readings),
        kind="ours",
        device=device,
    )
