"""Whether pixels depend on the batch that an image comes in or on other work, by decoder."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types

from ...data.index import SampleIndex
from ...graph.build import PREFETCH
from ...graph.decode import decode
from .contest import Report, Row, Setup
from .loaders import loader_of, short_graph

_LOADS = (0.0, 0.65, 1.0)
_SIZES = (5, 8)  # batch sizes beside the one that is measured
_BUSY = 8  # resizes and blurs of a batch
_MOST, _BATCHES = 500, 16  # images that are compared, or batches, if these hold fewer


def pixels(setup: Setup, report: Report = print) -> list[Row]:
    """Rows that count images whose pixels differ from those in batches of 5, and from those without hardware.

    DALI gives a fixed share of each batch to the hardware decoder, whose pixels differ from those of the CUDA
    decoder (DALI, pull requests 2232 and 4272). So the place in the batch may decide what decodes an image.
    """
    index = distinct(setup)
    sizes = list(dict.fromkeys([*_SIZES, min(setup.batch_size, len(index))]))
    rows, by_cuda = [], None
    for load in _LOADS if setup.device == "gpu" else (0.0,):
        report(f"pixels in batches of {', '.join(map(str, sizes))} with hw_decoder_load {load}")
        setups = [replace(setup, batch_size=size, hw_decoder_load=load) for size in sizes]
        decoded = np.array([checksums(each, index, load) for each in setups])
        views = np.array([_of_views(each, index) for each in setups])
        for what, sums in (("decoded images", decoded), ("views", views)):
            name = f"hw_decoder_load {load}: {what} that depend on the batch size"
            rows.append(_row(setup, name, (sums != sums[0]).any(0)))
        if by_cuda is None:
            by_cuda = decoded[0]
        else:
            name = f"hw_decoder_load {load}: decoded images unlike those of hw_decoder_load 0"
            rows.append(_row(setup, name, decoded[0] != by_cuda))
    return rows


def _row(setup: Setup, name: str, differ: Iterable[bool]) -> Row:
    found = list(differ)
    return Row("pixels", name, f"of {len(found)}", int(sum(found)), kind="ours", device=setup.device)


def _of_views(setup: Setup, index: SampleIndex) -> list[int]:
    """CRC-32 of all views of every image in the first epoch, in the order of the index."""
    sums = np.zeros(len(index), np.int64)
    for batch in loader_of(replace(setup, index=index), setup.views, drop_last=False):
        views = [view.cpu().numpy() for view in batch.views]
        for place, row in enumerate(batch.index.tolist()):
            sums[row] = zlib.crc32(b"".join(np.ascontiguousarray(view[place]).tobytes() for view in views))
    return sums.tolist()


def decoder(setup: Setup, *, passes: int = 10, report: Report = print) -> list[Row]:
    """Rows that count images whose pixels differ from a quiet decode, by share of the hardware decoder.

    The JPEG hardware of some GPUs was seen to write a batch before earlier work on its memory was done
    (pytorch/vision, pull request 9606). So slow operators read the decoded images here, the first ones at
    once and the last one at the end, while the next batch is decoded into memory that has become free.
    """
    index = distinct(setup)
    rows = []
    for load in (0.0, 1.0) if setup.device == "gpu" else (0.0,):
        report(f"decoding {passes} times with {load:.0%} of JPEGs on the hardware decoder")
        quiet = checksums(setup, index, load)
        busy = np.array([checksums(setup, index, load, busy=True) for _ in range(passes)])
        differ, name = int((busy != quiet).sum()), f"hw_decoder_load {load}: differ while busy"
        rows.append(Row("decoder", name, f"of {busy.size}", differ, kind="limit", device=setup.device))
    return rows


def distinct(setup: Setup) -> SampleIndex:
    """Each image of the index once, or as many of them as are compared, at equal distances."""
    assert setup.index.paths is not None
    rows = np.unique(setup.index.paths, axis=0, return_index=True)[1]
    count = min(_MOST, _BATCHES * setup.batch_size, len(rows))
    return setup.index.subset(rows[np.linspace(0, len(rows) - 1, count).astype(int)])


def checksums(setup: Setup, index: SampleIndex, load: float, busy: bool = False) -> list[int]:
    """CRC-32 of the decoded pixels of every image, in the order of the index.

    Batches are decoded one by one, or, if `busy`, two at a time and read by slow operators.
    """
    gpu = setup.device == "gpu"
    rows = np.split(np.arange(len(index)), range(setup.batch_size, len(index), setup.batch_size))

    def act(encoded: Any) -> Any:
        images = decode(encoded, setup.device, load)
        return _read_slowly(images, 512 if gpu else 32) if busy else images

    graph = short_graph(replace(setup, index=index), iter(rows), act, depth=PREFETCH if busy else 1)
    sums: list[int] = []
    for _ in rows:
        (images,) = graph.run(*([torch.cuda.current_stream()] if gpu else []))
        on_host = images.as_cpu() if gpu else images
        sums += [zlib.crc32(on_host.at(i).tobytes()) for i in range(len(on_host))]
        del images, on_host  # so that the next batch is written into these buffers
    return sums


def _read_slowly(images: Any, side: int) -> Any:
    """The images unchanged, after operators at this size that have read them before."""
    slow = images
    for _ in range(_BUSY):
        slow = fn.gaussian_blur(fn.resize(slow, size=[side, side]), window_size=31)
    # No byte is above 255, so this is 0; but the images are not read before it is known.
    return images ^ fn.cast(fn.reductions.max(slow) > 255, dtype=types.UINT8)
