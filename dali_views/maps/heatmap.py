"""From feature maps to heatmaps and boxes.

Rectangles are (y0, x0, y1, x1) fractions, float32. Nothing here loops over samples or waits for the device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tap import FeatureTap

__all__ = [
    "activation_map",
    "activations",
    "boxes_from_maps",
    "feature_grid",
    "heatmaps",
    "principal_map",
    "thresholds",
    "upsample",
]

_ROUNDS = 50  # of power iteration; a second component of 0.9 of the first is then down to half a percent


def feature_grid(
    features: Tensor,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Feature maps with their channels in front, a transformer's tokens at their places in the image.

    Args:
        features: (B, C, h, w), or tokens (B, T, C) of a transformer in row order.
        prefix_tokens: class and register tokens in front, dropped (tokens only).
        grid: (h, w) of the tokens; without it they must form a square (tokens only).
        channels_last: maps are (B, h, w, C), as those of timm's Swin; the shape does not tell.

    Returns:
        (B, C, h, w), with its graph.

    Raises:
        ValueError: the shape or the number of tokens does not fit.
    """
    if features.ndim == 4:
        if prefix_tokens or grid is not None:
            raise ValueError(
                f"prefix_tokens and grid are for tokens (B, T, C), not for {tuple(features.shape)}."
            )
        return features.permute(0, 3, 1, 2) if channels_last else features
    if features.ndim == 3:
        tokens = features.shape[1] - prefix_tokens
        side = math.isqrt(max(tokens, 0))
        height, width = grid or (side, side)
        if prefix_tokens < 0 or tokens < 1 or height * width != tokens:
            raise ValueError(
                f"{features.shape[1]} tokens with prefix_tokens={prefix_tokens} do not form a grid of "
                f"{height} x {width}; set prefix_tokens (class and register tokens) or grid=(h, w)."
            )
        return features[:, prefix_tokens:].transpose(1, 2).reshape(len(features), -1, height, width)
    raise ValueError(f"features have shape {tuple(features.shape)}; give (B, C, h, w) or tokens (B, T, C).")


