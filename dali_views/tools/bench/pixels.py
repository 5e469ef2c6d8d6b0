"""Whether pixels depend on the batch that an image comes in, by share of the hardware decoder."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ...data.index import SampleIndex
from .contest import Report, Row, Setup
from .costs import checksums, distinct
from .loaders import loader_of

_LOADS = (0.0, 0.65, 1.0)
_SIZES = (5, 8)  # batch sizes beside the one that is measured


def pixels(setup: Setup, report: Report = print) -> list[Row]:
    """Rows that count images whose pixels differ from those in batches of 5, and from those without hardware.

    DALI gives a fixed share of each batch to the hardware decoder, whose pixels differ from those of the CUDA
    decoder (DALI, pull requests 2232 and 4272). So the place in the batch may decide what decodes an image.
    """
    index = distinct(setup.index)
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
