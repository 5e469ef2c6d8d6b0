"""FFCV with the operators it has: its own file of JPEGs of at most 500 pixels, a field and a decode per view.

It has no hue, grayscale or blur, so it does less than the others. The file is written before each turn and is
not counted. To build FFCV, install the development files of OpenCV and libjpeg-turbo.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torchvision.transforms import v2

from ....loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ....plan.views import View
from ..contest import Batches, Contender, Setup
from .dataloaders import Views, pil_image, present


def contenders(setup: Setup) -> list[Contender]:
    """One."""
    note = "no hue, grayscale, blur; images of at most 500 pixels"
    return [Contender("FFCV", "peer", "cpu", partial(batches, setup), len(setup.views), note)]


def batches(setup: Setup) -> Batches:
    """Batches of its loader in random order; a small set is repeated within an epoch."""
    from ffcv.loader import Loader, OrderOption

    assert setup.index.paths is not None
    # Rows of distinct files, and for every row its place among them.
    _, first, indices = np.unique(setup.index.paths, axis=0, return_index=True, return_inverse=True)
    with TemporaryDirectory(prefix="ffcv-") as folder:
        file = f"{folder}/images.beton"
        # Its writer forks, and a process in which DALI has threads does not survive that.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(write, replace(setup, index=setup.index.subset(first)), file).result()
        loader = Loader(
            file,
            batch_size=setup.batch_size,
            num_workers=setup.workers,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            indices=indices.ravel(),
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
    import ffcv.transforms as T
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder

    mean, spread = (255 * np.array(value) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return present(
        (1, RandomResizedCropRGBImageDecoder((view.size, view.size), view.scale, view.ratio)),
        (view.flip, T.RandomHorizontalFlip(view.flip)),
        (view.jitter, T.RandomBrightness(view.brightness, view.jitter)),
        (view.jitter, T.RandomContrast(view.contrast, view.jitter)),
        (view.jitter, T.RandomSaturation(view.saturation, view.jitter)),
        (1, T.NormalizeImage(mean, spread, np.dtype(np.float32))),
        (1, T.ToTensor()),
        (1, T.ToTorchImage()),
    )


def write(setup: Setup, path: str) -> None:
    """Write the file as its users do for ImageNet, each image once per view, in a process of its own."""
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        f"view{number}": RGBImageField("jpg", max_resolution=500, jpeg_quality=90)
        for number in range(len(setup.views))
    }
    images = Views(setup, pil_image, [v2.Identity() for _ in setup.views])
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(images)
