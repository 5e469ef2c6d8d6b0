"""ContrastiveCrop (arXiv 2202.03278) in PIL and a DataLoader: crops whose centres lie in a box per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from ....data.index import SampleIndex
from ....plan.views import View
from ..contender import Batches, Contender, Setup
from .data_loader import loader_batches
from .random_crop import draw_crop
from .torchvision_pil import PILBlur, normalised, opened, photometric, resample

NEEDS: tuple[str, ...] = ()


def contenders(setup: Setup) -> list[Contender]:
    """The same views with their crops in random boxes; none if a view is not cropped at random."""
    if any(view.crop not in ("random", "contrastive") for view in setup.views):
        return []
    views = [replace(view, crop="contrastive") for view in setup.views]

    def start() -> Batches:
        return loader_batches(BoxedViews(setup.index, random_boxes(len(setup.index)), views), setup)

    note = "crops guided by a box per image"
    return [Contender("ContrastiveCrop PIL", "peer", "cpu", start, len(views), note)]


def random_boxes(count: int) -> NDArray[np.float64]:
    """(count, 4) boxes of half the image's side, somewhere in it."""
    low = np.random.default_rng(0).uniform(0, 0.4, (count, 2))
    return np.concatenate([low, low + 0.5], 1)


class BoxedViews(torch.utils.data.Dataset[list[torch.Tensor]]):
    """A data set that holds a box for each image, as in the published code."""

    def __init__(self, index: SampleIndex, boxes: NDArray[np.float64], views: Sequence[View]) -> None:
        self.index = index
        self.boxes = boxes
        self.views = views
        self.after = [
            v2.Compose([*photometric(view, PILBlur(view.sigma)), v2.PILToTensor(), *normalised()])
            for view in views
        ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> list[torch.Tensor]:
        image = opened(self.index.path(row))
        tensors = []
        for view, after in zip(self.views, self.after, strict=True):
            rectangle = draw_crop(image.height, image.width, view, self.boxes[row])
            size = [view.size, view.size]
            tensors.append(after(v2.functional.resized_crop(image, *rectangle, size, resample(view))))
        return tensors
