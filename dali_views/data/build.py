"""Building an index: list the files, scan what is new or changed, keep the result for the next time.

The functions here carry out the constructors of `SampleIndex`, which explain the arguments.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Unpack

from ..system.files import PathLike
from .headers import MAX_PIXELS, cores, inspect, inspect_file, look_through, scan_bar, size_of
from .listing import Listing, list_file, list_folder
from .names import LeftOut, pack_names, unpack_names
from .objects import ObjectSource, scan_objects
from .remote import absolute, as_url, below, is_remote
from .scan import FileScan, Scan, ScanCache
from .shards import list_shards, merge, scan_shard
from .source import RangeSource, Source, needs, read_each
from .truth import RowBoxes, list_coco

Cache: TypeAlias = "bool | PathLike"
T = TypeVar("T", bound=Scan)
_FILES, _BYTES = 256, 50_000  # files that a thread scans in turn, and what one is supposed to have
_SHARDS, _REQUESTS = 4, 16  # shards that threads scan at a time: more wait for the interpreter; in a store
_THREADS, _CHUNK = 8, 64  # that read a source of one's own, and images that one requests at a time


class Options(TypedDict, total=False):
    """Options of a scan; see `SampleIndex`. Without `processes`, sets below 1 GB are scanned by threads."""

    cache: Cache
    processes: int | None
    progress: bool


def scan_folder(root: PathLike, classes: Sequence[str] | None, **options: Unpack[Options]) -> FileScan:
    """An image folder; if nothing in it has changed, it is not even listed."""
    base = absolute(root)
    place = _place(base, ["folder", None if classes is None else list(classes)], FileScan, options)
    if place.kept is not None and not is_remote(base) and place.kept.holds():
        return place.kept
    return _scan(list_folder(base, classes), place, options)


def scan_list(file: PathLike, root: PathLike | None, **options: Unpack[Options]) -> FileScan:
    """The files that a text file names."""
    listing = list_file(file, root)
    return _scan(listing, _place(listing.root, ["list", absolute(file)], FileScan, options), options)


def scan_coco(
    images: PathLike, instances: PathLike | None, **options: Unpack[Options]
) -> tuple[FileScan, RowBoxes]:
    """The images of a COCO set, and the boxes of its instances file."""
    listing, boxes = list_coco(images, instances)
    source = None if instances is None else absolute(instances)
    scanned = _scan(listing, _place(listing.root, ["coco", source], FileScan, options), options)
    assert scanned.paths is not None
    row_of = {name: row for row, name in enumerate(unpack_names(scanned.paths))}
    rows = np.array([row_of.get(listing.names[i], -1) for i in boxes.rows], np.int64)
    usable = rows >= 0
    return scanned, RowBoxes(rows[usable], boxes.boxes[usable], boxes.labels[usable])


def _place(root: str, key: object, kind: type[T], options: Options) -> ScanCache[T]:
    return ScanCache(options.get("cache", True), root, key, kind)


def _scan(listing: Listing, place: ScanCache[FileScan], options: Options) -> FileScan:
    """Scans the listed files, separates good from bad and keeps the result."""
    known = {} if place.kept is None else place.kept.records()
    progress = options.get("progress", True)
    if remote := is_remote(listing.root):
        records = scan_objects(listing.root, listing.names, listing.entries, known, progress)
    else:
        root = os.path.join(os.fsencode(listing.root), b"")
        jobs = [(root + name, known.get(name)) for name in listing.names]
        size, threads, workers = _BYTES * len(jobs), min(8, 2 * cores()), options.get("processes")
        records = look_through(inspect_file, jobs, size, workers, "files", progress, threads, _FILES)
    good = [i for i, record in enumerate(records) if not record[4]]
    bad = [i for i, record in enumerate(records) if record[4]]
    left_out = [LeftOut(os.fsdecode(listing.names[i]), records[i][4]) for i in bad] + listing.left_out
    _require_some(good, left_out, f"files below {listing.root!r}")
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


def _require_some(good: list[int], left_out: list[LeftOut], what: str) -> None:
    if not good:
        first = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        raise ValueError(f"None of the {len(left_out)} {what} is usable ({first}); check the path.")


def scan_shards(pattern: PathLike | Sequence[PathLike], **options: Unpack[Options]) -> Scan:
    """The images in tar shards; if no shard has changed, none is opened."""
    paths = list_shards(pattern)
    remote = {is_remote(path) for path in paths}
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if len(remote) == 1 else ""
    if True in remote and not is_remote(root):
        raise ValueError("The shards do not lie in one bucket; copy them into one, or index them apart.")
    root = as_url(root) if True in remote else root
    shards = [below(path, root) for path in paths]
    place = _place(root, ["shards", shards], Scan, options)
    if place.kept is not None and place.kept.holds():
        return place.kept
    size, workers, threads = size_of(paths), options.get("processes"), _SHARDS
    if True in remote:
        size, workers, threads = 0, 0, _REQUESTS
    found = look_through(scan_shard, paths, size, workers, "shards", options.get("progress", True), threads)
    scanned = merge(root, shards, found)
    place.keep(scanned)
    return scanned


def scan_source(
    source: Source, sizes: ArrayLike | None, names: Sequence[str] | None, progress: bool
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int32], list[LeftOut]]:
    """The usable images of a source of one's own: rows (n,), names (n, L), sizes (n, 2); and the others."""
    count = len(source)
    named = [f"row {row}" for row in range(count)] if names is None else list(names)
    if len(named) != count or len(set(named)) != count or any(not name or "\0" in name for name in named):
        raise ValueError(f"names must be {count} different texts without NULs, one for each image.")
    packed = pack_names([os.fsencode(name) for name in named])
    if sizes is not None and count:
        return np.arange(count), packed, _checked_sizes(sizes, count), []

    def look(start: int) -> list[tuple[int, int, str]]:
        found = read_each(source, np.arange(start, min(start + _CHUNK, count)))
        return [
            (0, 0, one) if isinstance(one, str) else inspect(io.BytesIO(one.data), len(one)) for one in found
        ]

    found: list[tuple[int, int, str]] = []
    with ThreadPoolExecutor(_THREADS) as threads, scan_bar(count, " images", progress) as bar:
        for part in threads.map(look, range(0, count, _CHUNK)):
            found += part
            bar.update(len(part))
    left_out = [LeftOut(name, refused) for name, (_, _, refused) in zip(named, found, strict=True) if refused]
    good = [i for i in range(count) if not found[i][2]]
    _require_some(good, left_out, "images of the source")
    rows = np.array(good, np.int64)
    names_left = pack_names([os.fsencode(named[i]) for i in good])
    return rows, names_left, np.array([found[i][:2] for i in good], np.int32), left_out


