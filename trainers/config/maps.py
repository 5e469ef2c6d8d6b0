"""Which map of the encoder tells where the object is."""

from __future__ import annotations

from typing import Literal, TypeAlias

from .section import Count, Section

__all__ = ["Localise", "MapKind", "Maps"]

MapKind: TypeAlias = Literal["activation", "principal", "gradient"]


class Maps(Section):
    """Where maps come from, whoever uses them."""

    layer: str | None = None
    """Dotted name of the module whose output is the map; absent: the backbone's last spatial one."""
    size: Count | None = None
    """Pixels to which the whole image is squashed before it is localised; absent: the size of the views."""


class Localise(Maps):
    """How evaluations ask the encoder where the object is; the same whatever guides the crops."""

    map: Literal["activation", "principal"] = "activation"
    """activation: how strongly each position responds (ContrastiveCrop, arXiv 2202.03278); principal: the
    first principal component of an image's positions (ours)."""
