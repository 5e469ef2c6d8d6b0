"""The draw: every crop, flip and colour parameter of every view of a batch, in NumPy.

A plan is a pure function of (seed, epoch, sample, view number, the sample's region). It does not depend on
the process or the time that computes it, nor on the other samples of the batch. The DALI graph executes the
plan and draws nothing itself.

A `"contrastive"` crop (ContrastiveCrop, arXiv 2202.03278, section 3.3):

    image
    +---------------------------+     1. Height and width of the crop are drawn: area and ratio.
    |                           |     2. Its centre (+) is drawn in the semantic box, per axis by
    |    box                    |        Beta(alpha, alpha) between the box's two edges.
    |    +-------------+        |     3. A crop that leaves the image is pushed back: the first
    |    |     crop    |        |        and the last start that the box allows are clipped to
    |    |     +.......|.....+  |        [0, room] before the draw, room = image - crop.
    |    |     :     + |     :  |
    |    +-----:-------+     :  |     An `"inside"` crop is RandomResizedCrop with the box in
    |          +.............+  |     place of the image: the crop never leaves the box.
    +---------------------------+

`View.dilate` enlarges the box about its centre and cuts it to the image before all this. `View.joint` draws
the areas of two views together (`joint`). `View.within` puts another view's crop in the place of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from . import rng
from .joint import joint_shares
from .orientation import U8, axes, backwards, draw_orientation
from .views import View

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

TRIES = 10  # torchvision's RandomResizedCrop and ContrastiveCrop alike
LUMA: F64 = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in PIL and torchvision
_GREY: F64 = np.full((3, 3), 1.0 / 3.0)  # projection of RGB on its grey axis
_QUARTER_TURN: F64 = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3.0)

# Slots of a view's key, one per quantity: a new quantity does not change the numbers of the others.
# `orientation` has 0 and 10 to 12.
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SIGMA, _SOLARISE = range(1, 10)
_Y, _Y2, _X, _X2, _SHORT = range(32, 37)
_SHAPE = 64  # and the two slots per try from there on: area, ratio
_EDGE = 1e-4  # pixels by which a float32 fraction may miss the edge of the pixel that it was made from


@dataclass(frozen=True)
class ViewPlan:
    """What the graph does for one view of B samples."""

    start: F32
    """(B, 2) y, x in pixels of the image where the view's first row and column begin."""
    end: F32
    """(B, 2) y, x where its last row and column end; an axis that is mirrored runs backwards."""
    axes: F32
    """(B, 2, 3) map of the view's x, y after that: swapped for 90 and 270 degrees; see `orientation`."""
    shape: F32
    """(B, 2) whole numbers: height and width of the view in pixels."""
    matrix: F32
    """(B, 3, 3) linear map of RGB: brightness, contrast, saturation, hue and grayscale in one."""
    pivot: F32
    """(B, 3) factor of the view's grey mean, added after the map: the fixed point of contrast."""
    sigma: F32
    """(B,) standard deviation of the blur in pixels of the view; 0.01 without a blur."""
    window: I32
    """(B,) odd number of taps of the blur, three sigma on each side; 1 is no blur."""
    solarise: NDArray[np.int16]
    """(B,) values from here on are inverted; 256 is never."""

    def part(self, rows: slice) -> ViewPlan:
        """The plan of some of the samples."""
        return ViewPlan(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Samples:
    """B samples that views are cut from, each with the region that guides its views."""

    rows: I64
    """(B,) rows in the SampleIndex."""
    sizes: I32
    """(B, 2) height and width in pixels."""
    boxes: F32
    """(B, 4) the semantic box."""
    weights: F32
    """(B,) its saliency weight."""
    written: Bool
    """(B,) False while the model has written no box: guided crops then fall back to random ones."""


@dataclass(frozen=True)
class Plan:
    """What is done to B samples: the parameters of V views, and what the trainer is told about them."""

    index: I64
    """(B,) rows in the SampleIndex."""
    crops: F32
    """(B, V, 4) y0, x0, y1, x1 as fractions of the image that the view was cut from."""
    flipped: Bool
    """(B, V)"""
    rotated: U8
    """(B, V) see `orientation`."""
    boxes: F32
    """(B, 4) the semantic box that guided the sample's views."""
    weights: F32
    """(B,) its saliency weight."""
    partner: I64
    """(B,) row that views with `partner` are cut from."""
    views: list[ViewPlan]


def draw(views: Sequence[View], samples: Samples, partners: Samples, *, seed: int, epoch: int) -> Plan:
    """Draw the plan of a batch of V `complete` views; those with `partner` are cut from `partners`.

    The rows of `samples` key all random numbers.
    """
    batch = len(samples.rows)
    crops = np.empty((batch, len(views), 4), np.float32)
    flipped, rotated = np.empty((batch, len(views)), np.bool_), np.empty((batch, len(views)), np.uint8)
    plans: dict[int, ViewPlan] = {}
    rectangles: dict[int, F64] = {}
    # Equal views are drawn together: a batch is bound by NumPy's cost per call, not per number.
    for view in dict.fromkeys(views):
        numbers = [v for v, other in enumerate(views) if other == view]
        # A twin has the number of its view in all keys.
        drawn = numbers if view.twin_of is None else [view.twin_of] * len(numbers)
        keys = rng.keys(seed, epoch, samples.rows[None, :], np.array(drawn)[:, None]).ravel()
        cut = partners if view.partner else samples
        size = np.tile(cut.sizes, (len(numbers), 1)).astype(np.int64)
        box = np.tile(cut.boxes, (len(numbers), 1)).astype(np.float64)
        share = joint_shares(view, samples.rows, drawn, seed, epoch)
        whole = np.concatenate([np.zeros_like(size), size], axis=1)
        if view.within is not None:
            whole = np.tile(rectangles[view.within], (len(numbers), 1)).astype(np.int64)
        inner = whole[:, 2:] - whole[:, :2]
        rectangle = crop_rectangles(view, keys, inner, box, np.tile(cut.written, len(numbers)), share)
        rectangle += np.tile(whole[:, :2], 2)
        flip, rotate = draw_orientation(view, keys)
        together = _view_plan(view, keys, rectangle, flip, rotate)
        fractions = (rectangle / np.tile(size, 2)).astype(np.float32)
        for place, number in enumerate(numbers):
            rows = slice(place * batch, (place + 1) * batch)
            rectangles[number], crops[:, number] = rectangle[rows], fractions[rows]
            flipped[:, number], rotated[:, number] = flip[rows], rotate[rows]
            plans[number] = together.part(rows)
    return Plan(
        index=samples.rows,
        crops=crops,
        flipped=flipped,
        rotated=rotated,
        boxes=samples.boxes,
        weights=samples.weights,
        partner=partners.rows,
        views=[plans[number] for number in range(len(views))],
    )


def crop_rectangles(
    view: View, keys: rng.Keys, size: I64, box: F64, written: Bool, share: F64 | None = None
) -> F64:
    """(B, 4) crops y0, x0, y1, x1 in whole pixels, from keys (B,), sizes (B, 2) and boxes (B, 4).

    `share` (B,) fixes the areas of crops, which are otherwise drawn.
    """
    zero = np.zeros_like(size)
    if view.crop == "whole":
        return np.concatenate([zero, size], axis=1).astype(np.float64)
    if view.crop == "centre":
        short = np.minimum(size[:, :1], size[:, 1:])
        side = np.maximum(np.rint(short * view.centre_share), 1.0).astype(np.int64)
        start = (size - side) // 2
        return np.concatenate([start, start + side], axis=1).astype(np.float64)
    if view.dilate != 1.0:
        grow = 0.5 * (view.dilate - 1.0) * (box[:, 2:] - box[:, :2])
        box = np.clip(box + np.concatenate([-grow, grow], axis=1), 0.0, 1.0)
    if view.crop == "inside":
        # The box in whole pixels, at least one pixel wide, is the image that RandomResizedCrop sees.
        low: I64 = np.minimum(np.floor(size * box[:, :2] + _EDGE).astype(np.int64), size - 1)
        high = np.maximum(np.ceil(size * box[:, 2:] - _EDGE).astype(np.int64), low + 1)
        rectangle = _random_resized_crop(view, keys, high - low, share)
        return rectangle + np.tile(low, 2)
    if view.crop == "contrastive" and written.any():
        guided = _random_resized_crop(view, keys, size, share, box)
        if written.all():
            return guided
        return np.where(written[:, None], guided, _random_resized_crop(view, keys, size, share))
    return _random_resized_crop(view, keys, size, share)


def _random_resized_crop(
    view: View, keys: rng.Keys, size: I64, share: F64 | None, centres: F64 | None = None
) -> F64:
    """RandomResizedCrop of torchvision: ten tries of area and ratio, then the central crop.

    With boxes (B, 4) of crop centres it is ContrastiveCrop, which differs only in the place of an accepted
    rectangle (as in its public code).
    """
    crop, accepted = _crop_shapes(view, keys, size, share)
    room = size - crop
    y_u, y2_u, x_u, x2_u = rng.uniform(keys, np.array([[_Y], [_Y2], [_X], [_X2]]))
    u = np.array([y_u, x_u]).T
    if centres is None:
        start = np.floor(u * (room + 1)).astype(np.int64)
    else:
        # The box bounds the crop's centre; only then is the crop pushed back into the image.
        corners = np.floor(centres.reshape(-1, 2, 2) * size[:, None] + _EDGE).astype(np.int64)
        corners -= crop[:, None] // 2
        first, final = np.clip(corners, 0, room[:, None]).transpose(1, 0, 2)
        place = rng.symmetric_beta(u, np.array([y2_u, x2_u]).T, view.alpha)
        start = first + np.trunc((final - first) * place).astype(np.int64)
    start = np.where(accepted[:, None], start, room // 2)
    return np.concatenate([start, start + crop], axis=1).astype(np.float64)


def _crop_shapes(view: View, keys: rng.Keys, size: I64, share: F64 | None) -> tuple[I64, Bool]:
    """(B, 2) height and width of the first of ten tries that fits, else of the central crop; (B,) whether
    a try fitted."""
    crop, accepted = _tries(view, keys, size, share, 0, 1)
    pending = np.flatnonzero(~accepted)
    if len(pending):
        # Few samples need the other nine tries, which are computed in one go.
        left = None if share is None else share[pending]
        crop[pending], accepted[pending] = _tries(view, keys[pending], size[pending], left, 1, TRIES)
        pending = np.flatnonzero(~accepted)
        crop[pending] = _central_shape(view, size[pending])
    return crop, accepted


def _tries(
    view: View, keys: rng.Keys, size: I64, share: F64 | None, first: int, stop: int
) -> tuple[I64, Bool]:
    """(B, 2) height and width of the first try in range(first, stop) that fits; (B,) whether one did.

    With a `share` (B,) tries differ in the ratio alone, as in JointCrop's code.
    """
    slots = _SHAPE + 2 * np.arange(first, stop)[:, None]
    low, high = np.log(view.ratio[0]), np.log(view.ratio[1])
    if share is None:
        share = view.scale[0] + (view.scale[1] - view.scale[0]) * rng.uniform(keys, slots)
    root_ratio = np.exp(0.5 * (low + (high - low) * rng.uniform(keys, slots + 1)))
    root_area = np.sqrt((size[:, 0] * size[:, 1]) * share)
    height, width = np.rint(root_area / root_ratio), np.rint(root_area * root_ratio)
    fits = (height > 0) & (height <= size[:, 0]) & (width > 0) & (width <= size[:, 1])
    choice, rows = fits.argmax(axis=0), np.arange(len(size))
    return np.array([height[choice, rows], width[choice, rows]]).T.astype(np.int64), fits[choice, rows]


def _central_shape(view: View, size: I64) -> I64:
    """(B, 2) torchvision's fallback: the largest central crop whose ratio lies in the allowed range."""
    height, width = size[:, 0], size[:, 1]
    shape = width / height
    crop_h = np.where(shape < view.ratio[0], np.rint(width / view.ratio[0]), height)
    crop_w = np.where(shape > view.ratio[1], np.rint(height * view.ratio[1]), width)
    return np.clip(np.array([crop_h, crop_w], np.int64).T, 1, None)


def _shapes(view: View, keys: rng.Keys, rectangle: F64) -> F64:
    """(B, 2) height and width of the views of crops (B, 4); rounded as detectron2 rounds them."""
    if view.longest is None:
        return np.full((len(rectangle), 2), view.size, np.float64)
    shorts = np.array(view.shorts or (view.size,), np.float64)
    short = shorts[(rng.uniform(keys, _SHORT) * len(shorts)).astype(np.int64)]
    sides = rectangle[:, 2:] - rectangle[:, :2]
    factor = np.minimum(short / sides.min(axis=1), view.longest / sides.max(axis=1))
    shapes: F64 = np.maximum(np.floor(sides * factor[:, None] + 0.5), 1.0)
    return shapes


def _view_plan(view: View, keys: rng.Keys, rectangle: F64, flip: Bool, rotate: U8) -> ViewPlan:
    """The crop as drawn, and the colour parameters, neutral where an operator does not apply."""
    back = backwards(flip, rotate)
    start, end = rectangle[:, :2].astype(np.float32), rectangle[:, 2:].astype(np.float32)
    start[back], end[back] = end[back], start[back]

    u = rng.uniform(keys, np.arange(_JITTER, _SOLARISE + 1)[:, None])
    jitter, brightness_u, contrast_u, saturation_u, hue_u, gray, blur, sigma_u, invert = u
    jittered = jitter < view.jitter

    def factor(strength: float, u: F64) -> F64:
        low = max(0.0, 1.0 - strength)
        return np.where(jittered, low + (1.0 + strength - low) * u, 1.0)

    brightness = factor(view.brightness, brightness_u)
    contrast = factor(view.contrast, contrast_u)
    saturation = saturation_matrix(factor(view.saturation, saturation_u))
    grayscale = saturation_matrix(np.where(gray < view.grayscale, 0.0, 1.0))
    hue = np.where(jittered, view.hue * (2.0 * hue_u - 1.0), 0.0)
    # The last factor acts first.
    matrix = (brightness * contrast)[:, None, None] * (grayscale @ hue_matrix(hue) @ saturation)
    # Contrast c scales about the grey mean of the brightened image, b m: it adds (1 - c) b m to each
    # channel. The operators after it do not change greys, so this sum passes through them.
    pivot = np.repeat((brightness * (1.0 - contrast))[:, None], 3, axis=1)

    blurred = blur < view.blur
    sigma = np.where(blurred, view.sigma[0] + (view.sigma[1] - view.sigma[0]) * sigma_u, 0.01)
    return ViewPlan(
        start=start,
        end=end,
        axes=axes(rotate),
        shape=_shapes(view, keys, rectangle).astype(np.float32),
        matrix=matrix.astype(np.float32),
        pivot=pivot.astype(np.float32),
        sigma=sigma.astype(np.float32),
        window=np.where(blurred, 2 * np.ceil(3.0 * sigma) + 1, 1).astype(np.int32),
        solarise=np.where(invert < view.solarise, 128, 256).astype(np.int16),
    )


def saturation_matrix(factor: F64) -> F64:
    """(B, 3, 3) blend of the image with its luma: factor 0 is grayscale, 1 the identity."""
    return factor[:, None, None] * np.eye(3) + (1.0 - factor)[:, None, None] * np.tile(LUMA, (3, 1))


def hue_matrix(turn: F64) -> F64:
    """(B, 3, 3) rotation of RGB about its grey axis by `turn` full circles."""
    angle = 2.0 * np.pi * turn[:, None, None]
    return _GREY + np.cos(angle) * (np.eye(3) - _GREY) + np.sin(angle) * _QUARTER_TURN
