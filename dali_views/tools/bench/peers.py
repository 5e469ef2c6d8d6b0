"""What users choose instead of this package, each for the same task; five have readers of their own.

- SPDL: threads that decode with FFmpeg, then torchvision's transforms on tensors.
- solo-learn's DALI recipe, restated: each random choice makes both outcomes and adds them under a mask, the
  blur's window is fixed, crops are resized by cubic interpolation, buffers hold the largest ImageNet file.
- FFCV: its own file of JPEGs, a field and a decode per view, written before each turn, which is not counted.
- Kornia and torchcodec, which work on the GPU: see `gpu_peers`.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from torch import Tensor
from torchvision.transforms import v2

from ...loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ...plan import recipes
from ...plan.views import View
from . import dataloaders as dl
from . import gpu_peers
from .contest import Batches, Contender, Report, Setup

BASE = "torchvision PIL"  # every ratio refers to this contender, the first
DECODE = "torchcodec, decode only"
NEEDS = {
    "Kornia": ("kornia",),
    "torchcodec + Kornia": ("torchcodec", "kornia"),
    DECODE: ("torchcodec",),
    "albumentations cv2": ("albumentations", "cv2"),
    "SPDL + torchvision v2": ("spdl",),
    "FFCV": ("ffcv",),
    "lightly MoCoV2Transform": ("lightly",),
}
"""Modules beyond our own requirements that a peer imports."""

_PADDING: dict[str, Any] = {"device_memory_padding": 211025920, "host_memory_padding": 140544512}  # bytes
_TAPS = 23


def contenders(setup: Setup) -> list[Contender]:
    """All peers that can make the views, installed or not."""
    squashed = "crops of an image resized to a square, a seventh larger than the view"
    widths = sorted({dl.window(view) for view in setup.views if view.blur})
    blurs = f"blurs with {' and '.join(map(str, widths))} taps, however little" if widths else ""
    loader, once = partial(dl.batches, setup), replace(setup, views=setup.views[:1])
    found = {
        BASE: (partial(loader, dl.pil_image, dl.pil_view), ""),
        "Kornia": (partial(gpu_peers.kornia, setup), squashed),
        "torchcodec + Kornia": (partial(gpu_peers.torchcodec, setup), "JPEG only"),
        DECODE: (partial(gpu_peers.torchcodec_decode, setup), "makes no views; JPEG only"),
        "solo-learn DALI": (partial(_solo_learn, setup), f"blurs with {_TAPS} taps; cubic resize"),
        "albumentations cv2": (
            partial(loader, dl.cv2_image, dl.albumented, worker_init_fn=dl.one_thread),
            "shrinks by area averages",
        ),
        "SPDL + torchvision v2": (partial(_spdl, setup), blurs),
        "FFCV": (partial(_ffcv, setup), "no hue, grayscale, blur; images of at most 500 pixels"),
        "torchvision v2 tensors": (partial(loader, dl.tensor_image, dl.tensor_view), blurs),
        "ContrastiveCrop PIL": (
            partial(loader, dl.pil_image, partial(dl.pil_view, boxed=True)),
            "crops guided by a box",
        ),
        "lightly MoCoV2Transform": (partial(dl.batches, once, dl.pil_image, dl.lightly_pair), ""),
    }
    if list(setup.views) != recipes.moco_v2(setup.views[0].size):
        del found["lightly MoCoV2Transform"]
    if len({view.size for view in setup.views}) > 1:
        del found["Kornia"]  # squashes to a square for views of one size
    on_gpu = ("DALI", "Kornia", "torchcodec")
    return [
        Contender(
            name,
            "peer",
            setup.device if any(word in name for word in on_gpu) else "cpu",
            start,
            0 if name == DECODE else len(setup.views),
            note,
        )
        for name, (start, note) in found.items()
    ]


def installed(setup: Setup, report: Report = print) -> list[Contender]:
    """The contenders of the installed peers; a line to `report` for each absent peer."""
    peers = contenders(setup)
    if setup.index.form != "names" or any(view.crop in ("whole", "centre") for view in setup.views):
        report("left out: all peers but the first, which make random crops of files only")
        return peers[:1]
    found = []
    for peer in peers:
        missing = ", ".join(module for module in NEEDS.get(peer.name, ()) if find_spec(module) is None)
        if missing:
            report(f"left out: {peer.name} ({missing} not installed; most come with dali-views[bench])")
        else:
            found.append(peer)
    return found


def _spdl(setup: Setup) -> Batches:
    from spdl.pipeline import PipelineBuilder

    source = PipelineBuilder().add_source(dl.endless_rows(setup))
    builder = source.pipe(partial(spdl_views, setup), concurrency=setup.workers)
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


def spdl_views(setup: Setup, row: int) -> list[Tensor]:
    """FFmpeg decodes, torchvision does the rest."""
    from spdl import io

    image = io.to_torch(io.load_image(setup.index.path(row))).permute(2, 0, 1)
    return [dl.tensor_view(view)(image) for view in setup.views]


def stacked(samples: list[list[Tensor]]) -> list[Tensor]:
    """One tensor (B, 3, S, S) per view."""
    return [torch.stack(view) for view in zip(*samples, strict=True)]


def _solo_learn(setup: Setup) -> Batches:
    """Batches of the stock iterator, copied as the recipe copies them."""
    names = [f"view{number}" for number in range(len(setup.views))]
    graph, drop = solo_learn_graph(setup), LastBatchPolicy.DROP
    iterator = DALIGenericIterator(
        graph, names, reader_name="Reader", last_batch_policy=drop, auto_reset=True
    )
    while True:
        for outputs in iterator:
            views = [outputs[0][name].detach().clone() for name in names]
            if setup.device == "gpu":
                torch.cuda.synchronize()
            yield len(views[0])


def solo_learn_graph(setup: Setup) -> Any:
    """Read, decode once, then every view with its own operators."""
    gpu = setup.device == "gpu"
    files = [setup.index.path(row) for row in range(len(setup.index))]

    def build() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(files=files, shuffle_after_epoch=True, name="Reader")
        where, padding = ("mixed", _PADDING) if gpu else ("cpu", {})
        images = fn.decoders.image(encoded, device=where, output_type=types.RGB, **padding)
        return tuple(_solo_learn_view(images, view) for view in setup.views)

    made = pipeline_def(build, batch_size=setup.batch_size, num_threads=setup.workers, seed=setup.seed)
    return made(device_id=0 if gpu else None)


def _solo_learn_view(images: Any, view: View) -> Any:
    """One view, as float32 (3, size, size)."""
    images = fn.random_resized_crop(
        images,
        size=view.size,
        random_area=view.scale,
        random_aspect_ratio=view.ratio,
        interp_type=types.INTERP_CUBIC,
    )
    if view.jitter:
        twists = {
            name: fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))
            for name, strength in vars(view).items()
            if name in ("brightness", "contrast", "saturation")
        }
        hue = fn.random.uniform(range=(-360 * view.hue, 360 * view.hue))
        images = _sometimes(view.jitter, fn.color_twist(images, hue=hue, **twists), images)
    if view.grayscale:
        gray = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        images = _sometimes(view.grayscale, fn.cat(gray, gray, gray, axis=2), images)
    if view.blur:
        sigma = fn.random.uniform(range=view.sigma)
        images = _sometimes(view.blur, fn.gaussian_blur(images, sigma=sigma, window_size=_TAPS), images)
    if view.solarise:
        bright = images >= 128
        images = _sometimes(view.solarise, bright * (255 - images) + (bright ^ True) * images, images)
    return fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(probability=view.flip),
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
    )


def _sometimes(probability: float, changed: Any, images: Any) -> Any:
    """One or the other per image, by masks over both."""
    on = fn.cast(fn.random.coin_flip(probability=probability), dtype=types.BOOL)
    return on * changed + (on ^ True) * images


def _ffcv(setup: Setup) -> Batches:
    """Batches of its loader in random order; a small set is repeated within an epoch."""
    from ffcv.loader import Loader, OrderOption

    assert setup.index.paths is not None
    # Rows of distinct files, and for every row its place among them.
    _, first, indices = np.unique(setup.index.paths, axis=0, return_index=True, return_inverse=True)
    with TemporaryDirectory(prefix="ffcv-") as folder:
        file = f"{folder}/images.beton"
        # Its writer forks, and a process in which DALI has threads does not survive that.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(_ffcv_write, replace(setup, index=setup.index.subset(first)), file).result()
        loader = Loader(
            file,
            batch_size=setup.batch_size,
            num_workers=setup.workers,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            indices=indices.ravel(),
            seed=setup.seed,
            pipelines={f"view{number}": _ffcv_operators(view) for number, view in enumerate(setup.views)},
        )
        while True:
            epoch = iter(loader)
            try:
                for batch in epoch:
                    yield len(batch[0])
            finally:
                epoch.close()


def _ffcv_operators(view: View) -> list[Any]:
    """From a stored image to a tensor."""
    import ffcv.transforms as T
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder

    mean, spread = (255 * np.array(value) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return dl.present(
        (1, RandomResizedCropRGBImageDecoder((view.size, view.size), view.scale, view.ratio)),
        (view.flip, T.RandomHorizontalFlip(view.flip)),
        (view.jitter, T.RandomBrightness(view.brightness, view.jitter)),
        (view.jitter, T.RandomContrast(view.contrast, view.jitter)),
        (view.jitter, T.RandomSaturation(view.saturation, view.jitter)),
        (1, T.NormalizeImage(mean, spread, np.dtype(np.float32))),
        (1, T.ToTensor()),
        (1, T.ToTorchImage()),
    )


def _ffcv_write(setup: Setup, path: str) -> None:
    """Write the file as its users do for ImageNet, each image once per view, in a process of its own."""
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    names = [f"view{number}" for number in range(len(setup.views))]
    fields = {name: RGBImageField("jpg", max_resolution=500, jpeg_quality=90) for name in names}
    images = dl.Views(setup, dl.pil_image, [v2.Identity() for _ in setup.views])
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(images)
