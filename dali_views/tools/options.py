"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from ..data.index import SampleIndex
from ..data.listing import EXTENSIONS
from ..data.lmdb_store import names_lmdb
from ..data.shards import SHARD, TABLE, is_list, lines_of
from ..plan import recipes
from ..system.files import PathLike

_SHARDS, _TABLES, _LMDB, _LIST, _FOLDER = "tar shards", "tables", "an LMDB environment", "a list", "a folder"


def add_images(parser: argparse.ArgumentParser) -> None:
    """Which images; `open_index` opens them."""
    parser.add_argument(
        "images",
        nargs="+",
        help="folder of images, text file that lists them, tar shards, Parquet or Arrow tables, or LMDB; "
        "all but tables and LMDB also as a URL (s3://, gs://)",
    )
    parser.add_argument(
        "--coco", type=Path, metavar="JSON", help="instances file with true boxes for the folder"
    )
    parser.add_argument("--root", metavar="DIR", help="where a list's paths start (default: its own folder)")
    parser.add_argument(
        "--image", metavar="COLUMN", help="in tables: the column of images (default: the only one that fits)"
    )
    parser.add_argument(
        "--label", metavar="COLUMN", help="in tables: the column of labels (default: label or similar)"
    )
    parser.add_argument(
        "--leave-out",
        type=Path,
        metavar="LIST",
        help="list of files to leave out, as written by `check` or a run",
    )


def add_views(parser: argparse.ArgumentParser) -> None:
    """Which views of them, on which device."""
    names = sorted(recipes.BY_NAME)
    parser.add_argument("--recipe", default="moco_v2", choices=names, help="set of views (moco_v2)")
    parser.add_argument("--size", type=at_least(1), default=224, help="side of a (global) view, pixels (224)")
    add_device(parser)
    parser.add_argument("--seed", type=at_least(0), default=0)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where images are decoded; see `device`."""
    parser.add_argument("--device", choices=["gpu", "cpu"], help="default: gpu if there is one")


def open_index(args: argparse.Namespace) -> SampleIndex:
    """The images that were named, without those to leave out."""
    index = open_images(args.images, args.coco, args.root, args.image, args.label)
    return index if args.leave_out is None else index.without(args.leave_out)


def open_images(
    where: Sequence[str],
    coco: PathLike | None = None,
    root: PathLike | None = None,
    image: str | None = None,
    label: str | None = None,
) -> SampleIndex:
    """Indexes what was named, by its ending and by what it is; see `add_images`.

    Args:
        where: One name; of shards and tables also several, as a shell expands a pattern.

    Raises:
        ValueError: Several names of other things, an argument that is not for this kind of data set, or as
            by the constructors of `SampleIndex`, as is FileNotFoundError.
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


def device(args: argparse.Namespace) -> str:
    """``"gpu"`` or ``"cpu"``."""
    import torch

    return str(args.device or ("gpu" if torch.cuda.is_available() else "cpu"))


def at_least(least: int) -> Callable[[str], int]:
    """A `type` for argparse: integers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"{value} is too large")
        return value

    return number
