"""Which kind of data set a name on the command line is."""

from __future__ import annotations

from collections.abc import Sequence

from .atomic import PathLike
from .index import SampleIndex
from .sources.lmdb_scan import names_lmdb
from .sources.shard_list import is_list, names_shards, names_tables


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
        ValueError: Several names that are not all containers of one kind; or as by the constructors of
            `SampleIndex`, as is FileNotFoundError.
    """
    first = where[0]
    if coco is None and all(map(names_shards, where)):
        return SampleIndex.from_shards(where)
    if coco is None and all(map(names_tables, where)):
        return SampleIndex.from_table(where if len(where) > 1 else first, image, label)
    if len(where) > 1:
        raise ValueError(
            f"Only of tar shards and of tables there may be several; {first} and the others are neither."
        )
    if coco is not None:
        return SampleIndex.from_coco(first, coco)
    if names_lmdb(first):
        return SampleIndex.from_lmdb(first)
    if is_list(first):
        return SampleIndex.from_list(first, root)
    return SampleIndex.from_folder(first)
