"""What a packed data set says about its images: their names and keys, their labels, the COCO instances."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, count, cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.index import SampleIndex
from ...data.listing import EXTENSIONS, number_labels
from ...data.names import unpack_names
from ...system.files import PathLike, atomic_write

_KEPT = (".jpg", ".jpeg")
_LONGEST = 255 - len("..tmp")  # bytes of a name, of which a draft is written first
_SHARD = re.compile(r".*?\.tar/")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_WORDS = re.compile(r"[\t\n\ud800-\udfff]")  # ends of a label in a list, and what is no UTF-8


def stored_names(index: SampleIndex) -> list[str]:
    """The name of each image in its index; the number of its row where it has none, as in arrays."""
    if index.paths is None:
        width = len(str(len(index) - 1))
        return [f"{row:0{width}d}" for row in range(len(index))]
    return [os.fsdecode(name) for name in unpack_names(index.paths)]


def image_names(index: SampleIndex) -> list[str]:
    """The same, of shards the members' names alone if no two are equal."""
    names = stored_names(index)
    if index.source is None:
        return names
    short = [_SHARD.sub("", name, count=1) for name in names]
    return short if len(set(short)) == len(names) else names


def packed_names(names: Sequence[str]) -> list[str | None]:
    """Relative path of each image in the copy, ending in .jpg or .jpeg in any case; no two are equal.

    Args:
        names: Relative paths in the source.

    Returns:
        As many paths; None where the copy cannot have one: out of the source, not a line of a list, or longer
        than a file may be named.

    Raises:
        ValueError: A file occurs twice.
    """
    clean = [os.path.normpath(name) for name in names]
    (name, most), *_ = Counter(clean).most_common(1)
    if most > 1:
        raise ValueError(f"{name!r} is in the index {most} times; an image is packed once.")
    taken = {name.lower() for name in clean if name.lower().endswith(_KEPT)}
    out: list[str | None] = []
    for name in clean:
        new = name
        if not name.lower().endswith(_KEPT):
            short = os.path.splitext(name)[0] if name.lower().endswith(EXTENSIONS) else name
            choices = (f"{base}.jpg" for base in chain((short, name), (f"{name}.{n}" for n in count(1))))
            new = next(choice for choice in choices if choice.lower() not in taken)
            taken.add(new.lower())
        outside = os.path.isabs(name) or name.split("/")[0] == ".."
        # A member of a shard, or a key, may be longer than a file system lets a name be.
        long = max(map(len, os.fsencode(new).split(b"/"))) > _LONGEST
        out.append(None if outside or long or set(name) & set("\t\r\n") else new)
    return out


def shard_keys(names: Sequence[str]) -> list[str]:
    """The key of each image in the shards: its name less the ending, no two equal.

    A key leads nowhere out of its folder, and has no dot after its last slash, where WebDataset would end it.
    What would be equal is told apart by the ending, then by a number.

    Args:
        names: Any, with repetitions or without.
    """
    taken: set[str] = set()
    number: Counter[str] = Counter()
    keys = []
    for name in names:
        steps = _CONTROL.sub("_", name).split("/")
        *folders, last = [step for step in steps if step not in ("", ".", "..")] or ["_"]
        stem, ending = os.path.splitext(last)
        short, long = ("/".join([*folders, base.replace(".", "_")]) for base in (stem, last))
        key = short if ending.lower() in EXTENSIONS and short not in taken else long
        while key in taken:
            number[long] += 1
            key = f"{long}_{number[long]}"
        taken.add(key)
        keys.append(key)
    return keys


