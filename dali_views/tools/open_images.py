"""Which kind of data set a name on the command line is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice

from ..data.index import SampleIndex
from ..data.listing import EXTENSIONS
from ..data.lmdb_store import names_lmdb
from ..data.shards import SHARD, TABLE, is_list, lines_of
from ..system.files import PathLike

_SHARDS, _TABLES, _LMDB, _LIST, _FOLDER = "tar shards", "tables", "an LMDB environment", "a list", "a folder"


def open_images(
    where: Sequence[str],
    coco: PathLike | None = None,
    root: PathLike | None = None,
    image: str | None = None,
    label: str | None = None,
) -> SampleIndex:
    """Indexes what was named, by its ending and by what it is: a folder, tar shards, tables, LMDB, or a list.

    Args:
        where: One name; of containers (shards, tables) also several, as a shell expands a pattern.
        coco: Instances file, for a folder.
        root: Where the paths of a list start.
        image, label: Columns of tables.

    Raises:
        ValueError: Several names that are not all containers of one kind; an argument that is not for this
            kind; or as by the constructors of `SampleIndex`, as is FileNotFoundError.
    """
    first, kind = where[0], _kind(where, coco)
    for name, value, of in (("root", root, _LIST), ("image", image, _TABLES), ("label", label, _TABLES)):
        if value is not None and kind != of:
            raise ValueError(f"--{name} is for {of}, and {first!r} is taken for {kind}; leave it out.")
    if kind == _SHARDS:
        return SampleIndex.from_shards(where)
    if kind == _TABLES:
        return SampleIndex.from_table(where if len(where) > 1 else first, image, label)
    if len(where) > 1:
        raise ValueError(
            f"Only of tar shards and of tables there may be several; {first} and the others are neither."
        )
    if coco is not None:
        return SampleIndex.from_coco(first, coco)
    if kind == _LMDB:
        return SampleIndex.from_lmdb(first)
    if kind == _LIST:
        return SampleIndex.from_list(first, root)
    return SampleIndex.from_folder(first)


def _kind(where: Sequence[str], coco: PathLike | None) -> str:
    if coco is not None:
        return _FOLDER
    if all(map(_names_shards, where)):
        return _SHARDS
    if all(map(_names_tables, where)):
        return _TABLES
    if names_lmdb(where[0]):
        return _LMDB
    return _LIST if is_list(where[0]) else _FOLDER


def _names_shards(path: PathLike, ending: re.Pattern[str] = SHARD) -> bool:
    """Whether the name is one of a tar, of several, or of a list of them, rather than of images."""
    if os.path.isdir(path):
        return False
    if ending.search(os.path.basename(path)):
        return True
    return is_list(path) and any(ending.search(line) for line in islice(lines_of(path), 1))


def _names_tables(path: PathLike) -> bool:
    """Whether the name is one of a table, of several, of a list of them, or of a folder with nothing else."""
    if not os.path.isdir(path):
        return _names_shards(path, TABLE)
    # Files that writers of tables leave beside them begin so: _SUCCESS, .part-0.parquet.crc.
    names = [name for name in os.listdir(path) if name[0] not in "._"]
    others = any(os.path.splitext(name)[1].lower() in (*EXTENSIONS, "") for name in names)
    return not others and any(map(TABLE.search, names))
