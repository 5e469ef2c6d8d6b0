"""From heatmaps to several regions per image, to the saliency of crops, and to the weights of losses.

"Saliency Guided Contrastive Learning on Scene Images" (arXiv 2302.11461) crops salient regions as positive
pairs and weights the losses of crops by saliency, with a map from the model's own output. Its formulas are
not known to us: the ones here are our design, save for the gradient map and the way to boxes, which follow
ContraCAM (arXiv 2108.00049) where the docstrings say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from .coordinates import map_to_view
from .heatmap import activation_map, thresholds, upsample

__all__ = ["LOWEST_TEMPERATURE", "crop_saliency", "gradient_map", "pair_weights", "regions_from_maps"]

LOWEST_TEMPERATURE = 0.002
"""Of `pair_weights`: the weight of a sample of score 0, exp(-1 / T), is still a float64 above 0."""

_GRID = (7, 7)  # samples per crop: the cells of a ResNet's last map of a 224-pixel image

# Cells touch along their edges and within one image only, so that a whole batch is labelled in one call.
_NEIGHBOURS = np.zeros((3, 3, 3), np.bool_)
_NEIGHBOURS[1] = ndimage.generate_binary_structure(2, 1)


def regions_from_maps(
    maps: Tensor,
    k: int,
    threshold: float | Literal["otsu"],
    min_area: float = 0.01,
    expand: float = 0.0,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Up to K boxes per map, one per connected part above the threshold, with their mean saliency.

    As ContraCAM (arXiv 2108.00049) makes its boxes: threshold, parts, least area 1 %, and there a margin of
    0.2. Our choice are parts by edge neighbours (a diagonal does not join), an area that counts the part's
    own cells, and the order: a part weighs the mean of the map in its tight box, and the K heaviest stay,
    heaviest first. Equal weights keep the order from top to bottom and left to right.

    The result is fit for ``RegionTable.update``: boxes have an area, each row a positive sum of weights, and
    a region is drawn in proportion to its weight. Unused slots hold the whole image with weight 0; an image
    without any part holds it once with weight 1. The maps are moved to the CPU, once per call.

    Args:
        maps: (B, h, w) in [0, 1], as from ``activation_map``.
        k: number of slots K.
        threshold: least value, exclusive, of a part's cells; 0 or more, or "otsu", see ``thresholds``.
        min_area: least share of the image's cells that a part must have.
        expand: share of the box's height and width by which each of its four sides moves out, up to the
            image's border. It does not change the weight.
        size: (H, W) to upsample to first, bilinear.

    Returns:
        float32 boxes (B, K, 4) and weights (B, K), on the device of the maps.

    Raises:
        ValueError: maps that are not (B, h, w), k < 1, or a negative threshold or expand.
    """
    if k < 1 or (threshold != "otsu" and threshold < 0) or expand < 0:
        raise ValueError(
            f"Regions cannot be made with k={k}, threshold={threshold} and expand={expand}; give k of at "
            "least 1 and the others of at least 0."
        )
    whole = upsample(maps.detach().cpu(), size)
    values: NDArray[np.float32] = whole.numpy()
    batch, height, width = values.shape
    labels, count = ndimage.label((whole > thresholds(whole, threshold)).numpy(), _NEIGHBOURS)
    shares = np.bincount(labels.ravel(), minlength=count + 1)[1:] / (height * width)
    places = ndimage.find_objects(labels) if count else []  # SciPy's fails on an empty batch
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
    margin = expand * (boxes[..., 2:] - boxes[..., :2])
    boxes += np.concatenate([-margin, margin], axis=-1)
    return (
        torch.from_numpy(boxes.clip(0, 1)).float().to(maps.device),
        torch.from_numpy(weights).float().to(maps.device),
    )


def crop_saliency(maps: Tensor, crops: Tensor, flipped: Tensor) -> Tensor:
    """Mean of a map inside a crop, from samples on a grid of 7 x 7. Does not wait for the device.

    Args:
        maps: (B, h, w) in [0, 1] on the image.
        crops: (B, 4), the view's rectangle, fractions of the image.
        flipped: bool (B,), whether the view was mirrored; the mean is the same.

    Returns:
        float32 (B,).
    """
    return map_to_view(maps, crops, flipped, _GRID).mean((1, 2))


def pair_weights(
    scores: Tensor, temperature: float, mean: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Weights of losses that grow with the saliency of the views compared, without gradient.

    w = exp(s / T) divided by its mean over the batch of all ranks, where s is the product of a sample's
    scores; so the weights' mean over that batch is 1. An infinite temperature gives exactly 1 to each
    sample: the loss as it was.

    Args:
        scores: (B, V), saliency of the V views in [0, 1] (values outside are clipped), or their product (B,).
        temperature: T, of at least ``LOWEST_TEMPERATURE``; ``math.inf`` is allowed.
        mean: average of a tensor over all ranks, whose batches are of equal size; None: one process.

    Returns:
        float32 (B,).

    Raises:
        ValueError: a temperature that is too low, or scores of another shape.
    """
    if not temperature >= LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature} leaves all weight to single samples; give at least "
            f"{LOWEST_TEMPERATURE}, or inf for equal weights."
        )
    if scores.ndim not in (1, 2):
        raise ValueError(f"scores have shape {tuple(scores.shape)}; give (B, V), or (B,).")
    scores = scores.detach().double().clamp(0, 1)
    pairs = scores.prod(1) if scores.ndim == 2 else scores
    # Minus 1, the greatest possible score, because the greatest of all ranks is not at hand.
    powers = ((pairs - 1) / temperature).exp()
    average = powers.mean()
    return (powers / (average if mean is None else mean(average))).float()


def gradient_map(features: Tensor, gradients: Tensor) -> Tensor:
    """Where the features speak for a score: the gradient saliency of ContraCAM (arXiv 2108.00049).

    A channel weighs the spatial mean of its gradient, at least 0; the map is the positive part of the
    weighted sum of channels, min-max normalised per image as in ``activation_map``. One that is constant,
    as where no channel raises the score, is all ones.

    Args:
        features: (B, C, h, w).
        gradients: (B, C, h, w), of the sum of all samples' scores with respect to the features; a common
            factor, such as a loss scale, does not matter.

    Returns:
        float32 (B, h, w) in [0, 1], detached.

    Raises:
        ValueError: the shapes differ or are not (B, C, h, w).
    """
    if features.ndim != 4 or features.shape != gradients.shape:
        raise ValueError(
            f"features {tuple(features.shape)} and gradients {tuple(gradients.shape)} do not match; give "
            "both as (B, C, h, w)."
        )
    weights = gradients.detach().float().mean((2, 3), keepdim=True).clamp(min=0)
    return activation_map(F.relu((weights * features.detach().float()).sum(1, keepdim=True)))
