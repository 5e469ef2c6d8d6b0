"""lightly's own transform for MoCo v2 in a DataLoader."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ....data.index import SampleIndex
from ....loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ....plan.views import View
from ..contender import Batches, Contender, Setup
from .data_loader import loader_batches
from .torchvision_pil import opened

NEEDS: tuple[str, ...] = ("lightly",)


def contenders(setup: Setup) -> list[Contender]:
    """None unless the views are what this transform can make: two equal ones, cropped as in MoCo v2."""
    first = setup.views[0]
    plain = View(size=first.size)
    equal = len(setup.views) == 2 and setup.views[1] == first
    kept = ("crop", "ratio", "interpolation", "solarise")  # which the transform does not let its user change
    if not equal or first.scale[1] != 1 or any(getattr(first, key) != getattr(plain, key) for key in kept):
        return []

    def start() -> Batches:
        return loader_batches(TwoViews(setup.index, transform(first)), setup)

    return [Contender("lightly MoCoV2Transform", "peer", "cpu", start, 2)]


class TwoViews(torch.utils.data.Dataset[list[torch.Tensor]]):
    """Images under a transform that itself returns the views."""

    def __init__(self, index: SampleIndex, views: Any) -> None:
        self.index = index
        self.views = views

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> list[torch.Tensor]:
        image: Image.Image = opened(self.index.path(row))
        views: list[torch.Tensor] = self.views(image)
        return views


def transform(view: View) -> Any:
    """lightly's transform with the numbers of a view."""
    from lightly.transforms import MoCoV2Transform

    return MoCoV2Transform(
        input_size=view.size,
        cj_prob=view.jitter,
        cj_bright=view.brightness,
        cj_contrast=view.contrast,
        cj_sat=view.saturation,
        cj_hue=view.hue,
        min_scale=view.scale[0],
        random_gray_scale=view.grayscale,
        gaussian_blur=view.blur,
        sigmas=view.sigma,
        hf_prob=view.flip,
        normalize={"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    )
