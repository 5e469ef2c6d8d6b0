"""Peers that augment or decode on the GPU. Where there is none, they run on the CPU, to be tested.

- Kornia as stable-pretraining uses it (benchmarks/imagenet10/two_view_gpu.py there): workers decode images
  and squash them to squares a seventh larger than the view. A chain of augmentations makes the views of a
  batch of them, equal views in one call.
- torchcodec: threads read files, nvJPEG decodes a batch in one call; torchvision cuts the crops out of whole
  images one by one, Kornia does the rest in batches. JPEG only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from ...loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ...plan.views import View
from . import dataloaders as dl
from .contest import Batches, Setup


def kornia(setup: Setup, use: dl.Use = dl.ignore) -> Batches:
    """Batches of squashed images (B, 3, S, S) from workers, of which Kornia makes the views on the device."""
    where, augment = _device(setup), kornia_views(setup, cropped=False)
    opened = partial(_square, round(setup.views[0].size * 8 / 7))
    for (images,) in dl.loaded(replace(setup, views=setup.views[:1]), opened, _as_it_is):
        images = images.to(where, non_blocking=True)
        yield from _used(setup, augment([images] * len(setup.views)), use)


def torchcodec(setup: Setup, use: dl.Use = dl.ignore) -> Batches:
    """Batches that torchcodec decodes, torchvision crops and Kornia augments."""
    augment, cuts = kornia_views(setup, cropped=True), [dl.cut(view) for view in setup.views]
    for images in _decoded(setup):
        yield from _used(setup, augment([torch.stack([cut(each) for each in images]) for cut in cuts]), use)


def torchcodec_decode(setup: Setup) -> Batches:
    """Batches that torchcodec decodes, and no more."""
    for images in _decoded(setup):
        yield from _used(setup, images, dl.ignore)


def _used(setup: Setup, views: list[Tensor], use: dl.Use) -> Iterator[int]:
    use(views)
    if setup.device == "gpu" and use is dl.ignore:
        torch.cuda.synchronize()
    yield setup.batch_size


def _device(setup: Setup) -> torch.device:
    return torch.device("cuda" if setup.device == "gpu" else "cpu")


def _decoded(setup: Setup) -> Iterator[list[Tensor]]:
    """uint8 (3, H, W) on the device, of files that were read while the batch before was decoded."""
    from torchcodec.decoders import decode_jpeg

    paths = map(setup.index.path, dl.endless_rows(setup))
    with ThreadPoolExecutor(setup.workers) as threads:

        def read() -> list[Any]:
            return [threads.submit(Path(path).read_bytes) for path in islice(paths, setup.batch_size)]

        ahead = read()
        while True:
            files, ahead = ahead, read()
            yield decode_jpeg([file.result() for file in files], mode="RGB", device=_device(setup))


def kornia_views(setup: Setup, cropped: bool) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """From the images of each view, uint8 (B, 3, H, W), to the views, float32 (B, 3, S, S)."""
    where, (first, *others) = _device(setup), setup.views
    equal = all(view == first for view in others)
    chains = [_chain(view, cropped).to(where) for view in (setup.views[:1] if equal else setup.views)]

    @torch.no_grad()
    def augment(images: Sequence[Tensor]) -> list[Tensor]:
        parts = [torch.cat(list(images))] if equal else images
        views = [chain(part.float() / 255) for chain, part in zip(chains, parts, strict=True)]
        return list(views[0].chunk(len(setup.views))) if equal else views

    return augment


def _chain(view: View, cropped: bool) -> Any:
    """Kornia's augmentations in our order; it draws one set of values per image."""
    import kornia.augmentation as K

    width = 2 * round(view.size / 20) + 1  # 23 pixels for a view of 224, as SimCLR's
    colours = (view.brightness, view.contrast, view.saturation, view.hue)
    return torch.nn.Sequential(
        *dl.present(
            (not cropped, K.RandomResizedCrop((view.size, view.size), view.scale, view.ratio)),
            (view.flip, K.RandomHorizontalFlip(p=view.flip)),
            (view.jitter, K.ColorJitter(*colours, p=view.jitter)),
            (view.grayscale, K.RandomGrayscale(p=view.grayscale)),
            (view.blur, K.RandomGaussianBlur((width, width), view.sigma, p=view.blur)),
            (view.solarise, K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=view.solarise)),
            (1, K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))),
        )
    )


def _square(side: int, path: str) -> Tensor:
    """The whole image, squashed, as uint8 (3, side, side)."""
    image: Tensor = v2.functional.pil_to_tensor(dl.pil_image(path).resize((side, side), 2))
    return image


def _as_it_is(view: View) -> dl.Transform:
    return v2.Identity()