def activations(
    features: Tensor,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """How strongly each position of each image responds.

    The sum over channels (ContrastiveCrop, arXiv 2202.03278) of features that are nowhere negative, as after
    a ReLU. Of signed features, as of transformers and ConvNeXt, the sum says nothing, for their channels
    cancel; there it is the length of the position's vector (our choice).

    Args:
        features, prefix_tokens, grid, channels_last: see ``feature_grid``, which also raises its errors.

    Returns:
        float32 (B, h, w), detached.
    """
    maps = feature_grid(features.detach(), prefix_tokens, grid, channels_last).float()
    signed = (maps < 0).flatten(1).any(1)
    return torch.where(signed[:, None, None], maps.norm(dim=1), maps.sum(1))


def activation_map(
    features: Tensor,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """``activations``, then per-image min-max (ContrastiveCrop, arXiv 2202.03278).

    A map that is constant or not finite becomes all ones, so that its box is the whole image.

    Args:
        features, prefix_tokens, grid, channels_last: see ``feature_grid``, which also raises its errors.

    Returns:
        float32 (B, h, w) in [0, 1], detached.
    """
    return _min_max(activations(features, prefix_tokens, grid, channels_last))


def principal_map(
    features: Tensor,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """What most tells the positions of an image apart: their first principal component, then min-max (ours).

    Needs no ReLU and no strong response, so that it works with transformers and networks that have learnt
    little. The component has no sign by itself: the object is taken to lie away from the border, and on a map
    without inner cells to be the smaller part.

    Args:
        features, prefix_tokens, grid, channels_last: see ``feature_grid``, which also raises its errors; of
            whole images, for a crop may have its object at the border.

    Returns:
        float32 (B, h, w) in [0, 1], detached; all ones where all positions are equal.
    """
    maps = feature_grid(features.detach(), prefix_tokens, grid, channels_last).float()
    height, width = maps.shape[2:]
    points = maps.flatten(2)
    points = points - points.mean(2, keepdim=True)
    points = points / points.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    axis = points @ points.norm(dim=1)[:, :, None]
    for _ in range(_ROUNDS):
        axis = F.normalize(points @ (points.transpose(1, 2) @ axis), dim=1)
    places = (points.transpose(1, 2) @ axis).view(-1, height, width)
    if min(height, width) > 2:
        inner = places[:, 1:-1, 1:-1].mean((1, 2))
        object_side = inner - places.mean((1, 2))
    else:
        object_side = places.pow(3).mean((1, 2))
    return _min_max(torch.where((object_side < 0)[:, None, None], -places, places))


def _min_max(maps: Tensor) -> Tensor:
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    usable = (span > 0) & span.isfinite()
    return torch.where(usable, (maps - low) / torch.where(usable, span, 1), 1.0)


def upsample(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Maps (B, h, w) at another resolution, bilinear: float32 (B, H, W); without a size as they are.

    Raises:
        ValueError: the maps do not have three dimensions.
    """
    if maps.ndim != 3:
        raise ValueError(f"maps have shape {tuple(maps.shape)}; give (B, h, w), as from activation_map.")
    if size is None:
        return maps.float()
    return F.interpolate(maps.float()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def thresholds(maps: Tensor, threshold: float | Literal["otsu"]) -> Tensor:
    """The level of each map that tells the object from the rest, (B, 1, 1).

    "otsu" chooses it per map so that the values above and below differ most (Otsu 1979): maps whose values
    all lie high, as a transformer's, then still have a box. A map of one value has nothing above.

    Args:
        maps: (B, h, w).
        threshold: k, the same for all, or "otsu".
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
    # The value below the cut, not the middle, so that equal values never fall on both sides.
    return values.gather(1, cut)[:, :, None].float()


def boxes_from_maps(
    maps: Tensor, threshold: float | Literal["otsu"] = 0.1, size: tuple[int, int] | None = None
) -> Tensor:
    """One tight box per map: rows and columns whose maximum exceeds the threshold.

    As the authors' code does (ContrastiveCrop, arXiv 2202.03278, ``update_box``), with one deliberate
    difference: the box ends at the far edge of its last row and column, (last + 1) / H; theirs ends at
    last / H and loses that cell. A map with nothing above the threshold gives the whole image. Their 0.1
    suits well-trained networks that end in a ReLU; maps of others have a higher floor, and a threshold that
    does not follow it makes every box the whole image: give "otsu".

    Args:
        maps: (B, h, w) in [0, 1], as from ``activation_map``.
        threshold: k, or "otsu", see ``thresholds``.
        size: (H, W) to upsample to first, bilinear; the authors use the network's input size.

    Returns:
        float32 (B, 4).

    Raises:
        ValueError: the maps do not have three dimensions.
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


def heatmaps(
    model: nn.Module,
    images: Tensor,
    layer: str,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    kind: Literal["activation", "principal"] = "activation",
    channels_last: bool = False,
) -> Tensor:
    """Maps of a batch in eval mode without gradient; every module's training flag is restored.

    DistributedDataParallel and torch.compile are bypassed: the former would exchange buffers, which
    waits for ranks that may not be here, the latter may not see the hook.

    Args:
        model: any module.
        images: (B, 3, H, W), normalised as in training.
        layer, prefix_tokens, grid, channels_last: see ``FeatureTap`` and ``feature_grid``.
        kind: "activation", see ``activation_map``, or "principal", see ``principal_map``.

    Returns:
        float32 (B, h, w) in [0, 1].
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with FeatureTap(model, layer) as tap, torch.no_grad():
            model(images)
            read = principal_map if kind == "principal" else activation_map
            return read(tap.features, prefix_tokens, grid, channels_last)
    finally:
        for module, training in flags:
            module.training = training
