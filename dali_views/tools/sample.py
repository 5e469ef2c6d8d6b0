"""One drawing of a sample: its image with boxes and crops, its heatmap, its partner and its views. It becomes
pixels (PNG, TensorBoard) by `sheet` and HTML by `page`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..data.index import SampleIndex
from ..loader.batch import Batch
from ..loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ..plan.views import View
from ..regions.table import RegionTable
from .pack.image import as_stored

BOX_COLOUR, TRUE_COLOUR = "#ffffff", "#3ddc84"
CROP_COLOURS = ("#ff5a36", "#22a7f0", "#f7ca18", "#2ecc71", "#d45bff", "#00d0c4", "#ff8fb1", "#b8e986",
                "#c0a080", "#7f8cff")  # fmt: skip
INFERNO = ("#000004", "#57106e", "#bc3754", "#f98e09", "#fcffa4")


class Outline(NamedTuple):
    """A rectangle on a picture: y0, x0, y1, x1 as fractions of it, and what it means."""

    box: Sequence[float]
    colour: str
    style: Literal["strong", "dashed", "thin", "faint"]
    meaning: str


class Picture(NamedTuple):
    """An RGB image with outlines over it and, if it has a colour, in a frame."""

    image: Image.Image
    caption: str
    outlines: list[Outline]
    frame: str = ""


class Drawing(NamedTuple):
    """A sample: whole images (itself, its heatmap, its partner), and its views."""

    name: str
    facts: str
    images: list[Picture]
    views: list[Picture]


def drawings(
    index: SampleIndex, batch: Batch, views: Sequence[View], regions: RegionTable, *,
    heatmaps: NDArray[np.float32] | None = None, mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> list[Drawing]:  # fmt: skip
    """Draw a batch with its loader's views, region table and normalisation, which is undone. Heatmaps are
    (B, h, w) in [0, 1] on the whole images."""
    pixels = [view.float().cpu().permute(0, 2, 3, 1).numpy() for view in batch.views]
    pixels = [np.rint(255 * (np.array(std) * view + mean).clip(0, 1)).astype(np.uint8) for view in pixels]
    drawn = []
    for row, (sample, partner) in enumerate(zip(batch.index.tolist(), batch.partner.tolist(), strict=True)):
        true = [Outline(box, TRUE_COLOUR, "thin", "true boxes") for box in index.truth(sample).tolist()]
        boxes = [*true, *_boxes(regions, sample, batch.boxes[row].tolist())]
        own, on_partner, cut = [*boxes], _boxes(regions, partner), []
        for number, view in enumerate(views):
            elsewhere = view.partner and partner != sample
            colour = CROP_COLOURS[number % len(CROP_COLOURS)]
            told = f"view {number} ({view.size} px{', of the partner' * view.partner})"
            crop = Outline(batch.crops[row, number].tolist(), colour, "strong", told)
            (on_partner if elsewhere else own).append(crop)
            told = f"view {number}{', partner' * elsewhere}{', flipped' * bool(batch.flipped[row, number])}"
            told += f", rotated {90 * angle}" if (angle := int(batch.rotated[row, number])) else ""
            cut.append(Picture(Image.fromarray(pixels[number][row]), told, [], colour))
        image = read_image(index, sample)
        images = [Picture(image, "image, boxes and crops", own)]
        if heatmaps is not None:
            images.append(Picture(_heated(image, heatmaps[row]), "heatmap and boxes", boxes))
        if any(view.partner for view in views) and partner != sample:
            told = f"partner {name_of(index, partner)}{class_of(index, partner)}"
            images.append(Picture(read_image(index, partner), told, on_partner))
        weight = f"weight {float(batch.weights[row]):.3g}" if regions.written[sample] else "no box yet"
        facts = f"{weight}{class_of(index, sample)}, {image.height} x {image.width}"
        drawn.append(Drawing(name_of(index, sample), facts, images, cut))
    return drawn


def _boxes(regions: RegionTable, sample: int, chosen: Any = None) -> list[Outline]:
    """The boxes of a sample in the table; the chosen one, which the crops were drawn from, stands out."""
    boxes = regions.boxes[sample].tolist() if regions.written[sample] else []
    found = [Outline(box, BOX_COLOUR, "faint", "other semantic boxes") for box in boxes if box != chosen]
    if boxes and chosen:
        found.append(Outline(chosen, BOX_COLOUR, "dashed", "semantic box that guides the crops"))
    return found


def _heated(image: Image.Image, heatmap: NDArray[np.float32]) -> Image.Image:
    """The image under the colours of a heatmap (h, w)."""
    smooth = Image.fromarray(heatmap.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.blend(image, Image.fromarray(ramp(np.asarray(smooth), INFERNO)), 0.55)


def ramp(values: NDArray[Any], stops: Sequence[str]) -> NDArray[np.uint8]:
    """Colours (..., 3) of values in [0, 1], interpolated between evenly spaced stops."""
    places, levels = np.linspace(0, 1, len(stops)), np.array([ImageColor.getrgb(stop) for stop in stops])
    return np.stack([np.interp(values, places, level) for level in levels.T], -1).astype(np.uint8)


def read_image(index: SampleIndex, row: int) -> Image.Image:
    """The stored image in RGB; EXIF orientation is not applied, as in the loader."""
    if index.arrays is not None:
        return Image.fromarray(np.asarray(index.arrays[row]))
    with Image.open(io.BytesIO(index.encoded(row))) as image:
        return as_stored(image)[0].convert("RGB")


def name_of(index: SampleIndex, row: int) -> str:
    """Path of a sample, relative to the root of its index."""
    return os.path.relpath(index.path(row), index.root) if index.root else index.path(row)


def class_of(index: SampleIndex, row: int) -> str:
    """The class of a sample, to follow its name; empty if it has none."""
    label = int(index.labels[row])
    return f", class {index.classes[label] if label < len(index.classes) else label}" if label >= 0 else ""


def sheet(lines: Sequence[tuple[str, Sequence[Picture]]], side: int = 200) -> Image.Image:
    """Lines of pictures under their titles; each picture fits a square of `side` pixels above its caption."""
    step, text, font = side + 8, 18, ImageFont.load_default(12)
    columns, height = max(len(pictures) for _, pictures in lines), side + 3 * text
    paper = Image.new("RGB", (step * columns, height * len(lines)), "white")
    for row, (title, pictures) in enumerate(lines):
        words = [(title, 0, 0, step * columns)]
        for column, picture in enumerate(pictures):
            paper.paste(_painted(picture, side), (column * step, row * height + text))
            words.append((picture.caption, column * step, side + text, side))
        for told, left, top, width in words:
            plain = told.encode(errors="replace").decode()  # without the broken bytes of a file name
            while len(plain) > 4 and font.getlength(plain) > width:
                plain = f"...{plain[4:]}"  # numbers come last in names
            ImageDraw.Draw(paper).text((left + 2, row * height + top + 2), plain, "black", font)
    return paper


def _painted(picture: Picture, side: int) -> Image.Image:
    scale = side / max(picture.image.size)
    size = [max(1, round(scale * length)) for length in picture.image.size]
    how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS  # smoothing would blur them
    pixels = np.array(picture.image.resize(size, how))
    height, width = pixels.shape[:2]
    stripes = np.add.outer(np.arange(height), np.arange(width)) // 6 % 2 == 0
    frame = [Outline((0, 0, 1, 1), picture.frame, "strong", "")] if picture.frame else []
    for line in [*picture.outlines, *frame]:
        y0, x0, y1, x1 = np.rint(np.multiply(line.box, 2 * [height, width])).astype(int).tolist()
        thick = 1 if line.style in ("thin", "faint") else 2
        drawn = np.zeros((height, width), bool)
        drawn[y0:y1, x0:x1] = True
        drawn[y0 + thick : max(y1 - thick, 0), x0 + thick : max(x1 - thick, 0)] = False
        pixels[drawn] = 0
        pixels[drawn & stripes if line.style == "dashed" else drawn] = ImageColor.getrgb(line.colour)
    return Image.fromarray(pixels)
