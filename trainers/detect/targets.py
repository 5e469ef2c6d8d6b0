"""Objects moved with their image, from pixels of the stored image to those of a view; loaders of views."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_views import Batch, SampleIndex, View, ViewLoader

from .. import config as cfg
from ..data import loader_options
from ..engine.setting import Setting
from .truth import Mask, Objects, Truth, mask_tools

__all__ = ["in_view", "loader_to_test", "loader_to_train", "raster", "targets_of", "views_of"]


def loader_to_train(
    setting: Setting, views: cfg.Views, section: cfg.Detect, index: SampleIndex, world: int
) -> ViewLoader:
    """Whole images, flipped at random, with a short side drawn from `detect.shorts`."""
    if section.batch % world:
        raise ValueError(f"detect.batch {section.batch} does not divide over {world} processes; change it")
    if len(index) < section.batch:
        raise ValueError(f"{len(index)} images cannot fill detect.batch {section.batch}; lower detect.batch")
    view = View(size=section.size, crop="whole", longest=section.longest, shorts=section.shorts, flip=0.5)
    return ViewLoader(index, [view], section.batch // world, **loader_options(setting, views))


def loader_to_test(
    setting: Setting, views: cfg.Views, section: cfg.Detect, index: SampleIndex, world: int
) -> ViewLoader:
    """Every whole image once, with a short side of `detect.size`, shared among the ranks."""
    view = View(size=section.size, crop="whole", longest=section.longest)
    options = {**loader_options(setting, views), "max_bad_share": 1.0}
    each = min(max(1, section.batch // world), -(-len(index) // world))
    return ViewLoader(index, [view], each, shuffle=False, drop_last=False, **options)


def views_of(batch: Batch) -> list[tuple[int, Tensor, bool]]:
    """Row, view (3, h, w) without padding, and whether it is mirrored, of each image. Waits for the GPU."""
    rows, flipped = batch.index.tolist(), batch.flipped[:, 0].tolist()
    shapes = batch.shapes[:, 0].tolist()
    return [
        (row, image[:, :height, :width], mirrored)
        for row, image, (height, width), mirrored in zip(rows, batch.views[0], shapes, flipped, strict=True)
    ]


def targets_of(truth: Truth, batch: Batch, masks: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What torchvision's detectors learn from: images (3, h, w), and their targets on the same device."""
    images, targets = [], []
    for row, image, mirrored in views_of(batch):
        shape = int(image.shape[1]), int(image.shape[2])
        size = int(truth.index.sizes[row, 0]), int(truth.index.sizes[row, 1])
        moved = in_view(truth.objects[row], size, shape, mirrored, masks)
        images.append(image)
        targets.append({name: torch.from_numpy(array).to(image.device) for name, array in moved.items()})
    return images, targets


def in_view(
    objects: Objects, size: tuple[int, int], shape: tuple[int, int], mirrored: bool, masks: bool
) -> dict[str, NDArray[Any]]:
    """The n objects to train on in a view of a whole image.

    Args:
        size: height and width of the stored image; shape: of the view.

    Returns:
        boxes (n, 4) float32 x0, y0, x1, y1 and labels (n,) int64; with `masks` masks (n, h, w) uint8.
    """
    keep = objects.trained
    boxes = objects.boxes[keep] * np.tile([shape[1] / size[1], shape[0] / size[0]], 2)
    if mirrored:
        boxes[:, [0, 2]] = shape[1] - boxes[:, [2, 0]]
    moved: dict[str, NDArray[Any]] = {"boxes": boxes.astype(np.float32), "labels": objects.labels[keep]}
    if masks:
        chosen = [mask for mask, good in zip(objects.masks, keep, strict=True) if good]
        moved["masks"] = np.zeros((len(chosen), *shape), np.uint8)
        for whole, mask in zip(moved["masks"], chosen, strict=True):
            if mask is not None:
                (top, left), part = raster(mask, size, shape)
                (height, width), seen = part.shape, whole[:, ::-1] if mirrored else whole
                seen[top : top + height, left : left + width] = part
    return moved


def raster(
    mask: Mask, size: tuple[int, int], shape: tuple[int, int]
) -> tuple[tuple[int, int], NDArray[np.uint8]]:
    """A mask in a view: polygons are scaled before they are filled, run lengths are sampled.

    Returns:
        Row and column where the part begins that the mask lies in, and this part (h, w), 1 inside. To fill
        the whole view for each object takes several times as long.
    """
    tools = mask_tools()
    if isinstance(mask, dict):
        lengths = tools.frPyObjects(mask, *size)
        x, y, width, height = tools.toBbox(lengths).tolist()
        (top, rows), (left, columns) = (
            _sampled(low, low + side, old, new)
            for low, side, old, new in ((y, height, size[0], shape[0]), (x, width, size[1], shape[1]))
        )
        return (top, left), _filled(lengths)[rows[:, None], columns]
    polygons = [points * (shape[1] / size[1], shape[0] / size[0]) for points in mask]
    corners = np.concatenate(polygons)
    # A margin of a pixel: a vertex is rounded to a fifth of one.
    low, high = (
        np.clip(ends, 0, shape[::-1]) for ends in (np.floor(corners.min(0)) - 1, np.ceil(corners.max(0)) + 1)
    )
    (width, height), (left, top) = (high - low).astype(int).tolist(), low.astype(int).tolist()
    if not width or not height:  # outside of the image
        return (top, left), np.zeros((height, width), np.uint8)
    moved = [(points - low).ravel().tolist() for points in polygons]
    return (top, left), _filled(tools.merge(tools.frPyObjects(moved, height, width)))


def _sampled(low: float, high: float, old: int, new: int) -> tuple[int, NDArray[np.int64]]:
    """The first pixel of a view's side of `new` pixels whose centre lies in [low, high) of `old`, and the
    stored pixels at the centres of this one and those after it, up to `high`."""
    stored = ((np.arange(new) + 0.5) * old / new).astype(np.int64)
    first, last = np.searchsorted(stored, (low, high)).tolist()
    return first, stored[first:last]


def _filled(lengths: Any) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 with NumPy 2
        return np.asarray(mask_tools().decode(lengths), np.uint8)
