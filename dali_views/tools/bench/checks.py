"""Two checks: whether memory grows, and whether a busy decoder gives the same pixels as a quiet one.

The JPEG hardware of some GPUs was seen to write batches before earlier work on the caller's stream
was done (pytorch/vision, pull request 9606). Here the same files are decoded again and again into memory that
has just been freed, while the stream is busy; every image is compared with a quiet decode.
"""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ...data.index import SampleIndex
from ...graph.decode import decode
from . import loaders
from .contest import Report, Row, Setup

_SAMPLES = 50  # readings of a process's memory, evenly spread
_BUSY = 20  # products of matrices per batch


def memory(setup: Setup, batches: int, batch_sizes: Sequence[int], report: Report) -> list[Row]:
    """Rows of peaks for some batch sizes and half and all threads, then of growth over `batches` batches."""
    runs = {
        f"batch {size}, {count} threads": (replace(setup, batch_size=size, workers=count), 24)
        for size in batch_sizes
        for count in sorted({max(1, setup.workers // 2), setup.workers})
    }
    long = f"{batches} batches of {setup.batch_size}"
    if batches:
        runs[long] = (setup, batches)
    rows = []
    for name, (each, count) in runs.items():
        report(f"memory: {name}")
        imported, peak, host, device = in_new_process(each, count)
        figures: dict[str, tuple[float, list[float]]] = {
            "peak on the host": (peak, []),
            "of it the loader's": (peak - imported, []),
            "peak on the device": (max(device), []),
            "growth on the host": (growth(host), host),
            "growth on the device": (growth(device), device),
        }
        for measure, (value, readings) in figures.items():
            absent = "device" in measure and setup.device == "cpu"
            if not absent and (name == long or "growth" not in measure):
                all_of_them = " ".join(f"{reading:.0f}" for reading in readings)
                row = Row("memory", f"{name}: {measure}", "MiB", round(value, 1), rounds=all_of_them)
                rows.append(replace(row, kind="ours", device=setup.device))
    return rows


def growth(readings: Sequence[float]) -> float:
    """Highest reading of the second half less the highest of the first, after a tenth for warming up."""
    settled = readings[len(readings) // 10 :]
    half = len(settled) // 2
    return max(settled[half:]) - max(settled[:half])


def in_new_process(setup: Setup, batches: int) -> tuple[float, float, list[float], list[float]]:
    """Run a loader in a new process, for a process seldom returns memory. All figures are MiB.

    Returns:
        The resident set before the loader was made, its peak, and at equal distances over the batches the
        resident set and what the GPU has in use above what it had before.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watch, setup, batches).result()


def _watch(setup: Setup, batches: int) -> tuple[float, float, list[float], list[float]]:
    torch.set_num_threads(1)
    before, imported = _device(setup), _host("VmRSS")
    host, device = [], []
    source = loaders.batches(setup, setup.views)
    every = max(1, batches // _SAMPLES)
    for number in range(batches):
        next(source)
        if number % every == every - 1:
            host.append(_host("VmRSS"))
            device.append(_device(setup) - before)
    return imported, _host("VmHWM"), host, device  # getrusage would count the parent of a new process


def _host(field: str) -> float:
    """Memory of this process in MiB, by its name in Linux's status file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{field}:"))


def _device(setup: Setup) -> float:
    free, total = torch.cuda.mem_get_info() if setup.device == "gpu" else (0, 0)
    return (total - free) / 2**20


def decoder(setup: Setup, *, passes: int = 10, report: Report = print) -> list[Row]:
    """Rows that count images whose pixels differ from a quiet decode, by share of the hardware decoder.

    The last row counts images that hardware and software decode to different pixels, which is not an error.
    """
    assert setup.index.paths is not None
    index = setup.index.subset(np.unique(setup.index.paths, axis=0, return_index=True)[1])
    quiet: dict[float, list[int]] = {}
    counts: dict[str, tuple[int, int]] = {}
    for load in (0.0, 1.0) if setup.device == "gpu" else (0.0,):
        report(f"decoding {passes} times with {load:.0%} of JPEGs on the hardware decoder")
        quiet[load] = checksums(setup, index, load)
        busy = [_differ(quiet[load], checksums(setup, index, load, busy=True)) for _ in range(passes)]
        counts[f"hw_decoder_load {load}: differ while busy"] = sum(busy), len(index) * passes
    if len(quiet) == 2:
        counts["hardware and software differ"] = _differ(quiet[0.0], quiet[1.0]), len(index)
    return [
        Row("decoder", name, f"of {images}", differ, kind="limit", device=setup.device)
        for name, (differ, images) in counts.items()
    ]


def _differ(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def checksums(setup: Setup, index: SampleIndex, load: float, busy: bool = False) -> list[int]:
    """CRC-32 of the decoded pixels of every image, in the order of the index."""
    gpu = setup.device == "gpu"
    rows = np.split(np.arange(len(index)), range(setup.batch_size, len(index), setup.batch_size))
    act = partial(decode, device=setup.device, hw_decoder_load=load)
    graph = loaders.short_graph(replace(setup, index=index), iter(rows), act)
    side = 4096 if gpu else 256
    matrix = torch.randn(side, side, device="cuda" if gpu else "cpu")
    sums: list[int] = []
    for _ in rows:
        for _ in range(_BUSY if busy else 0):
            matrix = torch.tanh(matrix @ matrix)
        (images,) = graph.run(*([torch.cuda.current_stream()] if gpu else []))
        on_host = images.as_cpu() if gpu else images
        sums += [zlib.crc32(on_host.at(i).tobytes()) for i in range(len(on_host))]
        del images, on_host  # so that the next batch is written into these buffers
    return sums
