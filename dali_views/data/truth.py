"""Ground-truth boxes: COCO instances, box files, YOLO's labels, boxes by name; which rows they belong to."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Unpack

from ..system.files import PathLike, unpack_names
from .listing import Listing, by_part, folder_of, read_list, scan_folder, scan_listing, take
from .remote import absolute
from .scan import FileScan, Options, Scan, ScanCache

_FAR = 1e9  # pixels


class RowBoxes(NamedTuple):
    """M ground-truth boxes of the rows of an index or a listing, in any order."""

    rows: NDArray[np.int64]  # (M,) the row of each box
    boxes: NDArray[np.float32]  # (M, 4) y0, x0, y1, x1 fractions
    labels: NDArray[np.int32]  # (M,) the class of each box, -1 unknown


def scan_coco(
    images: PathLike, instances: PathLike | None, **options: Unpack[Options]
) -> tuple[Scan, RowBoxes]:
    """The images of a COCO set, and the boxes of its instances file; see `SampleIndex.from_coco`."""
    if instances is None:
        scanned = scan_folder(images, None, **options)
        none = RowBoxes(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
        return replace(scanned, labels=np.full_like(scanned.labels, -1), classes=[]), none
    listing, boxes = _list_coco(images, os.fspath(instances))
    place = ScanCache(listing.root, ["coco", absolute(instances)], FileScan, options)
    scanned = scan_listing(listing, place, options)
    assert scanned.paths is not None
    row_of = {name: row for row, name in enumerate(unpack_names(scanned.paths))}
    rows = np.array([row_of.get(listing.names[i], -1) for i in boxes.rows], np.int64)
    usable = rows >= 0
    return scanned, RowBoxes(rows[usable], boxes.boxes[usable], boxes.labels[usable])


def _list_coco(images: PathLike, file: str) -> tuple[Listing, RowBoxes]:
    listing, seen = Listing(folder_of(images), [], [], []), set[str]()
    text = read_list(file, "COCO file")
    try:
        data: dict[str, Any] = json.loads(text)
        kinds = sorted(data.get("categories", []), key=lambda c: int(c["id"]))
        listed = sorted(data["images"], key=lambda e: by_part(os.fsencode(e["file_name"])))
        entries = [entry for entry in listed if take(entry["file_name"], listing, seen)]
        rows, place = _numbered(entries), _numbered(kinds)
        marks = [a for a in data.get("annotations", []) if not a.get("iscrowd", 0) and a["image_id"] in rows]
        if lost := [a for a in marks if a["category_id"] not in place]:
            told = f"{lost[0].get('id')} is of the category {lost[0]['category_id']}, which is not listed"
            raise ValueError(f"annotation {told}")
        row = np.array([rows[a["image_id"]] for a in marks], np.int64)
        kind = np.array([place[a["category_id"]] for a in marks], np.int32)
        boxes = _numbers([a["bbox"] for a in marks], 4, least=-_FAR)
        sides = _numbers([(e["height"], e["width"]) for e in entries], 2, least=1)
        listing.classes = [str(c.get("name", c["id"])) for c in kinds]
        os.fsencode("".join(listing.classes))  # they are written as names are
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file!r} is not a COCO instances file ({error!r}); check the path.") from error
    if not entries:
        raise ValueError(f"The COCO file {file!r} lists no images below {listing.root!r}; check the path.")
    x, y, width, height = boxes.T
    corners = np.stack([y, x, y + height, x + width], axis=1) / np.tile(sides[row], 2)
    corners = np.clip(corners, 0, 1)
    solid = (corners[:, 2:] > corners[:, :2]).all(1)
    row, kind, corners, area = row[solid], kind[solid], corners[solid], (width * height)[solid]
    labels = np.full(len(entries), -1, np.int32)
    order = np.lexsort((-np.arange(len(row)), area))  # largest last, the first of equals after the others
    labels[row[order]] = kind[order]
    listing.labels = labels.tolist()
    return listing, RowBoxes(row, corners.astype(np.float32), kind)


def _numbered(entries: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    place: dict[Any, int] = {}
    for entry in entries:
        if entry["id"] in place:
            raise ValueError(f"the id {entry['id']} occurs twice")
        place[entry["id"]] = len(place)
    return place


def _numbers(rows: list[Any], columns: int, least: float) -> NDArray[np.float64]:
    """(N, columns) numbers of pixels; a ValueError for those that cannot be, as NaN."""
    try:
        values = np.array(rows, np.float64).reshape(len(rows), columns)
    except ValueError:
        raise ValueError(f"a row does not have {columns} numbers") from None
    if not ((values >= least) & (values <= _FAR)).all():
        raise ValueError(f"a number of pixels is not between {least:g} and {_FAR:g}")
    return values


def match_boxes(
    given: Mapping[str, ArrayLike] | PathLike,
    names: Sequence[bytes],
    sizes: NDArray[np.int32],
    labels: NDArray[np.int32],
) -> RowBoxes:
    """The rows of `SampleIndex.with_boxes` by the names, sizes (N, 2) and labels (N,) of an index."""
    pixels, by_name = False, given
    if not isinstance(given, Mapping):
        pixels = not os.path.isdir(given)
        by_name = _read_boxes(given) if pixels else _read_labels(given)
        names = names if pixels else [_label_of(name) for name in names]
    assert isinstance(by_name, Mapping)
    found = {name: np.asarray(boxes, np.float64).reshape(-1, 4) for name, boxes in by_name.items()}
    place = find_rows(names, found)
    if not place:
        raise ValueError(f"None of the {len(found)} names with boxes is in the index; check the names.")
    rows = np.concatenate([np.full(len(found[name]), row, np.int64) for name, row in place.items()])
    values = np.concatenate([found[name] for name in place])
    if pixels:
        values = np.clip(values / np.tile(sizes[rows], 2), 0, 1)
    good = (values >= 0).all(1) & (values <= 1).all(1) & (values[:, 2:] > values[:, :2]).all(1)
    if not good.all():
        first = int(good.argmin())
        raise ValueError(
            f"The box {values[first].tolist()} of {os.fsdecode(names[rows[first]])!r} is not a rectangle "
            "(y0, x0, y1, x1) in [0, 1]; correct it."
        )
    return RowBoxes(rows, values.astype(np.float32), labels[rows])


def largest(
    start: NDArray[np.int64], boxes: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each row i with boxes[start[i] : start[i + 1]], the largest one, the first of equals."""
    rows = np.repeat(np.arange(len(start) - 1), np.diff(start))
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    order = np.lexsort((-np.arange(len(boxes)), areas, rows))
    last = order[start[1:][np.diff(start) > 0] - 1]
    return rows[last], boxes[last]


