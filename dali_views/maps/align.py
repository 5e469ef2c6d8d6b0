"""Alignment: how far a layer's maps lie beside the image, measured by mirror images, and maps moved back.

A convolution of stride 2, kernel 3 and padding 1 centres output i at input 2 i, not at 2 i + 0.5. After the
stages of a ResNet an object appears almost half a cell below and right of its place:

    image            |  0  |  1  |  2  |  3  |      the object lies in the middle of cell 1
    map as drawn     |  0  |  1  |  2  |  3  |      and appears between cells 1 and 2: offset +0.5
                              ^object ^map

Geometry alone does not tell the offset. Kernels are uneven by chance, and training moves them: a network that
has learnt from mirrored images has learnt to lie right, whatever its padding. So it is measured: an offset
changes its sign in the mirror image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Offset", "align", "map_offset"]

_PROBES = 32  # made-up images; on 64 the result is the same within 0.05 cells
_CELLS = 7  # least cells along a side for a measurement; else larger probes are tried
_FARTHEST = 1.5  # cells
_STEPS = 61
_AGREE = 0.5  # least correlation of the maps of an image and of its mirror image


class Offset(NamedTuple):
    """An object in cell (i, j) of the image appears at (i + y, j + x) of the map; in cells."""

    y: float
    x: float


def align(maps: Tensor, offset: Offset | None) -> Tensor:
    """Maps (B, h, w) moved (cubic) so that cell (i, j) is the square [i/h, (i+1)/h) x [j/w, (j+1)/w).

    Beyond the border the nearest value is repeated. None returns the maps as they are. float32.
    """
    if offset is None:
        return maps.float()
    places = [
        (torch.arange(cells, device=maps.device) + 0.5 + moved) / cells * 2 - 1
        for cells, moved in zip(maps.shape[1:], offset, strict=True)
    ]
    y, x = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack([x, y], -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(
        maps.float()[:, None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )[:, 0]


_known: WeakKeyDictionary[nn.Module, dict[object, tuple[int, Offset | None]]] = WeakKeyDictionary()


def map_offset(
    model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, key: object
) -> Offset | None:
    """The offset of a layer's maps, measured once for each state of the weights.

    How far the features at a place differ from their mean over 32 made-up images is a map. Maps of images
    and of their mirror images, flipped back, lie apart by twice the offset; they correlate best where both
    are moved back by it. Works for any network, trained or not (ours).

    Args:
        model: the network, in eval mode; neither compiled nor wrapped.
        run: images (B, C, H, W) -> features (B, C', h, w) of the layer.
        images: a batch of inputs, of which only shape and device count; the network sees made-up ones in the
            type of its weights, because autocast, under which the images may have another type, is off.
        key: what tells this layer from other layers of the model.

    Returns:
        None, after a warning that says why: mirror images are seen otherwise (correlation below 0.5), or the
        map has fewer than 7 cells along a side and the network takes no larger images.
    """
    found = _known.setdefault(model, {})
    key = (key, *images.shape[1:])
    weights = (*model.parameters(), *model.buffers())
    kind = next((each.dtype for each in weights if each.is_floating_point()), images.dtype)
    state = sum(0 if each.is_inference() else each._version for each in weights)
    if found.get(key, (None,))[0] != state:
        try:
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                offset, reason = _measure(run, images[:1].to(kind))
        except Exception as error:  # a ViT takes images of one size only; others may fail on made-up ones
            offset, reason = None, f"{type(error).__name__}: {error}".split("\n")[0]
        if offset is None:
            warnings.warn(
                f"Maps of {type(model).__name__} are not aligned with the image ({reason}); boxes may be up "
                "to half a cell off.",
                stacklevel=3,
            )
        found[key] = state, offset
    return found[key][1]


def _measure(run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Offset | None, str]:
    channels, height, width = images.shape[1:]
    blank = run(images.new_zeros(1, channels, height, width))
    # The offset in cells hardly depends on the size of the image.
    scale = -(-_CELLS // min(blank.shape[2:]))
    probes = _probes(channels, height * scale, width * scale).to(images)
    maps = _response(run(probes))
    flipped = [_response(run(probes.flip(axis + 1))).flip(axis) for axis in (1, 2)]
    (y, agree_y), (x, agree_x) = (
        _best(maps, other, axis) for other, axis in zip(flipped, (1, 2), strict=True)
    )
    agree = min(agree_y, agree_x)
    if not agree >= _AGREE:
        return None, f"it sees mirror images otherwise, with a correlation of {agree:.2f}"
    return Offset(y, x), ""


def _probes(channels: int, height: int, width: int) -> Tensor:
    """(32, C, H, W) clouds with three discs each, of mean 0 and deviation about 1; always the same."""
    draw = torch.Generator().manual_seed(0)
    side = 2
    images = torch.zeros(_PROBES, channels, height, width)
    while side <= min(height, width):
        noise = torch.randn(_PROBES, channels, side, side, generator=draw) / side
        images += F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False)
        side *= 2
    images /= images.std((1, 2, 3), keepdim=True) * 2
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    for _ in range(3):
        centre, radius = (
            torch.rand(2, _PROBES, 1, 1, generator=draw),
            torch.rand(_PROBES, 1, 1, generator=draw),
        )
        disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (0.04 + 0.1 * radius) ** 2
        colour = 1.5 * torch.randn(_PROBES, channels, 1, 1, generator=draw)
        images = torch.where(disc[:, None], colour, images)
    return images


def _response(features: Tensor) -> Tensor:
    """(B, h, w) how much each place differs from its mean over the images, of mean 0 and deviation 1."""
    maps: Tensor = (features.float() - features.float().mean(0)).norm(dim=1)
    deviation, mean = torch.std_mean(maps, (1, 2), keepdim=True)
    maps = (maps - mean) / deviation.clamp(min=1e-6)
    maps -= maps.mean(0)  # without what all have in common, such as borders
    return maps


def _best(maps: Tensor, flipped: Tensor, axis: int) -> tuple[float, float]:
    """The offset along an axis at which maps of images and of mirror images agree most, and how much."""
    steps = torch.linspace(-_FARTHEST, _FARTHEST, _STEPS)
    inner = slice(1, -1)  # the border repeats values
    scores = []
    for step in steps.tolist():
        one, other = (
            align(each, Offset(*(sign * step if axis == along else 0.0 for along in (1, 2))))[:, inner, inner]
            for each, sign in ((maps, 1), (flipped, -1))
        )
        one, other = (each - each.mean((1, 2), keepdim=True) for each in (one, other))
        scores.append((one * other).mean() / (one.square().mean() * other.square().mean()).sqrt())
    found = torch.stack(scores).cpu()
    best = int(found.argmax())
    if not 0 < best < _STEPS - 1:
        return float(steps[best]), 0.0  # no maximum inside
    left, top, right = found[best - 1 : best + 2].tolist()
    between = 0.5 * (left - right) / (left - 2 * top + right)  # the vertex of the parabola
    return float(steps[best] + between * (steps[1] - steps[0])), top
