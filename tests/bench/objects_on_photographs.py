"""Makes a data set of small real objects on real photographs, where a crop can easily miss the object.

python tests/bench/objects_on_photographs.py DATA OUT                       objects from CIFAR-10
python tests/bench/objects_on_photographs.py DATA OUT --objects tiny-imagenet --share 0.11 0.27

DATA holds the unpacked cifar10/ or tiny-imagenet-50/, and imagenet-sample/. An object is a whole CIFAR image,
or what a box of Tiny-ImageNet holds; its edges fade into a part of a photograph. The photograph's own subject
stays visible: something else that a map may choose. OUT gets four sets, each with images/CLASS/NUMBER.jpg and
instances.json (COCO, one box per image):

  train       objects of the training images on four fifths of the photographs
  test        clean: held-out objects on held-out photographs, chosen as for training
  mixed_rand  the objects of `test` at the same places, on any held-out photograph (Mixed-Rand of "Noise or
              Signal", arXiv 2006.09994, section 2)
  plain       the same again on grey: what the objects alone tell

Each class has its own group of photographs that look alike (colours at coarse places), and with probability
`--bias` an image of `train` or `test` takes its photograph from the group of its class, else from all. So a
model that reads backgrounds loses from `test` to `mixed_rand`, which does not depend on the bias. With bias 0
the photograph tells nothing, and both sets differ by chance only.

Equal arguments give equal images; image `i` does not depend on the counts. Objects repeat, at other places,
where a class has too few (Tiny-ImageNet's least: 123 to train with, 11 held out). The settings of a trainer
are printed at the end. Labelled folders are read without boxes, so for scores of localisation set
data.eval_val=null, which holds out a part of `train`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array: TypeAlias = NDArray[np.float32]
FADE = 0.25  # of the way from an object's edge to its centre, over which it fades in
NARROWEST, LONGEST = 10, 3.0  # boxes with a side of fewer pixels or a greater ratio of sides are not used
GREY = (124, 116, 104)  # ImageNet's mean
HELD = 5  # one in so many photographs is held out
SETS = ("train", "test", "mixed_rand", "plain")
DRAWN = (*SETS, "object", "order", "photographs")
FOLDERS = {"cifar10": ("cifar10", "test"), "tiny-imagenet": ("tiny-imagenet-50", "val")}


class Thing(NamedTuple):
    """An image of an object."""

    file: Path
    box: tuple[int, int, int, int] | None
    """left, upper, right, lower in pixels, right and lower exclusive; None: the whole image."""


def things(data: Path, source: str, held_out: bool) -> dict[str, list[Thing]]:
    """The images of objects by class, both sorted."""
    folder, test = FOLDERS[source]
    part = test if held_out else "train"
    by_name: dict[str, list[int]] = {}
    if source == "tiny-imagenet":
        lines = (data / folder / f"{part}_boxes.txt").read_text().splitlines()
        for name, *numbers in (line.split("\t") for line in lines):
            by_name[name] = [int(number) for number in numbers]
    found: dict[str, list[Thing]] = {}
    for kind in sorted(path for path in (data / folder / part).iterdir() if path.is_dir()):
        files = sorted(kind.iterdir())
        found[kind.name] = []
        for file in files:
            box = None
            if by_name:
                x0, y0, x1, y1 = by_name[file.name]
                short, long = sorted((x1 + 1 - x0, y1 + 1 - y0))
                if short < NARROWEST or long > LONGEST * short:
                    continue
                box = x0, y0, x1 + 1, y1 + 1
            found[kind.name].append(Thing(file, box))
        if not found[kind.name]:
            raise SystemExit(f"error: {kind} has no object; give all images and boxes of {folder}")
    return found


def photographs(folder: Path, size: int) -> list[Image.Image]:
    """All photographs in the order of their names, as RGB with a short side of 2 `size` pixels."""
    found = []
    for file in sorted(folder.iterdir()):
        photo = Image.open(file).convert("RGB")
        scale = 2 * size / min(photo.size)
        found.append(photo.resize((round(photo.width * scale), round(photo.height * scale))))
    return found


def alike(photos: Sequence[Image.Image], groups: int) -> list[NDArray[np.int64]]:
    """Rows of photographs in groups of about equal size, split in turn where coarse colours vary most."""
    coarse = np.stack([np.asarray(photo.resize((4, 4), Image.Resampling.BOX), float) for photo in photos])
    coarse = coarse.reshape(len(photos), -1)

    def split(rows: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        if count == 1:
            return [rows]
        axis = coarse[rows].var(0).argmax()
        rows = rows[np.argsort(coarse[rows, axis], kind="stable")]
        left = count // 2
        cut = len(rows) * left // count
        return split(rows[:cut], left) + split(rows[cut:], count - left)

    return split(np.arange(len(photos)), groups)


def ground(photo: Image.Image, size: int, rng: np.random.Generator) -> Array:
    """(size, size, 3) a random square, half to all of the photograph's short side, flipped half the time."""
    side = rng.uniform(0.5, 1) * min(photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    part = photo.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    pixels = np.asarray(part, np.float32)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def put(
    thing: Thing, behind: Array, share: tuple[float, float], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """The image (S, S, 3) with the object at a random place, and its box (y0, x0, y1, x1) in pixels.

    The box holds the whole object with its faded edges. Its area is a random `share` of the image's area.
    """
    cut = Image.open(thing.file).convert("RGB").crop(thing.box)
    size = len(behind)
    scale = size * float(np.sqrt(rng.uniform(*share) / (cut.height * cut.width)))
    height, width = round(scale * cut.height), round(scale * cut.width)
    y, x = (int(rng.integers(0, size - side, endpoint=True)) for side in (height, width))
    pixels = np.asarray(cut.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    image, window = behind.copy(), (slice(y, y + height), slice(x, x + width))
    image[window] += _cover(height, width) * (pixels - image[window])
    return image.round().astype(np.uint8), (y, x, y + height, x + width)


def _cover(height: int, width: int) -> Array:
    """(height, width, 1) opacity: 1 in the middle, falling smoothly to the edge, with round corners."""
    y, x = (np.abs((np.arange(side) + 0.5) / side * 2 - 1) ** 4 for side in (height, width))
    inside = 1 - (y[:, None] + x[None]) ** 0.25
    ramp = (inside / FADE).clip(0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp), np.float32)[..., None]


class Maker:
    """Writes sets; what it draws is a function of its arguments, the set and the number of the image."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        folder = given.data / "imagenet-sample"
        self.photos = photographs(folder, given.size)
        self.kinds = sorted(things(given.data, given.objects, held_out=False))
        if len(self.photos) < 2 * len(self.kinds):
            raise SystemExit(
                f"error: {folder} has {len(self.photos)} photographs; give two or more per class"
            )
        rng = self.draws(False, 0, "photographs")
        mixed = [rng.permutation(group) for group in alike(self.photos, len(self.kinds))]
        # By class: the group's photographs to train with (False) and to test with (True).
        cuts = [max(1, len(group) // HELD) for group in mixed]
        self.groups = {
            False: [group[cut:] for group, cut in zip(mixed, cuts, strict=True)],
            True: [group[:cut] for group, cut in zip(mixed, cuts, strict=True)],
        }

    def draws(self, held_out: bool, number: int, what: str) -> np.random.Generator:
        """A generator for one thing to draw."""
        # All keys have the same length, because NumPy pads shorter ones with zeros.
        return np.random.default_rng([self.given.seed, held_out, number, DRAWN.index(what)])

    def write(self, name: str, count: int, held_out: bool, bias: float | None) -> Path:
        """Write one set; without a bias all backgrounds are grey."""
        folder: Path = self.given.out / name
        size, rng = self.given.size, self.draws(held_out, 0, "order")
        of_class = things(self.given.data, self.given.objects, held_out)
        ordered = [[found[i] for i in rng.permutation(len(found))] for found in of_class.values()]
        groups = self.groups[held_out]
        everything = np.concatenate(groups)
        images: list[dict[str, Any]] = []
        marks: list[dict[str, Any]] = []
        for kind in self.kinds:
            (folder / "images" / kind).mkdir(parents=True)
        for number in range(count):
            nth, label = divmod(number, len(self.kinds))
            behind = np.full((size, size, 3), GREY, np.float32)
            if bias is not None:
                rng = self.draws(held_out, number, name)
                rows = groups[label] if rng.random() < bias else everything
                behind = ground(self.photos[rng.choice(rows)], size, rng)
            thing = ordered[label][nth % len(ordered[label])]
            # Not drawn by `rng`: the sets of held-out objects have the same objects at the same places.
            rng = self.draws(held_out, number, "object")
            pixels, (y0, x0, y1, x1) = put(thing, behind, self.given.share, rng)
            file = f"{self.kinds[label]}/{number:06d}.jpg"
            Image.fromarray(pixels).save(folder / "images" / file, quality=92)
            images.append({"id": number, "file_name": file, "height": size, "width": size})
            mark = {"id": number, "image_id": number, "category_id": label, "iscrowd": 0}
            marks.append(mark | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (y1 - y0) * (x1 - x0)})
        categories = [{"id": i, "name": kind} for i, kind in enumerate(self.kinds)]
        content = {"images": images, "annotations": marks, "categories": categories}
        (folder / "instances.json").write_text(json.dumps(content))
        return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, help="folder with the unpacked archives")
    add("out", type=Path, help="folder to make; it must not have these sets yet")
    add("--objects", choices=FOLDERS, default="cifar10")
    add("--size", type=int, default=96, help="height and width of an image in pixels")
    share = "share of the image's area that an object's box takes"
    add("--share", nargs=2, type=float, metavar=("LOW", "HIGH"), default=(0.03, 0.08), help=share)
    add("--train", type=int, default=6000, help="number of images")
    add("--test", type=int, default=2000, help="number of images in each of the other sets")
    add("--bias", type=float, default=0.0, help="probability of a photograph of the class's own group")
    add("--seed", type=int, default=0)
    given = parser.parse_args()
    low, high = given.share
    if not 64 / given.size**2 <= low <= high <= 1 / LONGEST:
        parser.error(f"--share {low} {high}: give low <= high, from 8 x 8 pixels to {1 / LONGEST:.2f}")
    if not 0 <= given.bias <= 1 or min(given.train, given.test) < 1:
        parser.error("give a --bias from 0 to 1, and --train and --test from 1 on")
    if taken := [name for name in SETS if (given.out / name).exists()]:
        parser.error(f"{given.out / taken[0]} is there already; name another folder")
    maker = Maker(given)
    train = maker.write("train", given.train, False, given.bias)
    for name, bias in (("test", given.bias), ("mixed_rand", 0.0), ("plain", None)):
        maker.write(name, given.test, True, bias)
    print(f"data.kind=coco data.path={train}/images data.instances={train}/instances.json")
    for name in SETS[1:]:
        print(f"  data.eval_val={given.out / name}/images")


if __name__ == "__main__":
    main()
