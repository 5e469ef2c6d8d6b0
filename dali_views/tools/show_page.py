"""What the loader does, as a page: each image with boxes and crops, its heatmap, its partner, its views."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.index import SampleIndex
from ..loader.batch import Batch
from ..loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ..plan.views import View
from ..regions.table import RegionTable
from .show import BOX_COLOUR, CROP_COLOURS, denormalise, read_image
from .web_page import Outline, document, escape, fitted, jpeg_uri, legend, picture

__all__ = ["name_of", "page"]

_BYTES = 88_000  # of the pictures of a sample: 24 samples stay below 3 MB once they are text
_SIDE = 480  # pixels of a whole image; it is shown at up to 300, and screens have more
_VIEW_SIDE = 224
_LARGE = 3  # bytes of a whole image against those of a view
_TRUE_COLOUR = "#3ddc84"


def page(
    index: SampleIndex,
    batch: Batch,
    views: Sequence[View],
    regions: RegionTable,
    *,
    title: str = "What the loader shows",
    heatmaps: NDArray[np.float32] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> str:
    """HTML with one card per sample; about 120 kB each, at most.

    Args:
        batch: the samples to show, as the loader gave them; views: the loader's; regions: its table.
        heatmaps: (B, h, w) in [0, 1] on the whole image, drawn over it if given.
        mean, std: the loader's normalisation, undone here.
    """
    pixels = [
        np.rint(255 * denormalise(view.float().cpu().numpy(), mean, std)).astype(np.uint8)
        for view in batch.views
    ]
    samples = (
        _sample(index, batch, views, regions, row, [view[row] for view in pixels], heatmaps)
        for row in range(len(batch))
    )
    counted = f"{len(batch)} samples in {len(views)} views. Each crop has the colour of its view."
    body = [f"<h1>{escape(title)}</h1>", f"<p>{counted}</p>", _legend(index, batch, views, regions), *samples]
    return document(title, body)


def _legend(index: SampleIndex, batch: Batch, views: Sequence[View], regions: RegionTable) -> str:
    entries = []
    if regions.written[batch.index.cpu()].any():
        entries.append(("semantic box that guides the crops", BOX_COLOUR, "dashed"))
    if entries and regions.regions > 1:
        entries.append((f"the others of {regions.regions} regions", BOX_COLOUR, "faint"))
    if any(len(index.truth(row)) for row in batch.index.tolist()):
        entries.append(("true boxes", _TRUE_COLOUR, "thin"))
    entries += [(_view_name(views, number), _colour(number), "strong") for number in range(len(views))]
    return legend(entries)


def _sample(
    index: SampleIndex,
    batch: Batch,
    views: Sequence[View],
    regions: RegionTable,
    row: int,
    pixels: list[NDArray[np.uint8]],
    heatmaps: NDArray[np.float32] | None,
) -> str:
    """One card."""
    sample, partner = int(batch.index[row]), int(batch.partner[row])
    crops, flipped = batch.crops[row].tolist(), batch.flipped[row].tolist()
    of_partner = [
        number for number, view in enumerate(views) if view.source == "partner" and partner != sample
    ]
    own = [number for number in range(len(views)) if number not in of_partner]
    share = _BYTES // (_LARGE * (1 + (heatmaps is not None) + bool(of_partner)) + len(views))

    image = read_image(index, sample)
    box = batch.boxes[row].tolist()
    boxes = [*_others(regions, sample, box), Outline(box, BOX_COLOUR, "dashed")]
    if not regions.written[sample]:
        boxes = []
    true = [Outline(each, _TRUE_COLOUR, "thin") for each in index.truth(sample).tolist()]
    drawn = [*true, *boxes, *(Outline(crops[number], _colour(number)) for number in own)]
    figures = [_large(image, share, "image, boxes and crops", drawn)]
    if heatmaps is not None:
        figures.append(_large(_heated(image, heatmaps[row]), share, "heatmap and boxes", [*true, *boxes]))
    if of_partner:
        drawn = []
        if regions.written[partner]:
            drawn += [Outline(each, BOX_COLOUR, "faint") for each in regions.boxes[partner].tolist()]
        drawn += [Outline(crops[number], _colour(number)) for number in of_partner]
        told = f"partner {name_of(index, partner)}{_class(index, partner)}"
        figures.append(_large(read_image(index, partner), share, told, drawn))
    cut, largest = [], max(view.shape[0] for view in pixels)
    for number, view in enumerate(pixels):
        told = f"view {number}" + (", partner" if number in of_partner else "")
        told += ", flipped" if flipped[number] else ""
        shown = picture(jpeg_uri(fitted(view, _VIEW_SIDE), share), view.shape[:2], told)
        caption = f"<figcaption>{told}</figcaption>"
        kind = "view" if view.shape[0] == largest else "view small"
        cut.append(f'<figure class="{kind}" style="--colour:{_colour(number)}">{shown}{caption}</figure>')
    height, width = image.shape[:2]
    weight = f"weight {float(batch.weights[row]):.3g}" if regions.written[sample] else "no box yet"
    facts = f"{weight}{_class(index, sample)}, {height} x {width}"
    if partner != sample and not of_partner:
        facts += f", partner {name_of(index, partner)}"
    return (
        f"<article><h3>{escape(name_of(index, sample))} <small>{escape(facts)}</small></h3>"
        f'<div class="row">{"".join(figures)}<div class="views">{"".join(cut)}</div></div></article>'
    )


def _large(image: NDArray[np.uint8], share: int, told: str, drawn: list[Outline]) -> str:
    uri = jpeg_uri(fitted(image, _SIDE), _LARGE * share)
    shown = picture(uri, image.shape[:2], told, drawn)
    return f'<figure class="large">{shown}<figcaption>{escape(told)}</figcaption></figure>'


def _others(regions: RegionTable, sample: int, chosen: list[float]) -> Iterator[Outline]:
    """The regions of a sample that were not drawn from, in this epoch."""
    for box in regions.boxes[sample].tolist():
        if box != chosen:
            yield Outline(box, BOX_COLOUR, "faint")


def _heated(image: NDArray[np.uint8], heatmap: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image, small, under the colours of a heatmap (h, w)."""
    from matplotlib import colormaps
    from PIL import Image

    under = fitted(image, _SIDE)
    size = (under.shape[1], under.shape[0])
    smooth = Image.fromarray(heatmap.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    colours = 255 * colormaps["inferno"](np.asarray(smooth).clip(0, 1))[..., :3]
    return np.asarray(np.rint(0.45 * under + 0.55 * colours), np.uint8)


def name_of(index: SampleIndex, sample: int) -> str:
    """Path of a sample from the root of its index."""
    return os.path.relpath(index.path(sample), index.root) if index.root else index.path(sample)


def _class(index: SampleIndex, sample: int) -> str:
    label = int(index.labels[sample])
    if label < 0:
        return ""
    return f", class {index.classes[label] if label < len(index.classes) else label}"


def _view_name(views: Sequence[View], number: int) -> str:
    view = views[number]
    return f"view {number} ({view.size} px{', of the partner' if view.source == 'partner' else ''})"


def _colour(number: int) -> str:
    return CROP_COLOURS[number % len(CROP_COLOURS)]
