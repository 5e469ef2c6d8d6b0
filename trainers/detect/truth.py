"""The objects of an index's images, from COCO's instances (JSON) or from VOC's annotations (XML)."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dali_views import SampleIndex
from dali_views.data.truth import find_rows
from dali_views.system.files import unpack_names

__all__ = ["Mask", "Objects", "Truth", "mask_tools", "read_truth"]

Mask: TypeAlias = "list[NDArray[np.float64]] | dict[str, Any]"
"""Polygons (k, 2) of x, y in pixels, or COCO's run lengths: `size` (height, width) and the list `counts`."""


_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)


def mask_tools() -> Any:
    """pycocotools.mask; a ValueError if it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ValueError("detection needs pycocotools; pip install 'dali-views[detect]'") from None
    return mask


class Objects(NamedTuple):
    """The n objects of one image, in pixels of the image as stored."""

    boxes: NDArray[np.float64]  # (n, 4) x0, y0, x1, y1
    labels: NDArray[np.int64]  # (n,) from 1; 0 is the background
    areas: NDArray[np.float64]  # (n,) as the file has them, by which COCO tells small from large
    ignored: NDArray[np.bool_]  # (n,) COCO's crowds and VOC's difficult objects: no score depends on them
    trained: NDArray[np.bool_]  # (n,) False for crowds, which are no objects
    masks: list[Mask | None]  # n


@dataclass(frozen=True)
class Truth:
    """An index and the objects of each of its N images."""

    index: SampleIndex
    objects: list[Objects]
    classes: list[str]  # names of the labels 1, 2, ...
    voc: bool  # scored as VOC 2007 is, else as COCO is

    @property
    def masked(self) -> bool:
        """Whether every object to train on has a mask."""
        return all(mask is not None for each in self.objects for mask in _of(each.masks, each.trained))

    def subset(self, chosen: NDArray[Any]) -> Truth:
        """Some images, by row or by a mask of N truth values."""
        rows = np.arange(len(self.objects))[chosen]
        return replace(self, index=self.index.subset(rows), objects=[self.objects[row] for row in rows])

    def with_objects(self) -> Truth:
        """The images that have an object to train on; a ValueError if none has."""
        counts = np.array([each.trained.sum() for each in self.objects])
        if not counts.any():
            raise ValueError(f"none of {len(counts)} images has a box to train on; check data.instances")
        return self.subset(counts > 0)


def read_truth(index: SampleIndex, files: Sequence[str], classes: Sequence[str] | None = None) -> Truth:
    """The objects of an index's images.

    Args:
        files: COCO's instances file, or lists of VOC's images, VOC2007/ImageSets/Main/trainval.txt, beside
            which the annotations lie. Images are found by relative path, or by a file name that occurs once.
        classes: of the training images, which these must have, too.

    Returns:
        The images that the files name, in the order of the index; those without an object are among them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or does not fit the images or `classes`; the message names the first place.
    """
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"there is no file of annotations {file}; check data.instances")
    if index.paths is None:
        raise ValueError(
            "these images are in memory and have no names by which to find their objects; use files"
        )
    voc = all(file.endswith(".txt") for file in files)
    if not voc and len(files) > 1:
        raise ValueError("several COCO files cannot be joined; give one, or several lists of VOC's images")
    try:
        found, names = _voc(files) if voc else _coco(files[0])
    except (AttributeError, KeyError, TypeError, ElementTree.ParseError, *_NO_JSON) as error:
        raise ValueError(f"{', '.join(files)}: no annotations of COCO or VOC ({error!r})") from error
    if classes is not None and (voc and set(names) <= set(classes)):
        names = list(classes)
    if classes is not None and list(classes) != names:
        other = sorted(set(names) ^ set(classes)) or [*names, *classes]
        raise ValueError(
            f"{files[0]} has other categories than the training images, such as {other[0]!r}; "
            "use files of one set"
        )
    row_of = find_rows(unpack_names(index.paths), found)
    if not row_of:
        raise ValueError(f"none of the {len(found)} images in {files[0]} is in {index.root}; check data.path")
    label_of = {name: label for label, name in enumerate(names, 1)}
    place = {row: name for name, row in row_of.items()}
    rows = sorted(place)
    lost: list[str] = []
    objects = [_checked(place[row], *found[place[row]], index.sizes[row], label_of, lost) for row in rows]
    if lost:
        told = f"{len(lost)} boxes have no area inside their image and are left out"
        warnings.warn(f"{told}; the first is of {lost[0]}", stacklevel=2)
    return Truth(index.subset(np.array(rows)), objects, names, voc)


class _Mark(NamedTuple):
    """An object as a file has it."""

    kind: str
    box: ArrayLike  # x0, y0, x1, y1
    area: float | None
    ignored: bool
    trained: bool
    mask: Any


_Found: TypeAlias = dict[str, tuple[tuple[int, int], list[_Mark]]]  # height, width and objects by image


def _coco(file: str) -> tuple[_Found, list[str]]:
    data = json.loads(Path(file).read_text(encoding="utf-8"))
    kinds = sorted(data["categories"], key=lambda kind: int(kind["id"]))
    name_of = {kind["id"]: str(kind["name"]) for kind in kinds}
    _check_once((kind["id"] for kind in kinds), "category", file)
    _check_once(name_of.values(), "category", file)
    _check_once((image["id"] for image in data["images"]), "image", file)
    found: _Found = {e["file_name"]: ((int(e["height"]), int(e["width"])), []) for e in data["images"]}
    image_of = {image["id"]: image["file_name"] for image in data["images"]}
    for mark in data.get("annotations", []):
        if mark["category_id"] not in name_of or mark["image_id"] not in image_of:
            raise ValueError(f"{file}: annotation {mark.get('id')} is of an unknown category or image")
        try:
            x, y, width, height = map(float, mark["bbox"])
        except (TypeError, ValueError):
            raise ValueError(
                f"{file}: the box of annotation {mark.get('id')} is not four numbers; correct it"
            ) from None
        crowd, box = bool(mark.get("iscrowd", 0)), (x, y, x + width, y + height)
        named = name_of[mark["category_id"]]
        one = _Mark(named, box, mark.get("area"), crowd, not crowd, mark.get("segmentation") or None)
        found[image_of[mark["image_id"]]][1].append(one)
    return found, list(name_of.values())


def _voc(lists: Sequence[str]) -> tuple[_Found, list[str]]:
    found: _Found = {}
    for file in lists:
        home = Path(file).resolve().parents[2]
        for line in Path(file).read_text().splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            xml = home / "Annotations" / f"{name}.xml"
            if not xml.is_file():
                raise FileNotFoundError(f"{file} names {name}, and there is no {xml}; check the folder")
            tree = ElementTree.parse(xml).getroot()
            marks = []
            for each in tree.iter("object"):
                x0, y0, x1, y1 = (float(_text(each, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
                # Their pixels are counted from 1, and the last one belongs to the box.
                box, difficult = (x0 - 1, y0 - 1, x1, y1), (each.findtext("difficult") or "0").strip() == "1"
                marks.append(_Mark(_text(each, "name"), box, None, difficult, True, None))
            size = int(_text(tree, "size/height")), int(_text(tree, "size/width"))
            image = Path(home.name, "JPEGImages", tree.findtext("filename") or f"{name}.jpg")
            found[str(image)] = size, marks
    return found, sorted({mark.kind for _, marks in found.values() for mark in marks})


def _text(element: ElementTree.Element, place: str) -> str:
    """The text at a place of an XML file; a KeyError without it."""
    if (text := element.findtext(place)) is None:
        raise KeyError(place)
    return text.strip()


def _check_once(values: Iterable[Any], what: str, file: str) -> None:
    value, times = next(iter(Counter(values).most_common(1)), ("", 1))
    if times > 1:
        raise ValueError(f"{file}: the {what} {value!r} occurs {times} times; remove the others")


def _checked(
    name: str, told: tuple[int, int], marks: list[_Mark], size: NDArray[np.int32],
    label_of: Mapping[str, int], lost: list[str],
) -> Objects:  # fmt: skip
    """The objects of one image; the names of boxes without any area inside it are added to `lost`."""
    if told != (height := int(size[0]), width := int(size[1])):
        raise ValueError(
            f"{name} has {height} x {width} pixels, and its annotations are for {told[0]} x {told[1]}; "
            "use the images that were annotated"
        )
    boxes = np.array([mark.box for mark in marks], np.float64).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise ValueError(f"a box of {name} is not four numbers; correct its annotations")
    boxes = np.clip(boxes, 0, [width, height, width, height])
    solid = np.asarray(((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1), np.bool_)
    lost += [name] * int((~solid).sum())
    boxes, marks = boxes[solid], [mark for mark, good in zip(marks, solid, strict=True) if good]
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Objects(
        boxes,
        np.array([label_of[mark.kind] for mark in marks], np.int64),
        np.array([s if m.area is None else m.area for m, s in zip(marks, sides, strict=True)], np.float64),
        np.array([mark.ignored for mark in marks], np.bool_),
        np.array([mark.trained for mark in marks], np.bool_),
        [None if mark.mask is None else _mask(mark.mask, told, name) for mark in marks],
    )


def _mask(given: Any, size: tuple[int, int], name: str) -> Mask:
    if isinstance(given, dict):
        return _run_lengths(given, size, name)
    try:
        polygons = [np.array(points, np.float64) for points in given]
    except (TypeError, ValueError):
        polygons = [np.zeros(0)]
    if not all(
        points.ndim == 1 and points.size >= 6 and points.size % 2 == 0 and np.isfinite(points).all()
        for points in polygons
    ):
        raise ValueError(f"a polygon of {name} is not a list of three or more x, y; correct its annotations")
    return [points.reshape(-1, 2) for points in polygons]


def _run_lengths(given: dict[str, Any], size: tuple[int, int], name: str) -> dict[str, Any]:
    """COCO's run lengths as a list. Its tools do not check them; wrong ones damage the process's memory."""
    try:
        stated, counts = tuple(map(int, given["size"])), given["counts"]
        counts = _unpacked(counts) if isinstance(counts, str) else [int(count) for count in counts]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a mask of {name} is not run lengths ({error!r}); correct its annotations"
        ) from None
    if stated != size:
        told = " x ".join(map(str, stated))
        raise ValueError(
            f"a mask of {name} has {told} pixels, and the image {size[0]} x {size[1]}; "
            "correct its annotations"
        )
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(
            f"the run lengths of a mask of {name} do not fill the image; correct its annotations"
        )
    return {"size": list(size), "counts": counts}


def _unpacked(text: str) -> list[int]:
    """Run lengths from COCO's string: five bits a character, the lowest first, a sixth if more follow; from
    the fourth on, they are differences to the last but one."""
    counts: list[int] = []
    value = bits = 0
    for character in text:
        piece = ord(character) - 48
        value |= (piece & 31) << bits
        bits += 5
        if not piece & 32:
            value -= (piece >> 4 & 1) << bits  # a negative number
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts


def _of(masks: list[Mask | None], chosen: NDArray[np.bool_]) -> list[Mask | None]:
    return [mask for mask, good in zip(masks, chosen, strict=True) if good]
