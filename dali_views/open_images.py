"""Which kind of data set a name on the command line is."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .atomic import PathLike
from .index import SampleIndex
from .shard_list import names_shards


def open_images(
    where: Sequence[str], coco: PathLike | None = None, root: PathLike | None = None
) -> SampleIndex:
    """Indexes what was named, by its ending and by what it is: a folder, tar shards, or a list of files.

    Args:
        where: One name; of containers (shards) also several, as a shell expands a pattern.
        coco: Instances file, for a folder.
        root: Where the paths of a list start.

    Raises:
        ValueError: Several names that are not all containers of one kind; or as by the constructors of
            `SampleIndex`, as is FileNotFoundError.
    """
    first = where[0]
    if coco is None and all(map(names_shards, where)):
        return SampleIndex.from_shards(where)
    if len(where) > 1:
        raise ValueError(f"Only of tar shards there may be several; {first} and the others are none.")
    if coco is not None:
        return SampleIndex.from_coco(first, coco)
    if os.path.isfile(first):
        return SampleIndex.from_list(first, root)
    return SampleIndex.from_folder(first)
