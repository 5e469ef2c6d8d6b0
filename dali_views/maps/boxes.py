"""From heatmaps to boxes: one tight box per map, or up to K boxes with weights.

Rectangles are (y0, x0, y1, x1) fractions of the image, float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from .heatmap import upsample

Reading: TypeAlias = Literal["extent", "part", "rectangle"]
Threshold: TypeAlias = float | Literal["auto", "otsu"]

WIDE = 0.9
"""Share of the image above which a box says nothing."""
CELLS = 2
"""Cells of a map below which a box may be noise: one hot cell, interpolated, covers less from 0.3 on."""
_SHARE = 0.6  # of the height of a map above its median

_MOST_CELLS = 16  # a side, of a map whose rectangles are all tried: 18,496 rectangles
_AT_A_TIME = 2**22  # rectangles of several maps in memory, as float64 (32 MiB)

# Cells touch along their edges, and only within one image: a whole batch is labelled in one call.
_NEIGHBOURS = np.zeros((3, 3, 3), np.bool_)
_NEIGHBOURS[1] = ndimage.generate_binary_structure(2, 1)


def thresholds(maps: Tensor, threshold: Threshold) -> Tensor:
    """The level of each map (B, h, w) that separates the object from the background, (B, 1, 1).

    A number is the level of all maps. "auto" is the median of the map plus 0.6 of what its maximum lies above
    it (ours). On scenes with objects of less than a third of the image, mean IoU is 0.95 of that at the best
    number for untrained ResNets, 0.85 for a pretrained encoder. On photographs its boxes are too small
    (tests/bench/results/cpu_box_readings.csv). "otsu" chooses it per map so that the values above and below
    differ most (Otsu 1979): 0.92 for a pretrained encoder on photographs, 0.56 for untrained ResNets on
    scenes. No value of a constant map lies above its level.
    """
    if threshold == "auto":
        median = maps.flatten(1).median(1).values
        return (median + _SHARE * (maps.amax((1, 2)) - median))[:, None, None]
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
    maps: Tensor,
    threshold: Threshold = 0.1,
    size: tuple[int, int] | None = None,
    reading: Reading = "extent",
) -> Tensor:
    """One tight box (B, 4) per map; the whole image for a map without a value above the threshold.

    "extent": the rows and columns whose maximum exceeds the threshold. As ``update_box`` of the authors' code
    (ContrastiveCrop, arXiv 2202.03278), with one intended difference: the box ends at the far edge of its
    last row and column, (last + 1) / H; theirs ends at last / H and loses that cell. Their 0.1 suits
    well-trained networks that end in a ReLU. The background of other maps is higher, and 0.1 makes every box
    the whole image: use "auto".

    "part": the same, but of one connected part above the threshold: the part with the greatest sum of the map
    (our choice; greatest means or peaks gave worse boxes). A second hot spot then does not enlarge the box.
    The maps are moved to the CPU.

    "rectangle": the rectangle whose inside is higher than its outside and differs most from it (greatest
    between-class variance, as in Otsu 1979; our choice). It takes no threshold. All rectangles of at most
    16 x 16 cells are tried; a larger map is averaged to that. A constant map gives the whole image.

    Args:
        maps: (B, h, w) in [0, 1], as from ``activation_map``.
        threshold: a number, "auto" or "otsu", see ``thresholds``.
        size: (H, W) to upsample to first, bilinear; the authors use the network's input size.
        reading: "extent", "part" or "rectangle".
    """
    maps = upsample(maps, size)
    if reading == "rectangle":
        return _best_rectangles(maps)
    if reading == "part":
        return _heaviest_parts(maps, threshold)
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


def _heaviest_parts(maps: Tensor, threshold: Threshold) -> Tensor:
    """(B, 4) tight box of the connected part above the threshold with the greatest sum of the map."""
    values = maps.detach().cpu()
    labels, places = _parts(values, threshold)
    sums = np.bincount(labels.ravel(), values.numpy().ravel(), minlength=len(places) + 1)[1:]
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (len(maps), 1))
    for part in np.argsort(-sums, kind="stable")[::-1]:  # the heaviest is written last
        image, *box = places[part]
        boxes[image.start] = _fractions(box, maps.shape)
    return torch.from_numpy(boxes).to(maps.device)


def _parts(maps: Tensor, threshold: Threshold) -> tuple[NDArray[np.int32], list[tuple[slice, slice, slice]]]:
    """Connected parts of maps (B, h, w) on the CPU: labels from 1, and each one's image, rows and columns."""
    labels, count = ndimage.label((maps > thresholds(maps, threshold)).numpy(), _NEIGHBOURS)
    return labels, ndimage.find_objects(labels) if count else []  # SciPy fails on an empty batch


