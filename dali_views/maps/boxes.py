"""From heatmaps to boxes: one tight box per map, or up to K boxes with weights.

Rectangles are (y0, x0, y1, x1) fractions of the image, float32.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .heatmap import upsample

# Cells touch along their edges, and only within one image: a whole batch is labelled in one call.
_NEIGHBOURS = np.zeros((3, 3, 3), np.bool_)
_NEIGHBOURS[1] = ndimage.generate_binary_structure(2, 1)


def thresholds(maps: Tensor, threshold: float | Literal["otsu"]) -> Tensor:
    """The level of each map (B, h, w) that separates the object from the background, (B, 1, 1).

    A number is the level of all maps. "otsu" chooses it per map so that the values above and below differ
    most (Otsu 1979): maps whose values are all high, as a transformer's, then still have a box. No value of a
    constant map lies above its level.
    """
    if threshold != "otsu":
        return torch.full((len(maps), 1, 1), threshold, device=maps.device)
    values = maps.flatten(1).double().sort(1).values
    count = values.shape[1]
    if count < 2:
        return maps
    below = torch.arange(1, count, device=maps.device)
    sums = values.cumsum(1)
    means = sums[:, :-1] / below, (sums[:, -1:] - sums[:, :-1]) / (count - below)
    cut = (below * (count - below) * (means[1] - means[0]) ** 2).argmax(1, keepdim=True)
    # The value below the cut, not the middle: equal values never lie on both sides.
    return values.gather(1, cut)[:, :, None].float()


def boxes_from_maps(
    maps: Tensor, threshold: float | Literal["otsu"] = 0.1, size: tuple[int, int] | None = None
) -> Tensor:
    """One tight box (B, 4) per map: the rows and columns whose maximum exceeds the threshold.

    As ``update_box`` of the authors' code (ContrastiveCrop, arXiv 2202.03278), with one intended difference:
    the box ends at the far edge of its last row and column, (last + 1) / H; theirs ends at last / H and loses
    that cell. A map with no value above the threshold gives the whole image. Their 0.1 suits well-trained
    networks that end in a ReLU. The background of other maps is higher, and 0.1 makes every box the whole
    image: use "otsu".

    Args:
        maps: (B, h, w) in [0, 1], as from ``activation_map``.
        threshold: a number, or "otsu", see ``thresholds``.
        size: (H, W) to upsample to first, bilinear; the authors use the network's input size.
    """
    maps = upsample(maps, size)
    hot = maps > thresholds(maps, threshold)
    y0, y1 = _extent(hot.any(2))
    x0, x1 = _extent(hot.any(1))
    return torch.stack([y0, x0, y1, x1], 1)


def _extent(hot: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last hot cell of each (B, n) row as fractions; (0, 1) where none is hot."""
    n = hot.shape[1]
    cells = torch.arange(n, device=hot.device)
    first = torch.where(hot, cells, n).amin(1)
    last = torch.where(hot, cells, -1).amax(1)
    none = last < 0
    return torch.where(none, 0, first).float() / n, torch.where(none, n, last + 1).float() / n


def regions_from_maps(
    maps: Tensor,
    k: int,
    threshold: float | Literal["otsu"],
    min_area: float = 0.01,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Boxes (B, K, 4) and weights (B, K), float32: one box per connected part above the threshold.

    Follows ContraCAM (arXiv 2108.00049): threshold, parts, least area 1 %, without its margin. Our choices:
    parts join along edges, not diagonals; the area counts the part's own cells; the weight of a part is the
    mean of the map in its tight box, and the K heaviest parts stay, heaviest first. Equal weights keep the
    order from top to bottom and left to right.

    ``RegionTable.update`` accepts the result. Unused slots hold the whole image with weight 0; an image
    without any part holds it once with weight 1. The maps are moved to the CPU, once per call.

    Args:
        maps: (B, h, w) in [0, 1], as from ``activation_map``.
        k: number of slots K.
        threshold: cells of a part lie above it; 0 or more, or "otsu", see ``thresholds``.
        min_area: least share of the image's cells in a part.
        size: (H, W) to upsample to first, bilinear.

    Raises:
        ValueError: maps that are not (B, h, w), k < 1, or a negative threshold.
    """
    if k < 1 or (threshold != "otsu" and threshold < 0):
        raise ValueError(
            f"Regions cannot be made with k={k} and threshold={threshold}; give at least 1 and at least 0."
        )
    whole = upsample(maps.detach().cpu(), size)
    values: NDArray[np.float32] = whole.numpy()
    batch, height, width = values.shape
    labels, count = ndimage.label((whole > thresholds(whole, threshold)).numpy(), _NEIGHBOURS)
    shares = np.bincount(labels.ravel(), minlength=count + 1)[1:] / (height * width)
    places = ndimage.find_objects(labels) if count else []  # SciPy fails on an empty batch
    found: list[list[tuple[float, tuple[float, float, float, float]]]] = [[] for _ in range(batch)]
    for part in np.flatnonzero(shares >= min_area):
        image, y, x = places[part]
        box = (y.start / height, x.start / width, y.stop / height, x.stop / width)
        found[image.start].append((float(values[places[part]].mean(dtype=np.float64)), box))

    boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (batch, k, 1))
    weights = np.zeros((batch, k))
    for row, parts in enumerate(found):
        heaviest = sorted(parts, key=lambda pair: -pair[0])[:k]
        for slot, (weight, box) in enumerate(heaviest):
            boxes[row, slot], weights[row, slot] = box, weight
        if not heaviest:
            weights[row, 0] = 1
    return torch.from_numpy(boxes).float().to(maps.device), torch.from_numpy(weights).float().to(maps.device)
