"""SPDL: threads that decode with FFmpeg, then torchvision's transforms on tensors."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..contest import Batches, Contender, Setup
from .dataloaders import blur_note, endless_rows, tensor_view


def contenders(setup: Setup) -> list[Contender]:
    """One, with the tensors of torchvision."""
    start = partial(batches, setup)
    note = blur_note(setup)
    return [Contender("SPDL + torchvision v2", "peer", "cpu", start, len(setup.views), note)]


def batches(setup: Setup) -> Batches:
    """Rows in, lists of views out, on as many threads as there are workers."""
    from spdl.io.utils import get_ffmpeg_versions
    from spdl.pipeline import PipelineBuilder

    try:
        get_ffmpeg_versions()
    except RuntimeError as error:
        raise RuntimeError("SPDL finds no libraries of FFmpeg; install it system-wide") from error

    source = PipelineBuilder().add_source(endless_rows(setup))
    builder = source.pipe(partial(views, setup), concurrency=setup.workers)
    builder = builder.aggregate(setup.batch_size, drop_last=True).pipe(stacked).add_sink(2)
    pipeline = builder.build(num_threads=setup.workers, max_failures=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # images run side by side already
    try:
        with pipeline.auto_stop():
            for made in pipeline:
                yield len(made[0])
    finally:
        torch.set_num_threads(threads)


def views(setup: Setup, row: int) -> list[Tensor]:
    """FFmpeg decodes, torchvision does the rest."""
    from spdl import io

    image = io.to_torch(io.load_image(setup.index.path(row))).permute(2, 0, 1)
    return [tensor_view(view)(image) for view in setup.views]


def stacked(samples: list[list[Tensor]]) -> list[Tensor]:
    """One tensor (B, 3, S, S) per view."""
    return [torch.stack(view) for view in zip(*samples, strict=True)]
