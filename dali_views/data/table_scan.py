"""Which images Parquet and Arrow tables hold: which tables, which columns, where their images lie."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..system.files import PathLike
from .group_source import KEPT_BYTES
from .headers import look_through, size_of
from .remote import is_remote
from .scan import Scan, ScanCache
from .shards import TABLE, list_shards, merge
from .source import reason
from .table_columns import Columns, choose
from .table_look import Job, scan_table, schema_of

_FEW = 16  # images of a group that may be read for the sake of one without a warning


def scan_tables(
    pattern: PathLike | Sequence[PathLike],
    image: str | None,
    label: str | None,
    cache: bool | PathLike,
    processes: int | None,
    progress: bool,
) -> Scan:
    """The images in tables; if no table has changed, none is opened. See `SampleIndex.from_table`."""
    paths = _tables(pattern)
    if any(map(is_remote, paths)):
        raise ValueError(
            "Tables are read from local files alone; copy them, or pack the images as tar shards."
        )
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = [os.path.relpath(path, root) for path in paths]
    place = ScanCache(cache, root, ["tables", files, image, label], Scan)
    scanned = place.kept
    if scanned is None or not scanned.holds():
        scanned = _scan(root, files, paths, image, label, processes, progress)
        place.keep(scanned)
    if told := _slow(scanned):
        warnings.warn(told, stacklevel=3)
    return scanned


def _tables(pattern: PathLike | Sequence[PathLike]) -> list[str]:
    """Absolute paths of the tables that are meant."""
    if not isinstance(pattern, (str, os.PathLike)) or not os.path.isdir(pattern):
        return list_shards(pattern, TABLE)
    names = sorted(name for name in os.listdir(pattern) if TABLE.search(name))
    # Beside a set that was saved there may lie what was computed of it.
    saved = [name for name in names if re.fullmatch(r"data-\d+-of-\d+\.arrow", name)]
    if not names:
        raise FileNotFoundError(
            f"The folder {os.fspath(pattern)!r} holds no table (.parquet, .arrow); name the tables, or the "
            "folder of one split."
        )
    return [os.path.abspath(os.path.join(pattern, name)) for name in saved or names]


def _scan(
    root: str,
    files: list[str],
    paths: list[str],
    image: str | None,
    label: str | None,
    processes: int | None,
    progress: bool,
) -> Scan:
    columns = _columns(paths, image, label)
    jobs = [Job(path, columns, True) for path in paths]
    found = look_through(scan_table, jobs, size_of(paths), processes, "tables", progress)
    ranged = all(table.ranged for table in found if len(table.images.names))
    if not ranged:  # for all images one kind of place
        again = [i for i, table in enumerate(found) if table.ranged and len(table.images.names)]
        jobs = [Job(paths[i], columns, False) for i in again]
        more = look_through(scan_table, jobs, size_of(paths), processes if again else 0, "tables", progress)
        for i, table in zip(again, more, strict=True):
            found[i] = table
    scanned = merge(root, files, [table.images for table in found], "tables")
    if columns.classes is not None:
        if len(scanned.classes) > len(columns.classes):
            raise ValueError(
                f"The column {columns.label!r} has labels up to {len(scanned.classes) - 1}, but names of "
                f"{len(columns.classes)} classes; mend the tables."
            )
        scanned = replace(scanned, classes=columns.classes)
    return scanned if ranged else replace(scanned, holder="groups", column=columns.image)


def _columns(paths: list[str], image: str | None, label: str | None) -> Columns:
    """The columns to read, by the first table that can be opened."""
    told = "no such file"
    for path in paths:
        try:
            return choose(schema_of(path), image, label)
        except OSError as error:
            told = reason(error)
    raise ValueError(f"None of the {len(paths)} tables can be read ({paths[-1]}: {told}); check the path.")


def _slow(scanned: Scan) -> str:
    """What there is to say of reading the images in random order, or ""."""
    if scanned.holder != "groups" or scanned.places is None or scanned.file_stamps is None:
        return ""
    groups = len(np.unique(scanned.places[:, 0] << 32 | scanned.places[:, 1]))
    total = int(scanned.file_stamps[:, 0].clip(0).sum())
    if len(scanned.places) <= _FEW * groups or total <= KEPT_BYTES:
        return ""
    return (
        f"The tables below {scanned.root!r} keep about {len(scanned.places) / groups:.0f} images in a group, "
        f"read and decoded as a whole: in random order, {total / groups / 1e6:.1f} MB for each image "
        f"of {total / len(scanned.places) / 1e3:.0f} kB. Before training, copy them to tar shards: "
        "`dali-views pack TABLE SHARDS`."
    )
