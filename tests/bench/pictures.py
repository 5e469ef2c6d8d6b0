"""The pictures of README.md and docs: the hero, boxes over a run, and the loop with the names of the folders.

python tests/bench/pictures.py            # draws them from results/pictures.json, which picture_run.py writes
python tests/bench/pictures.py --check    # fails if that would change anything

Scenes are drawn anew: they are a function of their number. Each picture is made for a light and a dark page.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import svg
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont
from svg import PICTURES, ROOT, Theme, words

from dali_views.tools.sample import INFERNO, ramp
from dali_views.tools.scenes import draw_scene
from trainers.demo import SMALL

RECORD = ROOT / "tests" / "bench" / "results" / "pictures.json"
WIDE, GAP, LETTER = 1280, 24, 42  # pixels; letters have 11 on a telephone's page of 360
CLOSE = 3.0  # levels, the mean difference at which two pictures are the same: libraries differ in rounding
_SHOWN = (0, 1, 2, 4, 7)  # passes of the strip


def hero(theme: Theme, record: dict[str, Any]) -> Image.Image:
    """One scene: its heatmap, its box, two random and two guided crops."""
    found, last = record["scenes"][0], record["scenes"][0]["passes"][-1]
    image = scene(found["scene"])
    heated = warm(image, last["map"])
    three, four = (WIDE - 2 * GAP) // 3, (WIDE - 3 * GAP) // 4
    top, low = LETTER + 20, LETTER + 20 + three + 40
    paper = Image.new("RGB", (WIDE, low + LETTER + 20 + four + LETTER + 26), theme.page)
    draw = ImageDraw.Draw(paper)
    crops = {"random": record["crops"]["random"], "guided": record["crops"]["contrastive"]}
    colours = {"random": "#ff8c42", "guided": "#58a6ff"}
    first = [
        ("image, random crops", image, [(crop, colours["random"], False) for crop in crops["random"]]),
        ("what the model sees", heated, []),
        ("its box, guided crops", heated, [(last["box"], "#ffffff", True)]),
    ]
    first[2] = (
        first[2][0],
        image,
        [*((crop, colours["guided"], False) for crop in crops["guided"]), *first[2][2]],
    )
    for column, (title, picture, outlines) in enumerate(first):
        left = column * (three + GAP)
        write(draw, left, 0, title, theme.ink)
        paper.paste(outlined(picture, three, outlines), (left, top))
    for group, (kind, both) in enumerate(crops.items()):
        left = group * 2 * (four + GAP)
        share = record["both_show"]["random" if kind == "random" else "contrastive"]
        write(draw, left, low, f"{kind} crops", theme.ink)
        write(draw, left, low + top + four + 8, f"both show the object: {share:.0%}", theme.quiet)
        for number, crop in enumerate(both):
            panel = outlined(cut(image, crop), four, [((0, 0, 1, 1), colours[kind], False)])
            paper.paste(panel, (left + number * (four + GAP), low + top))
    return paper


def strip(theme: Theme, record: dict[str, Any]) -> Image.Image:
    """The box of two scenes after passes of the guide, on what the model saw there; true boxes in green."""
    side = (WIDE - GAP * (len(_SHOWN) - 1)) // len(_SHOWN)
    line = LETTER + 16
    paper = Image.new("RGB", (WIDE, line + 2 * (side + line) + 8), theme.page)
    draw = ImageDraw.Draw(paper)
    for column, number in enumerate(_SHOWN):
        left = column * (side + GAP)
        write(draw, left, 0, f"epoch {number}" if number else "untrained", theme.ink)
        for row, found in enumerate(record["scenes"][::-1]):
            look, top = found["passes"][number], line + row * (side + line + 8)
            outlines = [(found["true"], "#3ddc84", False), (look["box"], "#ffffff", True)]
            paper.paste(outlined(warm(scene(found["scene"]), look["map"]), side, outlines), (left, top))
            write(draw, left, top + side + 6, f"IoU {look['iou']:.2f}", theme.quiet)
    return paper


def scene(number: int) -> Image.Image:
    """Scene `number` of the demo."""
    return Image.fromarray(draw_scene(0, number, 128, share=SMALL, objects=(1, 1)).image)


def warm(image: Image.Image, heatmap: Sequence[Sequence[float]]) -> Image.Image:
    """An image under the colours of a heatmap (h, w) in [0, 1]."""
    values = np.array(heatmap, np.float32)
    low, high = values.min(), values.max()
    smooth = Image.fromarray((values - low) / max(high - low, 1e-6)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    return Image.blend(image, Image.fromarray(ramp(np.asarray(smooth).clip(0, 1), INFERNO)), 0.6)


def cut(image: Image.Image, crop: Sequence[float]) -> Image.Image:
    """The part of an image in a rectangle y0, x0, y1, x1 of fractions, made square as a view is."""
    (height, width), (y0, x0, y1, x1) = image.size[::-1], crop
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    return image.resize((256, 256), Image.Resampling.BICUBIC, box=box)


def outlined(image: Image.Image, side: int, outlines: Sequence[tuple[Any, str, bool]]) -> Image.Image:
    """The image as a square of `side` pixels under rectangles (box, colour, whether dashed)."""
    panel = image.resize((side, side), Image.Resampling.BICUBIC)
    stripes = Image.fromarray(
        (np.add.outer(np.arange(side), np.arange(side)) // 14 % 2 * 255).astype(np.uint8)
    )
    for box, colour, dashed in outlines:
        y0, x0, y1, x1 = (round(edge * (side - 1)) for edge in box)
        edge = side // 80
        whole = min(y0, x0) == 0 and max(y1, x1) == side - 1  # a frame needs no black around it
        for thick, ink in (
            ((edge, colour),) if whole else ((3 * edge - 2 * (edge // 2), "#000000"), (edge, colour))
        ):
            grown = (thick - edge) // 2
            mask = Image.new("L", (side, side))
            ImageDraw.Draw(mask).rectangle(
                (x0 - grown, y0 - grown, x1 + grown, y1 + grown), outline=255, width=thick
            )
            if dashed and ink == colour:
                mask = ImageChops.multiply(mask, stripes)
            panel.paste(ImageColor.getrgb(ink), mask=mask)
    return panel


def write(draw: ImageDraw.ImageDraw, left: float, top: float, text: str, colour: str) -> None:
    """A line of text."""
    draw.text((left, top), text, colour, ImageFont.load_default(LETTER))


def loop(theme: Theme) -> str:
    """From the data to the trainer and back, with the names of the folders."""
    wide, high, gap = 192, 84, 32
    x, y = [column * (wide + gap) for column in range(3)], [4 + row * (high + 52) for row in range(3)]
    nodes = [
        (0, 0, "data/", "which images", "there are"), (1, 0, "plan/", "NumPy draws", "the crops"),
        (2, 0, "graph/", "DALI decodes", "and cuts"), (2, 1, "loader/", "batches in", "exact order"),
        (2, 2, "trainers/", "a step of", "training"), (1, 2, "maps/", "heatmaps", "to boxes"),
        (0, 2, "regions/", "the table: boxes,", "weights"),
    ]  # fmt: skip
    guided = ("plan/", "maps/", "regions/")
    ends = (("end", theme.quiet), ("back", theme.ours))
    parts = ["<defs>", *(_arrow(name, colour) for name, colour in ends), "</defs>"]
    centre, right, middle = x[1] + wide / 2, x[2] + wide / 2, [top + high / 2 for top in y]
    plain = [
        f"M{x[0] + wide} {middle[0]}H{x[1] - 4}", f"M{x[1] + wide} {middle[0]}H{x[2] - 4}",
        f"M{right} {y[0] + high}V{y[1] - 4}", f"M{right} {y[1] + high}V{y[2] - 4}",
    ]  # fmt: skip
    back = [
        f"M{x[2]} {middle[2]}H{x[1] + wide + 4}", f"M{x[1]} {middle[2]}H{x[0] + wide + 4}",
        f"M{wide / 2} {y[2]}V{middle[1]}H{centre}V{y[0] + high + 5}",
    ]  # fmt: skip
    for (name, colour), paths in zip(ends, (plain, back), strict=True):
        parts += [svg.stroke(path, colour, 2.5, f'marker-end="url(#{name})"') for path in paths]
    parts.append(words(wide / 2 + 10, middle[1] + 24, "read once an epoch", theme.quiet, 19))
    for column, row, name, first, second in nodes:
        left, top = x[column], y[row]
        edge = f'stroke="{theme.ours if name in guided else theme.line}" stroke-width="2"'
        parts.append(svg.box(left + 1, top, wide - 2, high, theme.fill, 8, edge))
        parts.append(words(left + 14, top + 29, name, theme.ink, 21, bold=True, mono=True))
        for down, told in ((53, first), (74, second)):
            parts.append(words(left + 14, top + down, told, theme.quiet, 18.5))
    told = (
        "The loop: data, plan, graph, loader, trainers, maps, regions and back to plan. The model in "
        "training writes boxes into the table of regions, which the plan reads once an epoch to draw crops."
    )
    return svg.document(y[2] + high + 4, told, parts)


def _arrow(name: str, colour: str) -> str:
    """The head of an arrow."""
    size = 'markerWidth="10" markerHeight="10" markerUnits="userSpaceOnUse" orient="auto"'
    head = f'<path d="M0 0L10 5L0 10z" fill="{colour}"/>'
    return f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" {size}>{head}</marker>'


def drawn() -> Iterator[tuple[str, Image.Image]]:
    """Name and pixels of every picture that is no SVG."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for name, draw in (("hero", hero), ("boxes", strip)):
        for theme in svg.THEMES:
            yield f"{name}-{theme.name}.webp", draw(theme, record)


def differs(name: str, image: Image.Image) -> bool:
    """Whether a stored picture is missing or another one: in its size, or in its pixels beyond rounding."""
    if not (PICTURES / name).is_file():
        return True
    with Image.open(PICTURES / name) as stored:
        if stored.size != image.size:
            return True
        again = Image.open(io.BytesIO(encoded(image))).convert("RGB")
        apart = np.asarray(stored.convert("RGB"), np.float32) - np.asarray(again, np.float32)
    return float(np.abs(apart).mean()) > CLOSE


def encoded(image: Image.Image) -> bytes:
    """The bytes of a picture's file."""
    stored = io.BytesIO()
    image.save(stored, "WEBP", quality=82, method=6)
    return stored.getvalue()


def main(check: bool) -> int:
    """Write what is missing or another, or with `check` name it."""
    found = svg.stale(svg.both("loop", loop), check)
    for name, image in drawn():
        if differs(name, image):
            found.append(name)
            if not check:
                (PICTURES / name).write_bytes(encoded(image))
    print("\n".join(found))
    return check and bool(found)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
