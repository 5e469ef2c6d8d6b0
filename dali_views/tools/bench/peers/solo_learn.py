"""solo-learn's DALI recipe, restated: stock reader, masks for random choices, 23-tap blur, copied views.

Each random choice makes both outcomes and adds them under a mask, the blur's window is fixed,
crops are resized by cubic interpolation, and each thread's buffers hold the largest ImageNet file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

from ....loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ....plan.views import View
from ..contest import Batches, Contender, Setup

_PADDING: dict[str, Any] = {"device_memory_padding": 211025920, "host_memory_padding": 140544512}  # bytes
_TAPS = 23


def contenders(setup: Setup) -> list[Contender]:
    """On the device of the setup."""
    note = f"blurs with {_TAPS} taps; cubic resize"
    start = partial(batches, setup)
    return [Contender("solo-learn DALI", "peer", setup.device, start, len(setup.views), note)]


def batches(setup: Setup) -> Batches:
    """Batches of the stock iterator, copied as the recipe copies them."""
    names = [f"view{number}" for number in range(len(setup.views))]
    iterator = DALIGenericIterator(
        graph(setup), names, reader_name="Reader", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    while True:
        for outputs in iterator:
            views = [outputs[0][name].detach().clone() for name in names]
            if setup.device == "gpu":
                torch.cuda.synchronize()
            yield len(views[0])


def graph(setup: Setup) -> Any:
    """Read, decode once, then every view with its own operators."""
    gpu = setup.device == "gpu"

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=setup.batch_size,
        num_threads=setup.workers,
        device_id=0 if gpu else None,
        seed=setup.seed,
    )
    def build() -> tuple[Any, ...]:
        files = [setup.index.path(row) for row in range(len(setup.index))]
        encoded, _ = fn.readers.file(files=files, shuffle_after_epoch=True, name="Reader")
        padding = _PADDING if gpu else {}
        where = "mixed" if gpu else "cpu"
        images = fn.decoders.image(encoded, device=where, output_type=types.RGB, **padding)
        return tuple(augmented(images, view) for view in setup.views)

    return build()


def augmented(images: Any, view: View) -> Any:
    """One view, as float32 (3, size, size)."""
    images = fn.random_resized_crop(
        images,
        size=view.size,
        random_area=view.scale,
        random_aspect_ratio=view.ratio,
        interp_type=types.INTERP_CUBIC,
    )
    if view.jitter:
        brightness, contrast, saturation = (
            fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))
            for strength in (view.brightness, view.contrast, view.saturation)
        )
        hue = fn.random.uniform(range=(-360 * view.hue, 360 * view.hue))
        turned = fn.color_twist(
            images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )
        images = sometimes(view.jitter, turned, images)
    if view.grayscale:
        gray = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        images = sometimes(view.grayscale, fn.cat(gray, gray, gray, axis=2), images)
    if view.blur:
        sigma = fn.random.uniform(range=view.sigma)
        images = sometimes(view.blur, fn.gaussian_blur(images, sigma=sigma, window_size=_TAPS), images)
    if view.solarise:
        bright = images >= 128
        images = sometimes(view.solarise, bright * (255 - images) + (bright ^ True) * images, images)
    return fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(probability=view.flip),
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
    )


def sometimes(probability: float, changed: Any, images: Any) -> Any:
    """One or the other per image, by masks over both."""
    on = fn.cast(fn.random.coin_flip(probability=probability), dtype=types.BOOL)
    return on * changed + (on ^ True) * images
