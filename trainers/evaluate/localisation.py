"""How well one predicted box per image finds the true objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dali_views import SampleIndex
from dali_views.maps.coordinates import iou

__all__ = [
    "CENTRE",
    "MOST_LOCALISED",
    "THRESHOLDS",
    "WHOLE",
    "Localised",
    "Truth",
    "best_overlap",
    "best_threshold",
    "localisation",
    "reference",
    "spread_rows",
]

CENTRE = (0.25, 0.25, 0.75, 0.75)
WHOLE = (0.0, 0.0, 1.0, 1.0)
MOST_LOCALISED = 5000
"""Images with true boxes that are enough for a mean."""
THRESHOLDS = tuple(level / 10 for level in range(1, 10))
"""Shares of a map at which boxes are tried."""


def spread_rows(count: int, most: int = MOST_LOCALISED) -> npt.NDArray[np.int64]:
    """Rows, ascending, of at most so many of `count` samples, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


class Truth(Protocol):
    """An index with ragged true boxes (a SampleIndex)."""

    def __len__(self) -> int: ...
    def truth(self, i: int, /) -> npt.NDArray[np.floating[Any]]: ...


@dataclass(frozen=True, eq=False)
class Localised:
    """Where an encoder sees the object in each of N images."""

    index: SampleIndex
    boxes: npt.NDArray[np.float32]
    """(N, 4), at the threshold."""
    overlap: npt.NDArray[np.float64]
    """(N,) IoU with the best-matching true box, NaN where there is none."""
    threshold: float


def best_overlap(boxes: npt.NDArray[np.floating[Any]], index: Truth) -> npt.NDArray[np.float64]:
    """(N,) IoU of boxes (N, 4) with the best-matching true box of each image, NaN where it has none."""
    truths = [index.truth(i) for i in range(len(index))]
    counts = np.array([len(true) for true in truths], dtype=np.int64)
    best = np.full(len(index), np.nan)
    if counts.any():
        true = torch.from_numpy(np.concatenate(truths))
        overlaps = iou(torch.from_numpy(boxes.repeat(counts, 0)), true).double().numpy()
        best[counts > 0] = np.maximum.reduceat(overlaps, (counts.cumsum() - counts)[counts > 0])
    return best


def localisation(boxes: npt.ArrayLike, index: Truth) -> dict[str, float]:
    """Score one box per image against the true boxes; images without true boxes are skipped.

    Args:
        boxes: (N, 4) as (y0, x0, y1, x1) fractions of the image, row i for image i of the index.
        index: true boxes in the same unit.

    Returns:
        images: how many were scored.
        iou_best: mean IoU with the best-matching true box.
        iou_largest: mean IoU with the largest true box.
        corloc: share of images whose best IoU is at least 0.5 (Deselaers et al. 2010).
        The three are NaN if no image has true boxes.

    Raises:
        ValueError: the boxes are not (N, 4) with N the length of the index.
    """
    predicted = np.asarray(boxes, dtype=np.float64)
    if predicted.shape != (len(index), 4):
        raise ValueError(f"boxes should have shape ({len(index)}, 4), one per image, not {predicted.shape}")
    truths = [index.truth(i) for i in range(len(index))]
    counts = np.array([len(true) for true in truths], dtype=np.int64)
    if not counts.sum():
        return {"images": 0, "iou_best": np.nan, "iou_largest": np.nan, "corloc": np.nan}
    true = np.concatenate(truths)
    overlaps = iou(torch.from_numpy(predicted.repeat(counts, 0)), torch.from_numpy(true)).double().numpy()
    areas = np.prod(true[:, 2:] - true[:, :2], axis=1)
    starts = (counts.cumsum() - counts)[counts > 0]
    best = np.maximum.reduceat(overlaps, starts)
    largest = [overlaps[a + np.argmax(areas[a:b])] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return {
        "images": len(best),
        "iou_best": float(best.mean()),
        "iou_largest": float(np.mean(largest)),
        "corloc": float((best >= 0.5).mean()),
    }


def best_threshold(
    boxes: npt.NDArray[np.floating[Any]], index: Truth, thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, float]:
    """Scores at the threshold of greatest mean IoU: what a map is worth, whatever threshold a guide has.

    As MaxBoxAcc (Choe et al., arXiv 2001.07437), the true boxes choose the threshold, so that maps of unlike
    range compare; a guide, which may not look, does no better.

    Args:
        boxes: (T, N, 4), those of N images at each threshold.

    Returns:
        As of `localisation`, and with "threshold", the one chosen, and "area", the median share of the image
        that its boxes cover.
    """
    scores = [localisation(each, index) for each in boxes]
    best = int(np.argmax([score["iou_best"] for score in scores]))
    area = float(np.median(np.prod(boxes[best][:, 2:] - boxes[best][:, :2], axis=1)))
    return {**scores[best], "threshold": thresholds[best], "area": area}


def reference(index: Truth) -> dict[str, dict[str, float]]:
    """Scores of three boxes that look at nothing.

    "centre" is the centre half, "whole" the whole image, and "random" a crop of 0.2 to 1 of the area and of
    ratio 3/4 to 4/3 in a place at random, another for each image.
    """
    n, draw = len(index), np.random.default_rng(0)
    area, ratio = draw.uniform(0.2, 1, n), np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3), n))
    shape = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=1).clip(max=1)
    start = draw.uniform(size=(n, 2)) * (1 - shape)
    boxes = {
        "centre": np.tile(CENTRE, (n, 1)),
        "whole": np.tile(WHOLE, (n, 1)),
        "random": np.concatenate([start, start + shape], axis=1),
    }
    return {name: localisation(box, index) for name, box in boxes.items()}
