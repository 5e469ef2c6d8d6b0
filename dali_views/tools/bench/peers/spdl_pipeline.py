"""SPDL: threads that decode with FFmpeg, then torchvision on tensors, or FFmpeg's filters for all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ..contender import Batches, Contender, Setup
from .data_loader import endless_rows
from .ffmpeg_filters import filters
from .torchvision_v2 import blur_note, transform

NEEDS: tuple[str, ...] = ("spdl",)


def contenders(setup: Setup) -> list[Contender]:
    """Two ways; the second for crops drawn at random only."""

    def tensors() -> Batches:
        return batches(setup, TorchvisionViews(setup), stacked)

    def filtered() -> Batches:
        return batches(setup, FilteredViews(setup), normalised)

    count = len(setup.views)
    rows = [Contender("SPDL + torchvision v2", "peer", "cpu", tensors, count, blur_note(setup.views))]
    if all(view.crop not in ("whole", "centre") for view in setup.views):
        note = "FFmpeg's arithmetic of colour and blur"
        rows.append(Contender("SPDL, FFmpeg filters", "peer", "cpu", filtered, count, note))
    return rows


def batches(
    setup: Setup, per_image: Callable[[int], list[Any]], per_batch: Callable[[list[list[Any]]], list[Any]]
) -> Batches:
    """Rows in, lists of views out, on as many threads as there are workers."""
    from spdl.io.utils import get_ffmpeg_versions
    from spdl.pipeline import PipelineBuilder

    try:
        get_ffmpeg_versions()
    except RuntimeError as error:
        raise RuntimeError("SPDL finds no libraries of FFmpeg; install it system-wide") from error
    pipeline = (
        PipelineBuilder()
        .add_source(endless_rows(setup))
        .pipe(per_image, concurrency=setup.workers)
        .aggregate(setup.batch_size, drop_last=True)
        .pipe(per_batch)
        .add_sink(2)
        .build(num_threads=setup.workers, max_failures=0)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # images run side by side already
    try:
        with pipeline.auto_stop():
            for views in pipeline:
                yield len(views[0])
    finally:
        torch.set_num_threads(threads)


class TorchvisionViews:
    """FFmpeg decodes, torchvision does the rest."""

    def __init__(self, setup: Setup) -> None:
        self.index = setup.index
        self.transforms = [transform(view) for view in setup.views]

    def __call__(self, row: int) -> list[torch.Tensor]:
        from spdl import io

        image = io.to_torch(io.load_image(self.index.path(row))).permute(2, 0, 1)
        return [change(image) for change in self.transforms]


class FilteredViews:
    """FFmpeg does all but normalise."""

    def __init__(self, setup: Setup) -> None:
        self.index = setup.index
        self.views = setup.views

    def __call__(self, row: int) -> list[Any]:
        from spdl import io

        packets = io.demux_image(self.index.path(row))
        chains = [filters(packets.height, packets.width, view) for view in self.views]
        numbers = range(len(chains))
        parts = [
            f"{io.get_buffer_desc(packets.codec)},split={len(chains)}{''.join(f'[{n}]' for n in numbers)}",
            *(f"[{n}]{chain},buffersink@{n}" for n, chain in enumerate(chains)),
        ]
        graph = io.FilterGraph(";".join(parts))
        graph.add_frames(io.decode_packets(packets, filter_desc=None))
        graph.flush()
        return [graph.get_frames(key=f"buffersink@{n}") for n in numbers]


def stacked(samples: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """One tensor per view."""
    return [torch.stack(view) for view in zip(*samples, strict=True)]


def normalised(samples: list[list[Any]]) -> list[torch.Tensor]:
    """One float32 tensor per view, of frames that hold RGB bytes."""
    from spdl import io

    mean, spread = (255 * torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    tensors = []
    for frames in zip(*samples, strict=True):
        pixels = io.to_torch(io.convert_frames(list(frames)))[:, 0]  # (B, H, W, 3)
        tensors.append((pixels.permute(0, 3, 1, 2).contiguous().float() - mean) / spread)
    return tensors
