"""Between view and image coordinates: project boxes and maps by the crop and flip of each view in a batch.

::

    image, fractions 0 ... 1           view of it, not flipped      flipped: x becomes 1 - x
    +----------------------------+
    |      crop (y0, x0)         |     (0, 0)                       (0, 1)
    |      +--------------+      |     +-----------------+          +-----------------+
    |      |    +-box-+   |      |     |      +-box--+   |          |   +-box--+      |
    |      |    +-----+   |      |     |      +------+   |          |   +------+      |
    |      +--------------+      |     +-----------------+          +-----------------+
    |                 (y1, x1)   |                  (1, 1)                       (1, 0)
    +----------------------------+

A map divides its image, or its view, into h x w equal cells; the value of a cell belongs to its centre,
((i + 0.5) / h, (j + 0.5) / w). Rectangles are (y0, x0, y1, x1) fractions, float32. Nothing here loops over
samples or waits for the device. Shapes that do not fit each other raise a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def boxes_to_view(boxes: Tensor, crops: Tensor, flipped: Tensor, clip: bool = False) -> Tensor:
    """Project boxes (B, 4) on the image to a view: float32 (B, 4), without ``clip`` maybe outside [0, 1].

    Args:
        crops: (B, 4), the view's rectangle, fractions of the image.
        flipped: bool (B,), whether the view was mirrored left to right.
        clip: cut the boxes to the view; one that lies outside becomes empty.
    """
    boxes, crops, flipped = _aligned(boxes, crops, flipped)
    origin, extent = _split(crops)
    view = _mirror((boxes - origin) / extent, flipped)
    return view.clamp(0, 1) if clip else view


def boxes_to_image(boxes: Tensor, crops: Tensor, flipped: Tensor, clip: bool = False) -> Tensor:
    """Project boxes on a view back to the image: the inverse of ``boxes_to_view``, same arguments."""
    boxes, crops, flipped = _aligned(boxes, crops, flipped)
    origin, extent = _split(crops)
    image = _mirror(boxes, flipped) * extent + origin
    return image.clamp(0, 1) if clip else image


def map_to_view(maps: Tensor, crops: Tensor, flipped: Tensor, size: tuple[int, int]) -> Tensor:
    """Project maps (B, H, W) on the image to a view: float32 (B, h, w), sampled at the view's cell centres.

    Bilinear between cell centres; within half a cell of the image's border the border cell's value is used.

    Args:
        crops, flipped: see ``boxes_to_view``.
        size: (h, w) of the result.
    """
    maps, crops, flipped = _aligned(maps, crops, flipped, ndim=3)
    y0, x0, y1, x1 = crops[:, :, None].unbind(1)
    u = _centres(size[1], maps).expand(len(maps), -1)
    u = torch.where(flipped[:, None], 1 - u, u)
    return _sample(maps, y0 + _centres(size[0], maps) * (y1 - y0), x0 + u * (x1 - x0))


def map_to_image(
    view_maps: Tensor, crops: Tensor, flipped: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Project maps (B, h, w) on a view back to the image.

    Args:
        crops, flipped: see ``boxes_to_view``.
        size: (H, W) of the result.

    Returns:
        float32 maps (B, H, W), sampled as in ``map_to_view``, and bool covered (B, H, W): whether the cell's
        centre lies in the crop (y0 <= y < y1). Cells that are not covered hold 0.
    """
    maps, crops, flipped = _aligned(view_maps, crops, flipped, ndim=3)
    y0, x0, y1, x1 = crops[:, :, None].unbind(1)
    y, x = _centres(size[0], maps), _centres(size[1], maps)
    covered = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]
    u = (x - x0) / (x1 - x0)
    u = torch.where(flipped[:, None], 1 - u, u)
    return torch.where(covered, _sample(maps, (y - y0) / (y1 - y0), u), 0.0), covered


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of box pairs (B, 4), (B, 4) -> float32 (B,); 0 where both are empty."""
    a, b = a.float(), b.float().to(a.device)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (a, b)]
    union = areas[0] + areas[1] - overlap
    return torch.where(union > 0, overlap / torch.where(union > 0, union, 1), 0.0)


def _aligned(values: Tensor, crops: Tensor, flipped: Tensor, ndim: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 values, crops and bool flips on the device of the values; their shapes are checked."""
    if values.ndim != ndim:
        name = "boxes" if ndim == 2 else "maps"
        raise ValueError(f"{name} have shape {tuple(values.shape)}; give {ndim} dimensions, the batch first.")
    batch = len(values)
    if crops.shape != (batch, 4) or flipped.shape != (batch,) or (ndim == 2 and values.shape[1] != 4):
        raise ValueError(
            f"Shapes {tuple(values.shape)}, crops {tuple(crops.shape)} and flipped {tuple(flipped.shape)} do "
            "not match; take one view, as in crops[:, v] (B, 4) and flipped[:, v] (B,)."
        )
    return values.float(), crops.to(values.device, torch.float32), flipped.to(values.device, torch.bool)


def _split(crops: Tensor) -> tuple[Tensor, Tensor]:
    origin, end = crops[:, :2], crops[:, 2:]
    return origin.repeat(1, 2), (end - origin).repeat(1, 2)


def _mirror(boxes: Tensor, flipped: Tensor) -> Tensor:
    y0, x0, y1, x1 = boxes.unbind(1)
    return torch.where(flipped[:, None], torch.stack([y0, 1 - x1, y1, 1 - x0], 1), boxes)


def _centres(n: int, like: Tensor) -> Tensor:
    return (torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / n


def _sample(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of (B, H, W) maps at fractions y (B, h) and x (B, w)."""
    shape = (len(maps), y.shape[1], x.shape[1])
    points = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1)
    grid = 2 * points - 1  # align_corners=False puts -1 and 1 on the outer edges, as fractions 0 and 1
    sampled = F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)
    return sampled[:, 0]
