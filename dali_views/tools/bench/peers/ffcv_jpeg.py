"""FFCV with the operators it has: its own file of JPEGs of at most 500 pixels, a field and a decode per view.

It has neither hue nor grayscale nor blur, so that it does less than all others. Written once, before the
first turn, and not counted. To build it takes the development files of OpenCV and libjpeg-turbo.
"""

from __future__ import annotations

import atexit
import multiprocessing
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ....plan.views import View
from ..contender import Batches, Contender, Setup

NEEDS: tuple[str, ...] = ("ffcv",)
_LONGEST, _QUALITY = 500, 90  # as in its users' recipe for ImageNet


def contenders(setup: Setup) -> list[Contender]:
    """Crops at random only."""
    if any(view.crop in ("whole", "centre") for view in setup.views):
        return []

    def start() -> Batches:
        return batches(setup)

    note = "no hue, grayscale, blur; images of at most 500 pixels"
    return [Contender("FFCV", "peer", "cpu", start, len(setup.views), note)]


def batches(setup: Setup) -> Batches:
    """Batches of its loader, in random order; a small set is repeated within an epoch."""
    from ffcv.loader import Loader, OrderOption

    files = [setup.index.path(row) for row in range(len(setup.index))]
    distinct = list(dict.fromkeys(files))
    rows = {file: row for row, file in enumerate(distinct)}
    loader = Loader(
        str(written(tuple(distinct), len(setup.views))),
        batch_size=setup.batch_size,
        num_workers=setup.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        indices=np.array([rows[file] for file in files]),
        seed=setup.seed,
        pipelines={f"view{number}": operators(view) for number, view in enumerate(setup.views)},
    )
    while True:
        epoch = iter(loader)
        try:
            for batch in epoch:
                yield len(batch[0])
        finally:
            epoch.close()


def operators(view: View) -> list[Any]:
    """From a stored image to a tensor."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.transforms import (
        NormalizeImage,
        RandomBrightness,
        RandomContrast,
        RandomHorizontalFlip,
        RandomSaturation,
        ToTensor,
        ToTorchImage,
    )

    steps: list[Any] = [RandomResizedCropRGBImageDecoder((view.size, view.size), view.scale, view.ratio)]
    if view.flip:
        steps.append(RandomHorizontalFlip(view.flip))
    if view.jitter:
        steps.append(RandomBrightness(view.brightness, view.jitter))
        steps.append(RandomContrast(view.contrast, view.jitter))
        steps.append(RandomSaturation(view.saturation, view.jitter))
    mean, spread = (255 * np.array(value) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return [*steps, NormalizeImage(mean, spread, np.dtype(np.float32)), ToTensor(), ToTorchImage()]


@cache
def written(files: tuple[str, ...], views: int) -> Path:
    """A file of the images, each once per view; gone when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="ffcv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Its writer forks, which a process in which DALI has threads does not survive.
    process = multiprocessing.get_context("spawn").Process(
        target=write, args=(files, views, folder / "images.beton")
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"FFCV's writer ended with exit code {process.exitcode}")
    return folder / "images.beton"


def write(files: Sequence[str], views: int, path: Path) -> None:
    """Write the file, in a process of its own."""
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        f"view{number}": RGBImageField("jpg", max_resolution=_LONGEST, jpeg_quality=_QUALITY)
        for number in range(views)
    }
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Repeated(files, views))


class _Repeated:
    def __init__(self, files: Sequence[str], views: int) -> None:
        self.files = files
        self.views = views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Image.Image, ...]:
        return (Image.open(self.files[row]).convert("RGB"),) * self.views