def _read_boxes(path: PathLike) -> dict[str, list[tuple[float, float, float, float]]]:
    """Lines `name x0 y0 x1 y1` (a class column is skipped) as y0, x0, y1 + 1, x1 + 1 by name, in pixels."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The box file {os.fspath(path)!r} does not exist; check the path.")
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for number, line in enumerate(Path(path).read_text(errors="surrogateescape").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        head, *corners = line.strip().rsplit(None, 4)
        try:
            x0, y0, x1, y1 = _numbers([corners], 4, least=-_FAR)[0].tolist()
        except ValueError:
            raise ValueError(
                f"Line {number} of {os.fspath(path)!r} is not `name x0 y0 x1 y1` ({line[:60]!r}); correct it."
            ) from None
        found.setdefault(head.split("\t")[0].strip(), []).append((y0, x0, y1 + 1, x1 + 1))
    return found


def _label_of(image: bytes) -> bytes:
    """The name of YOLO's label file of an image, without suffix: images/b/a.jpg has labels/b/a.txt."""
    return re.sub(rb"(^|/)images/", rb"\1", os.path.splitext(image)[0], count=1)


def _read_labels(folder: PathLike) -> dict[str, list[tuple[float, float, float, float]]]:
    """YOLO's label files below a folder, a line `class cx cy w h` per box in fractions of the image, as y0,
    x0, y1, x1 by relative path without suffix. An empty file says that there is no object.
    """
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for path in sorted(Path(folder).rglob("*.txt")):
        if path.name == "classes.txt":  # the names of the classes, which some tools write beside the labels
            continue
        boxes = found.setdefault(str(path.relative_to(folder).with_suffix("")), [])
        for number, line in enumerate(path.read_text(errors="surrogateescape").splitlines(), 1):
            words = line.split()
            try:
                kind, x, y, width, height = map(float, words)
                sound = all(0 <= value <= 1 for value in (x, y, width, height)) and width * height > 0
                right = sound and kind >= 0 and kind.is_integer()
            except ValueError:
                right = not words  # an empty line
            if not right:
                told = f"Line {number} of {os.fspath(path)!r} is not `class cx cy w h` in [0, 1]"
                raise ValueError(f"{told} ({line[:60]!r}); correct it.")
            if words:
                box = (y - height / 2, x - width / 2, y + height / 2, x + width / 2)
                boxes.append(tuple(min(max(side, 0.0), 1.0) for side in box))  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"The folder {os.fspath(folder)!r} holds no label file (.txt); check the path.")
    return found


def find_rows(paths: Sequence[bytes], names: Iterable[str]) -> dict[str, int]:
    """Row of each name: a relative path, or a file name that occurs once. Unknown names are absent."""
    names_of = [os.path.basename(path) for path in paths]
    row_of = {name: row for row, name in enumerate(names_of)}
    for name, count in Counter(names_of).items():
        if count > 1:
            del row_of[name]
    row_of |= {path: row for row, path in enumerate(paths)}
    return {name: row_of[key] for name in names if (key := os.fsencode(name)) in row_of}