def _checked_sizes(sizes: ArrayLike, count: int) -> NDArray[np.int32]:
    given = np.asarray(sizes)
    if given.dtype.kind not in "iu":
        raise TypeError(f"sizes must be whole numbers, not {given.dtype}; convert them first.")
    # As floats, for the product of large integers may overflow.
    if given.shape != (count, 2) or given.min() < 1 or np.prod(given, 1, np.float64).max() > MAX_PIXELS:
        raise ValueError(f"sizes must be ({count}, 2) heights and widths of 1 to {MAX_PIXELS} pixels in all.")
    return given.astype(np.int32)


def open_source(scan: Scan) -> Source:
    """What reads images that are neither local files of their own nor arrays; no file is opened yet.

    Raises:
        ValueError: The package that reads them is not installed.
    """
    assert scan.places is not None
    if scan.holder == "objects":
        assert scan.paths is not None
        return ObjectSource(scan.root, scan.paths, None, scan.places)
    assert scan.file_stamps is not None
    if scan.holder == "groups":
        with needs("pyarrow"):
            from .tables import GroupSource

        return GroupSource(scan.root, scan.files, scan.file_stamps, scan.places, scan.column)
    read = ObjectSource if is_remote(scan.root) else RangeSource
    return read(scan.root, scan.files, scan.file_stamps, scan.places)
