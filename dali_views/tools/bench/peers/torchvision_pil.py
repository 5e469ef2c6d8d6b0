"""torchvision's transforms on PIL images in a DataLoader, as in the published code of MoCo v2."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from ....loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ....plan.views import View
from ..contender import Batches, Contender, Setup
from .data_loader import Views, loader_batches

NEEDS: tuple[str, ...] = ()
NAME = "torchvision PIL"


def contenders(setup: Setup) -> list[Contender]:
    """The baseline of every comparison."""

    def start() -> Batches:
        dataset = Views(setup.index, opened, [transform(view) for view in setup.views])
        return loader_batches(dataset, setup)

    return [Contender(NAME, "peer", "cpu", start, len(setup.views))]


def opened(file: str | IO[bytes]) -> Image.Image:
    """The image in RGB."""
    return Image.open(file).convert("RGB")


def transform(view: View) -> Callable[[Image.Image], torch.Tensor]:
    """What torchvision makes a `"random"`, `"whole"` or `"centre"` view with, in PIL as in MoCo v2's code."""
    composed: Callable[[Image.Image], torch.Tensor] = v2.Compose(
        [*cut(view), *photometric(view, PILBlur(view.sigma)), v2.PILToTensor(), *normalised()]
    )
    return composed


def resample(view: View) -> Any:
    """torchvision's name for the view's interpolation."""
    return v2.InterpolationMode.BICUBIC if view.interpolation == "cubic" else v2.InterpolationMode.BILINEAR


def cut(view: View) -> list[Any]:
    """From an image to the square; a crop that a box guides is cut as `"random"`."""
    size, how = [view.size, view.size], resample(view)
    if view.crop == "whole":
        return [v2.Resize(size, how)]
    if view.crop == "centre":
        return [v2.Resize(round(view.size / view.centre_share), how), v2.CenterCrop(view.size)]
    return [v2.RandomResizedCrop(size, view.scale, view.ratio, how)]


def photometric(view: View, blur: torch.nn.Module) -> list[Any]:
    """Flip and colour of a view, for PIL images and for uint8 tensors."""
    steps: list[Any] = []
    if view.flip:
        steps.append(v2.RandomHorizontalFlip(view.flip))
    if view.jitter:
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps.append(v2.RandomApply([jitter], view.jitter))
    if view.grayscale:
        steps.append(v2.RandomGrayscale(view.grayscale))
    if view.blur:
        steps.append(v2.RandomApply([blur], view.blur))
    if view.solarise:
        steps.append(v2.RandomSolarize(128, view.solarise))
    return steps


def normalised() -> list[Any]:
    """From a uint8 tensor to float32 of mean 0 and spread 1."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


class PILBlur(torch.nn.Module):
    """Blur by a radius drawn per image; PIL approximates the Gaussian by three boxes."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        """A blurred copy."""
        radius = float(torch.empty(1).uniform_(*self.sigma))
        return image.filter(ImageFilter.GaussianBlur(radius))
