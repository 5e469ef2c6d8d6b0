"""Whether a decoder gives the same pixels whatever else happens: other work on the stream, buffers reused.

Batched calls of the JPEG hardware of some GPUs were seen to write before earlier work on the caller's stream
was done (pytorch/vision, pull request 9606). Here the same files are decoded again and again into memory that
has just been given back, while the stream is kept busy, and every image is compared with a quiet decode.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from ...data.index import SampleIndex
from ...graph.build import PREFETCH, Images
from ...graph.decode import decode, read
from .contender import Setup
from .results import Row


def check(setup: Setup, *, passes: int = 10, told: Callable[[str], None] = print) -> list[Row]:
    """Rows that count images whose pixels were not those of a quiet decode, by share of the hardware.

    The last row counts images that hardware and software decode to different pixels, which is no fault.
    """
    assert setup.index.paths is not None
    index = setup.index.subset(np.unique(setup.index.paths, axis=0, return_index=True)[1])
    quiet: dict[float, list[int]] = {}
    rows = []
    for load in (0.0, 1.0) if setup.device == "gpu" else (0.0,):
        told(f"decoding {passes} times with {load:.0%} of JPEGs on the hardware decoder")
        quiet[load] = checksums(setup, index, load)
        different = [
            sum(a != b for a, b in zip(quiet[load], checksums(setup, index, load, busy=True), strict=True))
            for _ in range(passes)
        ]
        rows.append(
            _row(setup, f"hw_decoder_load {load}: differ while busy", sum(different), len(index) * passes)
        )
    if len(quiet) == 2:
        differ = sum(a != b for a, b in zip(quiet[0.0], quiet[1.0], strict=True))
        rows.append(_row(setup, "hardware and software differ", differ, len(index)))
    return rows


def checksums(setup: Setup, index: SampleIndex, load: float, busy: bool = False) -> list[int]:
    """CRC-32 of the decoded pixels of every image."""
    order = iter(range(0, len(index), setup.batch_size))

    def source() -> Images:
        start = next(order)  # its StopIteration ends the graph's epoch
        return index.inputs(np.arange(start, min(start + setup.batch_size, len(index))))

    gpu = setup.device == "gpu"
    graph = Pipeline(
        batch_size=setup.batch_size,
        num_threads=setup.workers,
        device_id=0 if gpu else None,
        prefetch_queue_depth=PREFETCH,
        seed=0,
    )
    with graph:
        images = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1)
        graph.set_outputs(decode(read(images, index.form), setup.device, load))
    graph.build()
    work = _Work(gpu) if busy else None
    sums: list[int] = []
    while True:
        if work is not None:
            work.start()
        try:
            (images,) = graph.run(*([torch.cuda.current_stream()] if gpu else []))
        except StopIteration:
            return sums
        on_host = images.as_cpu() if gpu else images
        sums += [zlib.crc32(on_host.at(i).tobytes()) for i in range(len(on_host))]
        del images, on_host  # the next batch finds these buffers free


class _Work:
    """Something that keeps the current stream (or the cores) busy for a while."""

    def __init__(self, gpu: bool) -> None:
        device, side = ("cuda", 4096) if gpu else ("cpu", 256)
        self._matrix = torch.randn(side, side, device=device)

    def start(self) -> None:
        for _ in range(20):
            self._matrix = torch.tanh(self._matrix @ self._matrix)


def _row(setup: Setup, name: str, value: int, of: int) -> Row:
    return Row("decoder", name, f"of {of}", value, kind="limit", device=setup.device)
