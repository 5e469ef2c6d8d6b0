"""What a view is: which crop of the image, at which size, under which photometric changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

CROPS = ("random", "contrastive", "inside", "whole", "centre")
GUIDED = ("contrastive", "inside")  # crops that follow the semantic box
FIXED = ("whole", "centre")  # crops that are the same in every epoch
INTERPOLATIONS = ("linear", "cubic")


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of an image. Ranges are (low, high); probabilities lie in [0, 1].

    Photometric operators act in one fixed order: brightness, contrast, saturation, hue, grayscale,
    blur, solarise. (torchvision shuffles the first four per image.)

    Args:
        size: Side of the square view in pixels; with `longest`, its short side.
        crop: How the crop is chosen.

            - ``"random"``: torchvision's RandomResizedCrop.
            - ``"contrastive"``: ContrastiveCrop (arXiv 2202.03278): the centre lies in the sample's
              semantic box, drawn from Beta(alpha, alpha). A sample whose box was never written is cropped
              as by ``"random"``.
            - ``"inside"``: RandomResizedCrop of the semantic box, so that the crop never leaves it by more
              than the rounding to whole pixels. A box that was never written is the whole image, so this crop
              is random, too.
            - ``"whole"``: the whole image, resized to a square without keeping its shape.
            - ``"centre"``: the central square of `centre_share` of the short side (resize and centre
              crop).

        scale: Area of the crop as a share of the image (of the box for ``"inside"``).
        ratio: Width over height of the crop, drawn uniformly in its logarithm.
        alpha: Shape of ``"contrastive"``'s Beta law; below 1 the mass sits at the borders of the box.
        dilate: Height and width of the box are multiplied by this before a guided crop is drawn in it:
            the box grows about its centre and is then cut to the image. 1 is the box itself.
        joint: Beta of JointCrop (see `plan.joint`), which draws the areas of the views 2k and 2k + 1 of a
            sample together; both need the same `joint` and `scale`. None draws every area by itself.
        centre_share: Side of the ``"centre"`` square over the image's short side; 0.875 is Resize(256),
            CenterCrop(224).
        longest: With this the crop keeps its shape, as detectors need it: its short side gets `size`
            pixels, or fewer if its long side would exceed `longest`. The views of a batch are padded with
            zeros at the bottom and at the right to one height and width, multiples of 32; `Batch.shapes`
            has their own. None: resized to a square.
        shorts: Short sides in pixels of which each view gets one, drawn uniformly, in place of `size`.
        partner: Whether the view is cut from the sample's semantic partner, the image that the region table
            names (`RegionTable.update`); a sample that has none is its own partner.
        interpolation: ``"linear"`` or ``"cubic"``, both antialiased when shrinking.
        flip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip, upside down.
        rotate90: Probability of a rotation by 90, 180 or 270 degrees, each equally likely; with 0.75 all four
            orientations are.
        within: Number of an earlier view of the same image. The crop is drawn inside the crop of that
            view, which takes the place of the image: `scale` is a share of its area. That view may lie
            within another one.
        twin_of: Number of an earlier view. This one is that view without colour, grayscale, blur and
            solarise. Crop, flips and rotation are the same. ``View(size=96, twin_of=0)`` takes all but the
            size from the other view.
        jitter: Probability that the four jitters below apply (together).
        brightness: Factor drawn from [max(0, 1 - x), 1 + x].
        contrast: Likewise, about the view's mean grey.
        saturation: Likewise, about each pixel's own grey.
        hue: Turn drawn from [-x, x] of a full circle, x at most 0.5.
        grayscale: Probability of grayscale.
        blur: Probability of a Gaussian blur.
        sigma: Standard deviation of the blur in pixels of the view.
        solarise: Probability that values from 128 on are inverted.
    """

    size: int
    crop: str = "random"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    alpha: float = 0.6
    dilate: float = 1.0
    joint: float | None = None
    centre_share: float = 0.875
    longest: int | None = None
    shorts: tuple[int, ...] = ()
    partner: bool = False
    interpolation: str = "linear"
    flip: float = 0.0
    vflip: float = 0.0
    rotate90: float = 0.0
    within: int | None = None
    twin_of: int | None = None
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that would fail deep inside the graph, or silently mislead."""
        if self.size < 1:
            raise ValueError(f"View size is a number of pixels, at least 1; got {self.size}.")
        for name, choices in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"View {name} {getattr(self, name)!r} is none of {', '.join(choices)}.")
        for name in ("flip", "vflip", "rotate90", "jitter", "grayscale", "blur", "solarise"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"View {name} is a probability in [0, 1]; got {getattr(self, name)}.")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"View {name} is a strength of at least 0; got {getattr(self, name)}.")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"View hue is a share of the colour circle in [0, 0.5]; got {self.hue}.")
        for name in ("scale", "ratio", "sigma"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise ValueError(f"View {name} is a range 0 < low <= high; got ({low}, {high}).")
        if self.scale[1] > 1.0:
            raise ValueError(f"View scale is a share of the image, at most 1; got {self.scale}.")
        if self.alpha <= 0.0:
            raise ValueError(f"View alpha is the parameter of a Beta law, above 0; got {self.alpha}.")
        if not 1.0 <= self.dilate < math.inf:
            raise ValueError(f"View dilate enlarges the box, so it is at least 1; got {self.dilate}.")
        if self.dilate != 1.0 and self.crop not in GUIDED:
            raise ValueError(
                f"View dilate {self.dilate} enlarges a box that crop {self.crop!r} ignores; "
                f"use crop {' or '.join(GUIDED)}, or dilate 1."
            )
        if self.joint is not None and not -10.0 <= self.joint <= 10.0:
            raise ValueError(f"View joint is JointCrop's beta, in [-10, 10], or None; got {self.joint}.")
        if self.joint is not None and self.crop in FIXED:
            raise ValueError(
                f"View joint draws an area, and crop {self.crop!r} has a fixed one; leave it out."
            )
        if self.within is not None and (self.joint is not None or self.crop in GUIDED):
            wrong = f"crop {self.crop!r}" if self.joint is None else f"joint {self.joint}"
            raise ValueError(
                f"View within {self.within} is cut out of another view, and {wrong} is about the image; give "
                "it to that view instead."
            )
        if self.longest is None and self.shorts:
            raise ValueError("View shorts are short sides of views that keep their shape; give longest, too.")
        if self.longest is not None and not 1 <= min(self.shorts, default=self.size) <= self.longest:
            raise ValueError(f"View longest {self.longest} is below the short side; raise it.")
        if self.longest is not None and self.rotate90 > 0.0:
            raise ValueError("View longest keeps the shape, which rotate90 would change; leave one out.")
        if not 0.0 < self.centre_share <= 1.0:
            raise ValueError(f"View centre_share is a share of a side in (0, 1]; got {self.centre_share}.")


def complete(views: Sequence[View]) -> list[View]:
    """The views of a sample, twins with all that they take from others.

    Raises:
        ValueError: views that do not fit each other.
    """
    _check_pairs(views)
    done: list[View] = []
    for number, view in enumerate(views):
        for name in ("within", "twin_of"):
            other = getattr(view, name)
            if other is not None and not 0 <= other < number:
                raise ValueError(
                    f"View {number} has {name} {other}, which is not an earlier view; move it behind."
                )
        if view.twin_of is not None:
            view = _twin(number, view, done[view.twin_of])
        elif view.within is not None and view.partner != done[view.within].partner:
            raise ValueError(
                f"View {number} lies within View {view.within} and so shows the same image; give both the "
                "same partner."
            )
        done.append(view)
    return done


def _twin(number: int, view: View, other: View) -> View:
    root = view.twin_of if other.twin_of is None else other.twin_of
    plain = replace(other, size=view.size, twin_of=root, jitter=0.0, grayscale=0.0, blur=0.0, solarise=0.0)
    if view not in (View(size=view.size, twin_of=view.twin_of), plain):
        raise ValueError(
            f"View {number} is the twin of View {view.twin_of} and takes all but its size from it; give size "
            "and twin_of alone."
        )
    return plain


def _check_pairs(views: Sequence[View]) -> None:
    """Refuse views whose `joint` has no partner with the same law of areas; twins draw none."""
    laws = [
        None if view.joint is None or view.twin_of is not None else (view.joint, view.scale) for view in views
    ]
    for first in range(0, len(laws), 2):
        pair = laws[first : first + 2]
        if any(pair) and (len(pair) < 2 or pair[0] != pair[1]):
            raise ValueError(
                f"View {first} and View {first + 1} draw their areas together; give both the same joint and "
                "scale, or leave joint out."
            )
