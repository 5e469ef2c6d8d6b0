"""From features to heatmaps: (B, h, w) float32 in [0, 1], high where the model sees an object.

Nothing here loops over samples or waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .align import Offset, align, map_offset
from .tap import FeatureTap

_ROUNDS = 50  # of power iteration; a second component of 0.9 of the first then has half a percent left


def feature_grid(
    features: Tensor, prefix_tokens: int = 0, grid: tuple[int, int] | None = None, channels_last: bool = False
) -> Tensor:
    """Features as (B, C, h, w), with their graph.

    Args:
        features: (B, C, h, w), or tokens (B, T, C) of a transformer in row order.
        prefix_tokens: number of class and register tokens at the front, which are dropped.
        grid: (h, w) of the tokens; by default a square.
        channels_last: features are (B, h, w, C), as those of timm's Swin.

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


def activations(features: Tensor) -> Tensor:
    """How strongly each position of features (B, C, h, w) responds: float32 (B, h, w), detached.

    Features without negative values, as after a ReLU: the sum over channels (ContrastiveCrop, arXiv
    2202.03278). Signed features, as of transformers and ConvNeXt, cancel in a sum; there it is the norm of
    the position's vector (our choice).
    """
    maps = features.detach().float()
    signed = (maps < 0).flatten(1).any(1)
    return torch.where(signed[:, None, None], maps.norm(dim=1), maps.sum(1))


def activation_map(features: Tensor) -> Tensor:
    """``activations``, then min-max per image (ContrastiveCrop, arXiv 2202.03278): (B, h, w), detached.

    A map that is constant or not finite becomes all ones, so that its box is the whole image.
    """
    return _min_max(activations(features))


def principal_map(features: Tensor) -> Tensor:
    """First principal component of the positions of features (B, C, h, w), then min-max: (B, h, w), detached.

    Our choice. It needs neither a ReLU nor a strong response, and so works with transformers and with
    networks that have learnt little. The sign of the component is chosen: the object lies away from the
    border, so give features of whole images; on a map without inner cells the object is the smaller part. All
    ones if all positions are equal. Single precision, also under autocast.
    """
    with torch.autocast(features.device.type, enabled=False):
        return _principal(features.detach().float())


def _principal(maps: Tensor) -> Tensor:
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


def gradient_map(features: Tensor, gradients: Tensor) -> Tensor:
    """Where the features raise a score: the gradient saliency of ContraCAM (arXiv 2108.00049), detached.

    The weight of a channel is the spatial mean of its gradient, at least 0; the map is the positive part of
    the weighted sum of channels, then min-max as in ``activation_map``.

    Args:
        features: (B, C, h, w).
        gradients: (B, C, h, w), of the sum of all samples' scores with respect to the features; a common
            factor, such as a loss scale, does not matter. A ValueError if their shape is another one.
    """
    if features.ndim != 4 or features.shape != gradients.shape:
        raise ValueError(
            f"features {tuple(features.shape)} and gradients {tuple(gradients.shape)} do not match; give "
            "both as (B, C, h, w)."
        )
    weights = gradients.detach().float().mean((2, 3), keepdim=True).clamp(min=0)
    return activation_map(F.relu((weights * features.detach().float()).sum(1, keepdim=True)))


def upsample(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Maps (B, h, w), else a ValueError, at another resolution (H, W), bilinear, float32; None keeps it."""
    if maps.ndim != 3:
        raise ValueError(f"maps have shape {tuple(maps.shape)}; give (B, h, w), as from activation_map.")
    if size is None:
        return maps.float()
    return F.interpolate(maps.float()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def heatmaps(
    model: nn.Module,
    images: Tensor,
    layer: str,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    kind: Literal["activation", "principal"] = "activation",
    channels_last: bool = False,
    aligned: bool = True,
) -> Tensor:
    """Heatmaps of a batch, (B, h, w): in eval mode, without gradient; all training flags are restored.

    DistributedDataParallel and torch.compile are bypassed: the former would exchange buffers and wait for
    ranks that may not call this, the latter may not see the hook.

    Args:
        model: any module.
        images: (B, 3, H, W), normalised as in training.
        layer, prefix_tokens, grid, channels_last: see ``FeatureTap`` and ``feature_grid``.
        kind: "activation", see ``activation_map``, or "principal", see ``principal_map``.
        aligned: cell (i, j) shows the square [i/h, (i+1)/h) x [j/w, (j+1)/w) of the image, see ``align``.
            False gives the map as the layer has it, as published: an untrained ResNet's lies half a cell off.
            The offset is measured whenever the weights have changed, which takes 96 forward passes.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    read = principal_map if kind == "principal" else activation_map
    with evaluating(model), FeatureTap(model, layer) as tap, torch.no_grad():
        model(images)
        maps = read(feature_grid(tap.features, prefix_tokens, grid, channels_last))
    if not aligned:
        return maps
    return align_maps(maps, layer_offset(model, images, layer, prefix_tokens, grid, channels_last))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def layer_offset(
    model: nn.Module,
    images: Tensor,
    layer: str,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Offset | None:
    """How far the maps of a layer lie beside the image, see ``map_offset``; arguments as of ``heatmaps``."""

    def run(images: Tensor) -> Tensor:
        with FeatureTap(model, layer) as tap:
            model(images)
            # The grid of the tokens is that of images of the given size.
            own = grid if images.shape[1:] == shape else None
            return feature_grid(tap.features, prefix_tokens, own, channels_last)

    shape = images.shape[1:]
    with evaluating(model):
        return map_offset(model, run, images, (layer, prefix_tokens, grid, channels_last))


def align_maps(maps: Tensor, offset: Offset | None) -> Tensor:
    """Maps (B, h, w) in [0, 1] at their places in the image, again from 0 to 1; constant maps stay."""
    if offset is None:
        return maps
    # Interpolation rounds a constant map, and min-max would make a map of the rounding errors.
    constant = maps.amax((1, 2), keepdim=True) == maps.amin((1, 2), keepdim=True)
    return torch.where(constant, maps, _min_max(align(maps, offset)))
