"""Between view and image coordinates: project boxes and maps by crop, flip and rotation of each view.

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

Then a view is rotated counter-clockwise by `rotated` right angles, as by `torch.rot90`; leave `rotated` out
where no view is.

A map divides its image, or its view, into h x w equal cells; the value of a cell belongs to its centre,
((i + 0.5) / h, (j + 0.5) / w). Rectangles are (y0, x0, y1, x1) fractions, float32. Nothing here loops over
samples or waits for the device. Shapes that do not fit each other raise a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def boxes_to_view(
    boxes: Tensor, crops: Tensor, flipped: Tensor, clip: bool = False, rotated: Tensor | None = None
) -> Tensor:
    """Project boxes (B, 4) on the image to a view: float32 (B, 4), without ``clip`` maybe outside [0, 1].

    Args:
        crops: (B, 4), the view's rectangle, fractions of the image.
        flipped: bool (B,), whether the view was mirrored left to right.
        clip: cut the boxes to the view; one that lies outside becomes empty.
        rotated: uint8 (B,), right angles by which it was then rotated; None: by none.
    """
    boxes, crops, mirrored, aside = _aligned(boxes, crops, flipped, rotated)
    origin, extent = _split(crops)
    corners = _mirror(((boxes - origin) / extent).view(len(boxes), 2, 2), mirrored)
    view = _swap(corners, aside).flatten(1)
    return view.clamp(0, 1) if clip else view


def boxes_to_image(
    boxes: Tensor, crops: Tensor, flipped: Tensor, clip: bool = False, rotated: Tensor | None = None
) -> Tensor:
    """Project boxes on a view back to the image: the inverse of ``boxes_to_view``, same arguments."""
    boxes, crops, mirrored, aside = _aligned(boxes, crops, flipped, rotated)
    origin, extent = _split(crops)
    corners = _swap(boxes.view(len(boxes), 2, 2), aside)
    image = _mirror(corners, mirrored).flatten(1) * extent + origin
    return image.clamp(0, 1) if clip else image


def map_to_view(
    maps: Tensor, crops: Tensor, flipped: Tensor, size: tuple[int, int], rotated: Tensor | None = None
) -> Tensor:
    """Project maps (B, H, W) on the image to a view: float32 (B, h, w), sampled at the view's cell centres.

    Bilinear between cell centres; within half a cell of the image's border the border cell's value is used.

    Args:
        crops, flipped, rotated: see ``boxes_to_view``.
        size: (h, w) of the result.
    """
    maps, crops, mirrored, aside = _aligned(maps, crops, flipped, rotated, ndim=3)
    points = _swap(_centres(size, maps), aside)
    points = torch.where(mirrored[:, None], 1 - points, points)
    return _sample(maps, crops[:, None, :2] + points * (crops[:, 2:] - crops[:, :2])[:, None], size)


def map_to_image(
    view_maps: Tensor, crops: Tensor, flipped: Tensor, size: tuple[int, int], rotated: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Project maps (B, h, w) on a view back to the image.

    Args:
        crops, flipped, rotated: see ``boxes_to_view``.
        size: (H, W) of the result.

    Returns:
        float32 maps (B, H, W), sampled as in ``map_to_view``, and bool covered (B, H, W): whether the cell's
        centre lies in the crop (y0 <= y < y1). Cells that are not covered hold 0.
    """
    maps, crops, mirrored, aside = _aligned(view_maps, crops, flipped, rotated, ndim=3)
    origin, end = crops[:, None, :2], crops[:, None, 2:]
    points = _centres(size, maps)
    covered = ((points >= origin) & (points < end)).all(2).view(len(crops), *size)
    points = (points - origin) / (end - origin)
    points = _swap(torch.where(mirrored[:, None], 1 - points, points), aside)
    return torch.where(covered, _sample(maps, points, size), 0.0), covered


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of box pairs (B, 4), (B, 4) -> float32 (B,); 0 where both are empty."""
    a, b = a.float(), b.float().to(a.device)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (a, b)]
    union = areas[0] + areas[1] - overlap
    return torch.where(union > 0, overlap / torch.where(union > 0, union, 1), 0.0)


def _aligned(
    values: Tensor, crops: Tensor, flipped: Tensor, rotated: Tensor | None, ndim: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float32 values and crops, and the orientation, on the device of the values; shapes are checked.

    A view is the crop, mirrored along y, x where `mirrored` (B, 2), and with swapped axes where `aside` (B,).
    """
    if values.ndim != ndim:
        name = "boxes" if ndim == 2 else "maps"
        raise ValueError(f"{name} have shape {tuple(values.shape)}; give {ndim} dimensions, the batch first.")
    batch = len(values)
    turns = torch.zeros_like(flipped, dtype=torch.uint8) if rotated is None else rotated
    wrong = crops.shape != (batch, 4) or (ndim == 2 and values.shape[1] != 4)
    if wrong or flipped.shape != (batch,) or turns.shape != (batch,):
        raise ValueError(
            f"Shapes {tuple(values.shape)}, crops {tuple(crops.shape)}, flipped {tuple(flipped.shape)} and "
            f"rotated {tuple(turns.shape)} do not match; take one view, as in crops[:, v] (B, 4), "
            "flipped[:, v] and rotated[:, v] (B,)."
        )
    flipped, turns = flipped.to(values.device, torch.bool), turns.to(values.device)
    mirrored = torch.stack([turns >= 2, flipped ^ ((turns == 1) | (turns == 2))], 1)
    return values.float(), crops.to(values.device, torch.float32), mirrored, turns % 2 == 1


def _split(crops: Tensor) -> tuple[Tensor, Tensor]:
    origin, end = crops[:, :2], crops[:, 2:]
    return origin.repeat(1, 2), (end - origin).repeat(1, 2)


def _mirror(corners: Tensor, mirrored: Tensor) -> Tensor:
    """Corners (B, 2, 2) of boxes; the mirror image of the last is the first."""
    return torch.where(mirrored[:, None], 1 - corners.flip(1), corners)


def _swap(points: Tensor, aside: Tensor) -> Tensor:
    """Points (B, N, 2), y and x swapped where `aside`."""
    return torch.where(aside[:, None, None], points.flip(2), points)


def _centres(size: tuple[int, int], like: Tensor) -> Tensor:
    """(1, h * w, 2) y, x of all cells."""
    y, x = ((torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / n for n in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(1, -1, 2)


def _sample(maps: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Values (B, h, w) of (B, H, W) maps at the fractions y, x of points (B, h * w, 2)."""
    grid = (
        2 * points.flip(2).view(len(points), *size, 2) - 1
    )  # fractions 0 and 1 are -1 and 1 without align_corners
    sampled = F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)
    return sampled[:, 0]