def label_words(labels: NDArray[np.int32], classes: Sequence[str] | None) -> dict[int, str]:
    """What is written for each label in use but -1, so that `number_labels` gives the label again.

    The names of the classes, or their numbers where names would be numbered anew: they are not sorted, one is
    without an image, or they look like numbers. Numbers, too, where a text file cannot hold a name.

    Args:
        labels: (N,) of all images.
        classes: None for numbers in any case.
    """
    used = [label for label in np.unique(labels).tolist() if label >= 0]
    names = [] if classes is None else [classes[label] for label in used]
    try:
        plain = all(name and name == name.strip() and not _NOT_IN_WORDS.search(name) for name in names)
        if names and plain and number_labels(names)[0] == used:
            return dict(zip(used, names, strict=True))
    except ValueError:
        pass  # names that look like numbers, and too large ones
    return {label: str(label) for label in used}


def not_packed(source: SampleIndex, bad: Mapping[str, str]) -> dict[str, str]:
    """Why files of the source are not in the copy, by their names in it.

    What the index has left out because it is listed twice is in the copy by its first time; a list that named
    it would have that left out, too.

    Args:
        bad: Reasons of rows that turned out to be unusable.
    """
    out = dict(source.left_out)
    if out:
        for name in set(stored_names(source)) - bad.keys():
            out.pop(name, None)
    return {**out, **bad}


def write_list(file: Path, names: Sequence[str], labels: NDArray[np.int32], classes: Sequence[str]) -> None:
    """Writes a list for `SampleIndex.from_list` that reads to these labels."""
    words = label_words(labels, classes)
    with atomic_write(file) as out:
        for name, label in zip(names, labels.tolist(), strict=True):
            # Spaces at the start of a line are cut off, and # makes a comment of it.
            start = "./" if name[0] in "# " else ""
            word = f"\t{words[label]}" if label in words else ""
            out.write(os.fsencode(f"{start}{name}{word}\n"))


def scaled_instances(file: PathLike, packed: Mapping[str, tuple[str, tuple[int, int]]]) -> dict[str, Any]:
    """A COCO instances file in pixels of the copy, without the images that are not in it.

    Boxes, areas, polygons and key points are scaled; run-length masks of shrunk images are dropped, with a
    warning.

    Args:
        packed: New name and (height, width) by old name.

    Raises:
        ValueError: The file is not COCO's, or names none of the images.
    """
    try:
        data: dict[str, Any] = json.loads(Path(file).read_bytes())
        images, factors = [], {}
        for entry in data["images"]:
            if entry["file_name"] in packed:
                name, (height, width) = packed[entry["file_name"]]
                factors[entry["id"]] = (width / entry["width"], height / entry["height"])
                images.append({**entry, "file_name": name, "height": height, "width": width})
        there = [mark for mark in data.get("annotations", []) if mark["image_id"] in factors]
        marks = [_scaled(mark, *factors[mark["image_id"]]) for mark in there]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(file)!r} is not a COCO instances file ({error!r}).") from error
    if not images:
        raise ValueError(f"{os.fspath(file)!r} names none of the packed images; check the path.")
    dropped = sum("segmentation" in mark for mark in there) - sum("segmentation" in mark for mark in marks)
    if dropped:
        warnings.warn(f"{dropped} run-length masks of shrunk images are dropped.", stacklevel=3)
    return {**data, "images": images, "annotations": marks}


def _scaled(mark: Mapping[str, Any], x: float, y: float) -> dict[str, Any]:
    """An annotation with all that is in pixels multiplied by the factors for width and height."""
    out = dict(mark)
    if (x, y) == (1.0, 1.0):
        return out
    for key, factors in (("bbox", (x, y)), ("keypoints", (x, y, 1))):
        if key in out:
            out[key] = _times(out[key], factors)
    if "area" in out:
        out["area"] *= x * y
    if isinstance(out.get("segmentation"), list):
        out["segmentation"] = [_times(polygon, (x, y)) for polygon in out["segmentation"]]
    else:
        out.pop("segmentation", None)
    return out


def _times(numbers: Sequence[float], factors: Sequence[float]) -> list[float]:
    return [number * factor for number, factor in zip(numbers, cycle(factors), strict=False)]
