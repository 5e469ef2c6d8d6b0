"""From maps to the region table: what all guides share that read boxes off maps.

images -> network -> maps -> (average with earlier maps) -> boxes -> region table
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor
from typing_extensions import TypeIs

from dali_views import RegionTable
from dali_views.maps.boxes import CELLS, WIDE, boxes_from_maps, regions_from_maps
from dali_views.regions.queue import UpdateQueue

from .. import config as cfg
from ..encoders.backbones import Backbone
from ..methods import Method
from .encoder_maps import EncoderMaps, Located
from .guide import Training
from .kept_maps import KeptMaps

__all__ = ["areas", "localise", "looking_network", "warn_if_useless", "write"]

_USEFUL = 0.5  # median area that a suggested threshold should not exceed
_LEVELS = tuple(level / 10 for level in range(1, 10))
_SHOWN = 256  # maps that a suggestion is made from


def localise(
    training: Training, network: Method | Backbone, how: cfg.Passes | cfg.FrozenBoxes, regions: RegionTable,
    kept: KeptMaps | None = None,
) -> None:  # fmt: skip
    """One pass over this rank's share of the training images: boxes into the table, equal on all ranks.

    Args:
        kept: maps of earlier passes; if its rate is below 1, boxes are read off the averages.
    """
    encoder_maps = EncoderMaps(training.setting, training.views, how)
    latest = None

    def parts() -> Iterator[Located]:
        nonlocal latest
        for rows, maps in encoder_maps.located(network, training.index, how.map):
            latest, training.found["cell"] = maps, 1 / maps[0].numel()
            if kept is not None:
                kept.put(rows, maps)
                latest = kept.normalised(rows) if kept.rate < 1 else maps
            yield Located(rows, latest)

    write(regions, parts(), how, encoder_maps.shape)
    regions.sync()
    if kept is not None:
        kept.sync()
    if latest is not None:
        warn_if_useless(training, regions, latest, how, encoder_maps.shape)


def write(regions: RegionTable, parts: Iterable[Located], how: cfg.Read, shape: tuple[int, int]) -> None:
    """Read boxes (and weights, if the guide has several regions) off maps (B, h, w); write their rows (B,).

    With `skip_whole` a row whose box is nearly the whole image is left as it was.
    """

    def read() -> Iterator[dict[str, Tensor]]:
        for rows, maps in parts:
            found = {"maps": maps} if _on_host(how) else {"boxes": _read(maps, how, shape)[0]}
            yield {"rows": rows, **found}

    for found in _one_behind(read()):
        rows, boxes, weights = found["rows"], found.get("boxes"), None
        if boxes is None:
            boxes, weights = _read(found["maps"], how, shape)
        if how.skip_whole:
            useful = areas(boxes) <= WIDE
            rows, boxes, weights = rows[useful], boxes[useful], None if weights is None else weights[useful]
        regions.update(rows, boxes, weights)


def _one_behind(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The same on the CPU. The host waits for each when the device has the next one to compute."""
    coming = UpdateQueue()
    for batch in batches:
        yield from (values for values, _ in coming.arrived(wait=True))
        coming.add(batch, 0)
    yield from (values for values, _ in coming.arrived(wait=True))


def _read(maps: Tensor, how: cfg.Read, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    if _has_regions(how):
        return regions_from_maps(maps, how.regions, how.threshold, how.min_area, size=shape)
    assert isinstance(how, cfg.ContrastiveCrop | cfg.FrozenBoxes | cfg.OnlineCrop)
    return boxes_from_maps(maps, how.threshold, shape, how.reading), None


def _has_regions(how: cfg.Read) -> TypeIs[cfg.Saliency | cfg.FrozenBoxes]:
    return isinstance(how, cfg.Saliency) or (isinstance(how, cfg.FrozenBoxes) and how.regions > 1)


def _on_host(how: cfg.Read) -> bool:
    """Whether boxes are those of connected parts, which the host looks for."""
    return _has_regions(how) or getattr(how, "reading", "") == "part"


def areas(boxes: Tensor) -> Tensor:
    """(B,) share of the image that the first box of (B, 4) or (B, K, 4) covers."""
    first = boxes[:, 0] if boxes.ndim == 3 else boxes
    return (first[:, 2:] - first[:, :2]).prod(1)


def looking_network(training: Training, how: cfg.Passes) -> Method | Backbone:
    """Whose maps guide: the method, or its momentum network; a ValueError if it has none."""
    if how.network == "encoder":
        return training.method
    momentum = training.method.momentum_encoder
    if momentum is None:
        name = type(training.method).__name__
        raise ValueError(
            f"{training.section}.network momentum: {name} has no momentum network; set it to encoder"
        )
    return momentum


def warn_if_useless(
    training: Training, regions: RegionTable, maps: Tensor, how: cfg.Read, shape: tuple[int, int]
) -> None:
    """Warn when half of the boxes are nearly the whole image, or smaller than two cells of what the network
    sees, and name a threshold that prevents it.

    Args:
        maps: (B, h, w) some of the maps that were read.
    """
    share, section = np.prod(regions.boxes[:, 0, 2:] - regions.boxes[:, 0, :2], axis=1), training.section
    tiny, levels = CELLS * training.found["cell"], _LEVELS
    if (~regions.written | (share > WIDE)).mean() > 0.5:
        told = f"more than half of the boxes cover over {WIDE:.0%} of their image, so they hardly guide"
    elif (regions.written & (share < tiny)).mean() > 0.5:
        told = (
            f"more than half of the boxes cover less than {tiny:.1%} of their image, {CELLS} cells of the "
            "map, so they may mark noise rather than objects"
        )
        levels = levels[::-1]  # the greatest that is low enough
    else:
        return
    sample = maps[:_SHOWN]
    advice = (
        f"no threshold changes that; set {section}.layer to an earlier one or {section}.size to more pixels"
    )
    several, rectangle = getattr(how, "regions", 1) > 1, getattr(how, "reading", "") == "rectangle"
    for level in () if rectangle and not several else levels:  # a rectangle takes no threshold
        area = float(areas(_read(sample, how.model_copy(update={"threshold": level}), shape)[0]).median())
        if tiny <= area <= _USEFUL:
            advice = f"{section}.threshold={level} gives boxes with a median of {area:.0%} of the image"
            break
    warnings.warn(f"{told}; {advice}", stacklevel=2)
