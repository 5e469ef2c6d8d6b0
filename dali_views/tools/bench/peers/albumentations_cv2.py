"""albumentations on OpenCV images in a DataLoader, set as lightly-train sets it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ....loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ....plan.views import View
from ..contender import Batches, Contender, Setup
from .data_loader import Views, loader_batches

NEEDS: tuple[str, ...] = ("albumentations", "cv2")

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or every process asks the network for a newer one


def contenders(setup: Setup) -> list[Contender]:
    """cv2 decodes and albumentations transforms, a thread per process."""

    def start() -> Batches:
        dataset = Views(setup.index, opened, [Transform(view) for view in setup.views])
        return loader_batches(dataset, setup, worker_init_fn=begin_worker)

    note = "shrinks by area averages"
    return [Contender("albumentations cv2", "peer", "cpu", start, len(setup.views), note)]


def opened(path: str) -> NDArray[np.uint8]:
    """(H, W, 3) in RGB; PIL opens what OpenCV cannot."""
    import cv2

    image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        return np.asarray(Image.open(path).convert("RGB"))
    pixels: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return pixels


def begin_worker(_: int) -> None:
    """One thread per process, and other draws in each."""
    import cv2

    cv2.setNumThreads(0)
    worker = torch.utils.data.get_worker_info()
    assert worker is not None
    for number, transform in enumerate(worker.dataset.transforms):  # type: ignore[attr-defined]
        transform.composed.set_random_seed((worker.seed + number) % 2**32)


class Transform:
    """A view by albumentations, from pixels to a normalised tensor."""

    def __init__(self, view: View) -> None:
        import albumentations as A
        from albumentations.pytorch import ToTensorV2

        steps = [*cut(view), *photometric(view), A.Normalize(IMAGENET_MEAN, IMAGENET_STD), ToTensorV2()]
        self.composed: Callable[..., Any] = A.Compose(steps)

    def __call__(self, image: NDArray[np.uint8]) -> torch.Tensor:
        view: torch.Tensor = self.composed(image=image)["image"]
        return view


def cut(view: View) -> list[Any]:
    """From an image to the square; a crop that a box guides is cut as `"random"`."""
    import albumentations as A
    import cv2

    size = (view.size, view.size)
    if view.crop == "whole":
        return [A.Resize(*size, interpolation=cv2.INTER_AREA)]
    if view.crop == "centre":
        side = round(view.size / view.centre_share)
        return [A.SmallestMaxSize(side, interpolation=cv2.INTER_AREA), A.CenterCrop(*size)]
    return [A.RandomResizedCrop(size, scale=view.scale, ratio=view.ratio, interpolation=cv2.INTER_AREA)]


def photometric(view: View) -> list[Any]:
    """Flip and colour of a view."""
    import albumentations as A

    steps: list[Any] = []
    if view.flip:
        steps.append(A.HorizontalFlip(p=view.flip))
    if view.jitter:
        steps.append(A.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter))
    if view.grayscale:
        steps.append(A.ToGray(p=view.grayscale))
    if view.blur:
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=view.sigma, p=view.blur))
    if view.solarise:
        steps.append(A.Solarize(threshold_range=(0.5, 0.5), p=view.solarise))
    return steps
