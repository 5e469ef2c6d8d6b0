"""How well scores of classes put images in order: average precision, and accuracies of the best class."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["PRECISIONS", "average_precision", "mean_per_class", "precisions", "top1"]

_Scores: TypeAlias = NDArray[np.floating[Any]]
_Labels: TypeAlias = NDArray[np.integer[Any]]

PRECISIONS = ("map", "map_voc", "map_voc07")
"""Names of the three means over classes, in the order of `average_precision`."""


def average_precision(scores: _Scores, labels: _Labels) -> tuple[float, float, float]:
    """Average precision of one class in three definitions; NaN if no image shows it.

    Args:
        scores: (N,), the higher the likelier. Images with equal scores count together.
        labels: (N,) 1 for images that show the class, 0 for others, -1 for those that are left out.

    Returns:
        The sum of precision times the growth of recall, as scikit-learn has it; the same with the greatest
        precision at this recall or a higher one, as VOC 2010 and the authors of the SVM protocol have it;
        and the mean of this precision at a recall of 0, 0.1, ..., 1, as VOC 2007 has it.
    """
    shown = labels[labels >= 0] == 1
    if not shown.any():
        return np.nan, np.nan, np.nan
    falling = np.argsort(-scores[labels >= 0], kind="stable")
    values, shown = scores[labels >= 0][falling], shown[falling]
    last = np.append(values[1:] != values[:-1], True)  # of images with equal scores
    hits, seen = np.cumsum(shown)[last], np.flatnonzero(last) + 1
    precision = hits / seen
    greatest = np.maximum.accumulate(precision[::-1])[::-1]
    growth = np.diff(hits / hits[-1], prepend=0)
    # In whole numbers: 3 / 10 is less than 3 * 0.1.
    at = [greatest[hits * 10 >= tenths * hits[-1]][0] for tenths in range(11)]
    return float(growth @ precision), float(growth @ greatest), float(np.mean(at))


def precisions(scores: _Scores, labels: _Labels) -> NDArray[np.float64]:
    """(C, 3) `average_precision` of each class, of scores and labels (N, C)."""
    pairs = zip(scores.T, labels.T, strict=True)
    return np.array([average_precision(*pair) for pair in pairs]).reshape(-1, 3)


def top1(scores: _Scores, labels: _Labels) -> float:
    """Share of images whose class, labels (N,), has the greatest of the scores (N, C)."""
    return float((scores.argmax(1) == labels).mean())


def mean_per_class(scores: _Scores, labels: _Labels) -> float:
    """`top1` of the images of each class, and the mean of that over the classes that have images."""
    right = np.bincount(labels, scores.argmax(1) == labels)
    counts = np.bincount(labels)
    return float((right[counts > 0] / counts[counts > 0]).mean())
