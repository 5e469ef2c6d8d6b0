"""Orientation: flips and rotations by right angles, as two numbers per view.

A view is its crop, mirrored left to right if `flipped`, and then rotated counter-clockwise by `rotated` right
angles: `torch.rot90(view, rotated, (-2, -1))`. The eight pairs are all orientations of a square; a vertical
flip is a horizontal one and a rotation by 180 degrees:

    crop        flipped     flipped, rotated 2      flipped, rotated 1
    a b         b a         c d                     a c
    c d         d c         a b                     b d

The resize mirrors either axis at no cost, by a range that runs backwards. So the graph needs an operator for
90 and 270 degrees alone, which swaps the axes of the result: rot90 is a mirror image, transposed.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import rng
from .views import View

Bool: TypeAlias = NDArray[np.bool_]
U8: TypeAlias = NDArray[np.uint8]

# Slots of a view's key, see `draw`.
_FLIP, _VFLIP, _ROTATE, _ANGLE = 0, 10, 11, 12
_AXES = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 0]]], np.float32)


def draw_orientation(view: View, keys: rng.Keys) -> tuple[Bool, U8]:
    """`flipped` and `rotated`, each of the shape of keys (B,)."""
    flip, vflip, rotate, angle = rng.uniform(keys, np.array([[_FLIP], [_VFLIP], [_ROTATE], [_ANGLE]]))
    upside_down = vflip < view.vflip
    quarters = np.where(rotate < view.rotate90, 1.0 + np.floor(3.0 * angle), 0.0) + 2.0 * upside_down
    return (flip < view.flip) ^ upside_down, (quarters % 4.0).astype(np.uint8)


def backwards(flipped: Bool, rotated: U8) -> Bool:
    """(B, 2) whether the resize runs backwards along y, x of the crop; before the axes are swapped."""
    return np.stack([rotated >= 2, flipped ^ ((rotated == 1) | (rotated == 2))], axis=1)


def axes(rotated: U8) -> NDArray[np.float32]:
    """(B, 2, 3) affine maps of a view's x, y: swapped where it is rotated by 90 or 270 degrees."""
    return _AXES[rotated % 2]
