"""Building an index: list the files, scan what is new or changed, keep the result for the next time.

The functions here carry out the constructors of `SampleIndex`, which explain the arguments.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..system.files import PathLike
from .headers import look_through, scan, size_of
from .listing import LeftOut, Listing, list_coco, list_file, list_folder
from .names import pack_names, unpack_names
from .objects import scan_objects
from .remote import absolute, as_url, below, is_remote
from .scan import FileScan, Scan, ScanCache
from .shard_list import list_shards
from .shard_scan import merge, scan_shard
from .truth import RowBoxes


def scan_folder(
    root: PathLike,
    cache: bool | PathLike,
    processes: int | None,
    progress: bool,
    classes: Sequence[str] | None,
) -> FileScan:
    """An image folder; if nothing in it has changed, it is not even listed."""
    base = absolute(root)
    place = ScanCache(cache, base, ["folder", None if classes is None else list(classes)], FileScan)
    if place.kept is not None and not is_remote(base) and place.kept.holds():
        return place.kept
    return _scan(list_folder(base, classes), place, processes, progress)


def scan_list(
    file: PathLike, root: PathLike | None, cache: bool | PathLike, processes: int | None, progress: bool
) -> FileScan:
    """The files that a text file names."""
    listing = list_file(file, root)
    place = ScanCache(cache, listing.root, ["list", absolute(file)], FileScan)
    return _scan(listing, place, processes, progress)


def scan_coco(
    images: PathLike,
    instances: PathLike | None,
    cache: bool | PathLike,
    processes: int | None,
    progress: bool,
) -> tuple[FileScan, RowBoxes]:
    """The images of a COCO set, and the boxes of its instances file."""
    listing, boxes = list_coco(images, instances)
    source = None if instances is None else absolute(instances)
    place = ScanCache(cache, listing.root, ["coco", source], FileScan)
    scanned = _scan(listing, place, processes, progress)
    assert scanned.paths is not None
    row_of = {name: row for row, name in enumerate(unpack_names(scanned.paths))}
    rows = np.array([row_of.get(listing.names[i], -1) for i in boxes.rows], np.int64)
    usable = rows >= 0
    return scanned, RowBoxes(rows[usable], boxes.boxes[usable], boxes.labels[usable])


def scan_shards(
    pattern: PathLike | Sequence[PathLike], cache: bool | PathLike, processes: int | None, progress: bool
) -> Scan:
    """The images in tar shards; if no shard has changed, none is opened."""
    paths = list_shards(pattern)
    root = _common(paths)
    shards = [below(path, root) for path in paths]
    place = ScanCache(cache, root, ["shards", shards], Scan)
    if place.kept is not None and place.kept.holds():
        return place.kept
    remote = is_remote(root)
    found = look_through(
        scan_shard, paths, 0 if remote else size_of(paths), processes, "shards", progress, requests=remote
    )
    scanned = merge(root, shards, found)
    place.keep(scanned)
    return scanned


def _common(paths: Sequence[str]) -> str:
    """The folder that all lie below; `ValueError` if some are local and some not, or in several buckets."""
    remote = [is_remote(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if len(set(remote)) == 1 else ""
    if remote[0] and is_remote(root):
        return as_url(root)
    if any(remote):
        raise ValueError("The shards do not lie in one bucket; copy them into one, or index them apart.")
    return root


def _scan(listing: Listing, place: ScanCache[FileScan], processes: int | None, progress: bool) -> FileScan:
    """Scans the listed files, parts good from bad and keeps the result."""
    known = {} if place.kept is None else place.kept.records()
    remote = is_remote(listing.root)
    if remote:
        records = scan_objects(listing.root, listing.names, listing.entries, known, progress)
    else:
        base = os.fsencode(listing.root)
        records = scan(base, listing.names, known, processes=processes, progress=progress)
    good = [i for i, record in enumerate(records) if not record[4]]
    bad = [i for i, record in enumerate(records) if record[4]]
    left_out = [LeftOut(os.fsdecode(listing.names[i]), records[i][4]) for i in bad] + listing.left_out
    if not good:
        first = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        raise ValueError(
            f"None of the {len(left_out)} files below {listing.root!r} is usable ({first}); check the path."
        )
    table = np.array([records[i][:4] for i in good], np.int64)
    scanned = FileScan(
        root=listing.root,
        paths=pack_names([listing.names[i] for i in good]),
        sizes=table[:, :2].astype(np.int32),
        labels=np.array([listing.labels[i] for i in good], np.int32),
        classes=listing.classes,
        left_out=left_out,
        stamp_files=table[:, 2:],
        stamp_left=np.array([records[i][2:4] for i in bad], np.int64).reshape(-1, 2),
        stamp_folders=pack_names(list(listing.folders)),
        stamp_times=np.array(list(listing.folders.values()), np.int64),
        holder="objects" if remote else "",
        places=np.column_stack([np.zeros(len(good), np.int64), table[:, [3, 2]]]) if remote else None,
    )
    place.keep(scanned)
    return scanned