def _fractions(box: Sequence[slice], shape: Sequence[int]) -> tuple[float, float, float, float]:
    (y, x), (height, width) = box, shape[1:]
    return y.start / height, x.start / width, y.stop / height, x.stop / width


def _best_rectangles(maps: Tensor) -> Tensor:
    """(B, 4) rectangle of the greatest between-class variance; the whole image where a map is constant."""
    constant = (maps.amax((1, 2)) == maps.amin((1, 2)))[:, None]
    height, width = (min(cells, _MOST_CELLS) for cells in maps.shape[1:])
    maps = F.adaptive_avg_pool2d(maps, (height, width)).double()
    # Integral image: the sum in rows y0 to y1 and columns x0 to x1 takes four look-ups.
    sums = F.pad((maps - maps.mean((1, 2), keepdim=True)).cumsum(1).cumsum(2), (1, 0, 1, 0))
    rows, columns = (torch.triu_indices(n + 1, n + 1, 1, device=maps.device).T for n in (height, width))
    cells = rows.diff() * columns.diff().T  # (R, C), of each pair of rows and pair of columns
    # With a mean of 0, the variance between n of N cells and the rest is the square of sum / sqrt(n (N - n)).
    spread = (cells * (height * width - cells)).clamp(min=1).double().sqrt()
    best = []
    for part in torch.split(sums, max(1, _AT_A_TIME // cells.numel())):
        strips = part[:, rows[:, 1]] - part[:, rows[:, 0]]
        inside = strips[:, :, columns[:, 1]] - strips[:, :, columns[:, 0]]
        best.append((inside / spread).flatten(1).argmax(1))
    found = torch.cat(best)
    (y0, y1), (x0, x1) = rows[found // len(columns)].T / height, columns[found % len(columns)].T / width
    whole = torch.arange(4, device=maps.device) // 2  # a list of numbers would be copied, with a wait
    return torch.where(constant, whole, torch.stack([y0, x0, y1, x1], 1)).float()


def regions_from_maps(
    maps: Tensor,
    k: int,
    threshold: Threshold,
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
        threshold: cells of a part lie above it; 0 or more, "auto" or "otsu", see ``thresholds``.
        min_area: least share of the image's cells in a part.
        size: (H, W) to upsample to first, bilinear.

    Raises:
        ValueError: maps that are not (B, h, w), k < 1, or a negative threshold.
    """
    if k < 1 or (not isinstance(threshold, str) and threshold < 0):
        raise ValueError(
            f"Regions cannot be made with k={k} and threshold={threshold}; give at least 1 and at least 0."
        )
    whole = upsample(maps.detach().cpu(), size)
    values: NDArray[np.float32] = whole.numpy()
    batch, height, width = values.shape
    labels, places = _parts(whole, threshold)
    shares = np.bincount(labels.ravel(), minlength=len(places) + 1)[1:] / (height * width)
    found: list[list[tuple[float, tuple[float, float, float, float]]]] = [[] for _ in range(batch)]
    for part in np.flatnonzero(shares >= min_area):
        image, *box = places[part]
        weight = float(values[places[part]].mean(dtype=np.float64))
        found[image.start].append((weight, _fractions(box, values.shape)))

    boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (batch, k, 1))
    weights = np.zeros((batch, k))
    for row, parts in enumerate(found):
        heaviest = sorted(parts, key=lambda pair: -pair[0])[:k]
        for slot, (weight, tight) in enumerate(heaviest):
            boxes[row, slot], weights[row, slot] = tight, weight
        if not heaviest:
            weights[row, 0] = 1
    return torch.from_numpy(boxes).float().to(maps.device), torch.from_numpy(weights).float().to(maps.device)
