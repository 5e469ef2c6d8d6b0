"""Generated scenes: objects of known class at known boxes on a busy background.

For the demo, the tests and experiments: no download, made in seconds, small enough to train on in minutes.
The class is in shape and texture alone. Colours, sizes, places and backgrounds are random, so neither a
colour histogram nor a crop beside the object reveals it.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .command_line import Answer

EXAMPLES = """
dali-views scenes scenes --count 1000
dali-views scenes scenes --size 128 --share 0.03 0.08 --objects 1 1
"""
Array: TypeAlias = NDArray[np.floating[Any]]
Share: TypeAlias = tuple[float, float] | None
Number: TypeAlias = tuple[int, int] | None


class Scene(NamedTuple):
    """One scene with all that is known about it."""

    image: NDArray[np.uint8]
    """(H, W, 3)"""
    background: NDArray[np.uint8]
    """(H, W, 3), the same without the objects."""
    boxes: NDArray[np.int64]
    """(n, 4) y0, x0, y1, x1 in pixels, y1 and x1 exclusive; each holds its object tightly."""
    kind: str
    """Class of all objects in the scene."""
    masks: NDArray[np.bool_]
    """(n, H, W) the pixels of each object."""


def _star(u: Array, v: Array) -> Array:
    # One tenth of the star is a straight edge from its tip (radius 1) to its notch (radius 0.42).
    angle = np.abs((np.arctan2(u, v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
    normal = np.array([notch_y, 1 - notch_x]) / np.hypot(notch_y, 1 - notch_x)
    distance: Array = (x - 1) * normal[0] + y * normal[1]
    return distance


def _cross(u: Array, v: Array) -> Array:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.95, b - 0.3), np.maximum(b - 0.95, a - 0.3))


_half, _slope = np.float32(0.5), np.float32(0.866)  # as Python floats they would make doubles of some arrays
# Distance to the edge, negative inside, of a shape about as large as the unit circle.
_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.76) - 0.24,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.7,
    "triangle": lambda u, v: np.maximum(np.abs(u) * _slope + v * _half, -v) - 0.5,
    "cross": _cross,
    "star": _star,
}
# Share of the first of two tones.
_TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "striped": lambda u, v: np.asarray(np.sin(u * np.float32(9.5)) > 0, np.float32),
    "checkered": lambda u, v: np.asarray((np.floor(u * 2.6) + np.floor(v * 2.6)) % 2, np.float32),
}
CLASSES = (*_SHAPES, "striped disc", "checkered square")
"""All classes, in the order of their labels."""
_SMALLEST = 4.0  # radius in pixels below which textures and shapes cannot be told apart
_WIDEST = 0.46  # radius as a share of the picture's short side


def _colour(rng: np.random.Generator) -> Array:
    hue, saturation, value = rng.random(), rng.uniform(0.15, 1), rng.uniform(0.2, 1)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255


def _muted(rng: np.random.Generator) -> Array:
    """A colour nearer to middle grey than `_colour` gives."""
    return 0.4 * _colour(rng) + np.float32(0.6 * 120)


def _background(rng: np.random.Generator, height: int, width: int, clutter: float, scale: float) -> Array:
    """(H, W, 3) muted clouds of two colours, faint stripes, and clutter smaller than any object.

    It has less contrast than the objects, as in a photograph that is focused on its subject. Otherwise the
    background alone distinguishes images, and a network need not look at the objects.

    `rng` draws the shapes of clutter 1 even if fewer are shown, and a child of it those beyond them, so the
    rest of the scene does not depend on `clutter`. `scale` multiplies the lengths of the shapes.
    """
    cells = rng.integers(2, 6)
    mix = rng.random((cells, cells, 1), np.float32)
    coarse = _muted(rng) * mix + _muted(rng) * (1 - mix) + rng.normal(0, 8, (cells, cells, 3))
    cloud = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    soft = cloud.resize((width, height), Image.Resampling.BICUBIC)
    short, usual = min(height, width), int(rng.integers(2, 7))
    shown, more = round(clutter * usual), rng.spawn(1)[0]
    for i in range(max(usual, shown)):
        draw = ImageDraw.Draw(soft if i < shown else Image.new("RGB", (1, 1)))
        by = rng if i < usual else more
        x, y = by.random(2) * (width, height)
        fill = tuple(int(c) for c in _muted(by))
        reach = by.uniform(0.02, 0.07) * short * scale
        if by.random() < 0.5:
            dx, dy = by.normal(0, 0.2 * short * scale, 2)
            draw.line((x, y, x + dx, y + dy), fill, width=max(1, round(0.25 * reach)))
        else:
            corners = by.normal((x, y), reach, (by.integers(3, 6), 2))
            draw.polygon([(float(a), float(b)) for a, b in corners], fill)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 12)
    y, x = np.mgrid[:height, :width].astype(np.float32) / np.float32(short)
    phase = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi * waves + rng.uniform(0, 6)
    stripes = np.sin(phase)[..., None] * rng.uniform(0, 8)
    noise = rng.normal(0, rng.uniform(2, 6), (height, width, 1))
    return np.asarray(np.asarray(soft, np.float32) + stripes + noise, np.float32)


def _check(
    size: tuple[int, int], classes: Sequence[str], share: Share, objects: Number, clutter: float, count: int
) -> None:
    if (unknown := [name for name in classes if name not in CLASSES]) or not classes:
        raise ValueError(f"Unknown classes {unknown}; choose one or more of {list(CLASSES)}.")
    pixels = f"{size[0]} x {size[1]} pixels"
    if count < 1 or min(size) < 32:
        raise ValueError(f"{count} scenes of {pixels} cannot be made; give a count from 1, a size from 32.")
    least, most = ((2 * r) ** 2 / (size[0] * size[1]) for r in (_SMALLEST, _WIDEST * min(size)))
    if share is not None and not least <= share[0] <= share[1] <= most:
        found = f"Objects cannot take {share[0]:g} to {share[1]:g} of {pixels}"
        raise ValueError(f"{found}; give low <= high, from {least:.4f} (4 pixels of radius) to {most:.4f}.")
    if objects is not None and not 1 <= objects[0] <= objects[1]:
        raise ValueError(f"{objects[0]} to {objects[1]} objects are impossible; give 1 <= least <= most.")
    if not 0 <= clutter < np.inf:
        raise ValueError(f"Clutter {clutter:g} is impossible; give 0 (none), 1 (usual) or another multiple.")


def _place(
    rng: np.random.Generator, height: int, width: int, share: Share, objects: Number
) -> list[tuple[float, float, float]]:
    """(y, x, radius) in pixels of circles that do not touch and lie in the picture; at least one."""
    wanted = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
    if objects is not None:
        wanted = int(rng.integers(*objects, endpoint=True))
    low, high = share or (0.07, 0.34 if wanted == 1 else 0.16)
    circles: list[tuple[float, float, float]] = []
    for _ in range(20 * max(1, wanted - 2)):
        area = rng.uniform(low, high) * height * width
        radius = min(0.5 * np.sqrt(area), _WIDEST * min(height, width))
        y, x = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
        if all(np.hypot(y - b, x - a) > radius + r + 2 for b, a, r in circles):
            circles.append((y, x, radius))
        if len(circles) == wanted:
            break
    return circles


def draw_scene(
    seed: int,
    number: int,
    size: int | tuple[int, int] = 96,
    classes: Sequence[str] = CLASSES,
    share: Share = None,
    objects: Number = None,
    clutter: float = 1.0,
) -> Scene:
    """Draws scene `number` of a set; a pure function of its arguments, which `make_scenes` explains.

    Its objects are all of one class, so that the picture has one label.
    """
    height, width = (size, size) if isinstance(size, int) else size
    _check((height, width), classes, share, objects, clutter, 1)
    rng = np.random.default_rng([seed, number])
    kind = classes[int(rng.integers(len(classes)))]
    *texture, shape = kind.split()
    # No polygon is as large as the square of an object that takes a share of 0.03.
    scale = min(1.0, float(np.sqrt(share[0] / 0.03))) if share else 1.0
    background = _background(rng, height, width, clutter, scale).clip(0, 255)
    canvas = background.copy()
    boxes, masks = [], []
    for y, x, radius in _place(rng, height, width, share, objects):
        top, left = max(0, int(y - radius) - 1), max(0, int(x - radius) - 1)
        window = slice(top, int(y + radius) + 2), slice(left, int(x + radius) + 2)
        behind = canvas[window]  # a neighbour's corner may reach into this window
        grid = np.mgrid[: behind.shape[0], : behind.shape[1]].astype(np.float32)
        dy, dx = (grid[0] + (top + 0.5 - y)) / radius, (grid[1] + (left + 0.5 - x)) / radius
        turn = rng.uniform(0, 2 * np.pi)
        u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        cover = (0.5 - _SHAPES[shape](u, v) * radius).clip(0, 1)  # edges fade over one pixel
        cover[cover < 0.1] = 0
        mean = behind.mean((0, 1))
        tries = np.stack([_colour(rng) for _ in range(4)])
        light = tries[np.abs(tries - mean).sum(1).argmax()]
        # The second tone differs in brightness from the first, so that a texture shows in any colour.
        dark = light * 0.35 if light.mean() > 90 else light + 130
        tone = _TEXTURES[texture[0]](u, v)[..., None] if texture else 1
        shade = 1 + rng.uniform(0, 0.25) * v[..., None].clip(-1, 1)
        paint = (light * tone + dark * (1 - tone)) * shade + rng.normal(0, 4, (*u.shape, 1))
        before = behind.round()
        canvas[window] = behind * (1 - cover[..., None]) + paint.clip(0, 255) * cover[..., None]
        # The box of what can be seen: a corner in the background's colour is no part of the object.
        seen = (canvas[window].round() != before).any(-1)
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        masks.append(np.zeros((height, width), np.bool_))
        masks[-1][window] = seen
        boxes.append((top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1))
    drawn, behind = canvas.round().astype(np.uint8), background.round().astype(np.uint8)
    return Scene(drawn, behind, np.array(boxes, np.int64), kind, np.array(masks))


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO's uncompressed run lengths: down the columns, beginning with those outside."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, mask.size]).tolist()}


def make_scenes(
    root: str | os.PathLike[str],
    count: int,
    size: int | tuple[int, int] = 96,
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    share: Share = None,
    objects: Number = None,
    clutter: float = 1.0,
) -> tuple[Path, Path]:
    """Writes scenes in COCO's layout: `root/images/*.jpg` and `root/instances.json`.

    Equal arguments give equal bytes, and scene `i` does not depend on `count`. The place and size of its
    objects do not depend on `clutter`.

    Args:
        root: Folder to write to; files of the same name are replaced.
        count: Number of scenes.
        size: Height and width in pixels, or one number for both; 32 or more.
        classes: Some of `CLASSES`; a label is a place in this list.
        seed: 0 or more.
        share: Least and greatest size of an object, uniform between them: the area of the square around its
            circle as a share of the picture's area. A true box covers 0.5 to 1 of it by class and
            rotation, 0.9 on average, and the pixels at the edge. Absent: 0.07 to 0.34, of several to 0.16.
        objects: Least and greatest number of objects in a scene, uniform between them. They do not touch, so
            fewer are drawn where no more fit, with a warning if below the least. Absent: 1, 2 or 3, mostly 1.
        clutter: Number of thin lines and small polygons behind the objects as a multiple of the usual two to
            six; 0: none. Each covers less than the smallest object's square, though lines may be longer than
            an object; they shrink with it if `share` begins below 0.03.

    Returns:
        The folder of the images and the file of the boxes, as `SampleIndex.from_coco` takes them.

    Raises:
        ValueError: `count` is below 1, a class is unknown, the size is too small, or a range cannot be drawn.
    """
    height, width = (size, size) if isinstance(size, int) else size
    _check((height, width), classes, share, objects, clutter, count)
    folder, file = Path(root) / "images", Path(root) / "instances.json"
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    too_few = 0
    for number in range(count):
        scene = draw_scene(seed, number, (height, width), classes, share, objects, clutter)
        too_few += objects is not None and len(scene.boxes) < objects[0]
        name = f"{number:06d}.jpg"
        Image.fromarray(scene.image).save(folder / name, quality=92)
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for (y0, x0, y1, x1), shown in zip(scene.boxes.tolist(), scene.masks, strict=True):
            mark: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number + 1, "iscrowd": 0}
            mark |= {"category_id": list(classes).index(scene.kind) + 1, "area": int(shown.sum())}
            mark |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": run_lengths(shown)}
            annotations.append(mark)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    if too_few:
        told = f"{too_few} of {count} scenes have too few objects"
        warnings.warn(f"{told}, because no more fit; choose fewer or smaller ones.", stacklevel=2)
    return folder, file


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("out", type=Path, help="folder to write images/ and instances.json to")
    option = parser.add_argument
    option("--count", type=int, default=1000, help="images (1000)")
    option("--size", type=int, default=96, help="height and width in pixels (96)")
    option("--classes", nargs="+", choices=CLASSES, default=CLASSES, metavar="CLASS", help=", ".join(CLASSES))
    option("--seed", type=int, default=0)
    share = "share of the picture that the square around an object takes (0.07 to 0.34)"
    option("--share", nargs=2, type=float, metavar=("LOW", "HIGH"), help=share)
    option(
        "--objects",
        nargs=2,
        type=int,
        metavar=("LEAST", "MOST"),
        help="number of objects, if they fit (1 to 3)",
    )
    clutter = "lines and polygons behind the objects: 0 none, 2 twice as many (1)"
    option("--clutter", type=float, default=1.0, help=clutter)


def run(args: argparse.Namespace) -> Answer:
    """Makes the scenes."""
    names = ("count", "size", "classes", "seed", "share", "objects", "clutter")
    images, instances = make_scenes(args.out, **{name: getattr(args, name) for name in names})
    return Answer({"images": images, "instances": instances}, f"{images}, {instances}")
