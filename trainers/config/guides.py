"""Who writes the region table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Count, CountOrZero, Section, Share


class NoGuide(Section):
    """Nobody writes the region table: boxes stay the whole image."""

    name: Literal["none"] = "none"


class ContrastiveCrop(Section):
    """Boxes from the encoder's own activation maps, arXiv 2202.03278."""

    name: Literal["contrastive_crop"] = "contrastive_crop"
    warmup: CountOrZero = 20
    """Epochs before the first boxes."""
    interval: Count = 20
    """Epochs between box updates."""
    threshold: Share = 0.1
    """Share of the min-max normalised map above which a pixel belongs to the object."""
    layer: str | None = None
    """Dotted name of the module whose output is the map; absent: the backbone's last spatial one."""
    size: Count | None = None
    """Pixels to which the whole image is squashed before it is localised; absent: the size of the views."""


class SimCCrop(Section):
    """One fixed centre box for all images from the first epoch on, arXiv 2202.03278."""

    name: Literal["simccrop"] = "simccrop"
    box: tuple[Share, Share, Share, Share] = (0.25, 0.25, 0.75, 0.75)
    """y0, x0, y1, x1 as fractions of the image."""


Guide = Annotated[NoGuide | ContrastiveCrop | SimCCrop, Field(discriminator="name")]
