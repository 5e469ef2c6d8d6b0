"""What one Parquet or Arrow table holds: its rows, looked at one by one."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .headers import inspect
from .names import may_be_name, pack_names
from .scan import stamp_of
from .shards import Shard
from .source import Window, of_handle, reason
from .table_columns import Columns
from .table_file import byte_arrays, damage_as_os_error, leaf, open_file, open_table, value_ends

_FILE, _STREAM = b"ARROW1", b"\xff\xff\xff\xff"  # what both Arrow formats begin with
_LENGTH = 4  # bytes before each value in plain Parquet that tell its length

_Pair: TypeAlias = tuple[int, int]
_Header: TypeAlias = tuple[int, int, str]
"""Height, width and why the image cannot be used, or ""."""


@dataclass(frozen=True, eq=False)
class Table:
    """The usable images of one table."""

    images: Shard
    ranged: bool
    """Whether their places are offsets and bytes in the file; else they are groups and rows in them."""


def schema_of(path: str) -> pa.Schema:
    """The columns of a table.

    Raises:
        OSError: There is none, it is neither a Parquet nor an Arrow file or stream, or it is damaged.
    """
    if _start(path) in (_FILE, _STREAM):
        with pa.memory_map(path) as mapped, damage_as_os_error():
            return _batches(mapped).schema
    with open_table(path, stamp_of(path)) as table:
        return table.schema


class Job(NamedTuple):
    """What to look for in a table."""

    path: str
    columns: Columns
    ranged: bool
    """Whether images that lie in the file as they are may be told by offsets and bytes."""


def scan_table(job: Job) -> Table:
    """Looks through one table; never raises for a bad one. What is whole in a damaged one counts."""
    path, columns, ranged = job
    found, stamp = _Found(), (-1, -1)
    try:
        start, stamp = _start(path), stamp_of(path)
        if ranged and start in (_FILE, _STREAM):
            ranged = _by_ranges(path, stamp, columns, found)
        elif ranged:
            ranged = _by_groups(path, stamp, columns, found, ranged=True)
        if not ranged:
            if start == _STREAM:
                raise OSError(
                    "no image of this Arrow stream can be read alone, for it is compressed or stands beside "
                    "other tables; write it as Parquet"
                )
            found = _Found()
            _by_groups(path, stamp, columns, found, ranged=False)
    except OSError as error:
        found.lost.append(("", reason(error)))
    return Table(found.shard(stamp), ranged)


def _start(path: str) -> bytes:
    with open_file(path) as file:
        start = file.read(len(_FILE))
    return _STREAM if start.startswith(_STREAM) else start


@dataclass
class _Found:
    """What has been found of a table so far."""

    row: int = 0
    """How many rows there were."""
    paths: list[bytes] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[_Pair] = field(default_factory=list)
    sizes: list[_Pair] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    refused: list[tuple[int, bytes, str]] = field(default_factory=list)
    """Row, path and reason."""
    lost: list[tuple[str, str]] = field(default_factory=list)
    """Of what is more than an image, "" for the table, the reason."""

    def add(self, part: Any, columns: Columns, images: Iterable[tuple[_Pair, _Header] | None]) -> None:
        """The rows of a group, and of each where its image lies and the header; None where there is none."""
        paths = [None] * part.num_rows if columns.path is None else _texts(leaf(part, columns.path))
        labels = [None] * part.num_rows if columns.label is None else _words(leaf(part, columns.label))
        for i, image in enumerate(images):
            place, (height, width, refused) = image or ((0, 0), (0, 0, "no bytes, at most a path"))
            if refused:
                self.refused.append((self.row + i, paths[i] or b"", refused))
            else:
                self.paths.append(paths[i] or b"")
                self.rows.append(self.row + i)
                self.places.append(place)
                self.sizes.append((height, width))
                self.labels.append(labels[i])
        self.row += part.num_rows

    def shard(self, stamp: _Pair) -> Shard:
        """All rows, under their paths if these are different and may be names, else under their numbers."""
        told = self.paths + [path for _, path, _ in self.refused]
        by_path = len(set(told)) == len(told) and all(map(may_be_name, told))
        names = self.paths if by_path else [b"row %d" % row for row in self.rows]
        refused = [(os.fsdecode(path) if by_path else f"row {row}", why) for row, path, why in self.refused]
        words = sorted({label for label in self.labels if label is not None})
        number = {word: i for i, word in enumerate(words)}
        return Shard(
            stamp=stamp,
            names=pack_names(names) if names else np.zeros((0, 1), np.uint8),
            places=np.array(self.places, np.int64).reshape(-1, 2),
            sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
            words=words,
            word=np.array([-1 if label is None else number[label] for label in self.labels], np.int32),
            left_out=refused + self.lost,
        )


def _by_ranges(path: str, stamp: _Pair, columns: Columns, found: _Found) -> bool:
    """Adds the images of an Arrow file or stream; False if they do not lie in it as they are."""
    with pa.memory_map(path) as mapped, open_file(path, stamp) as file:
        whole = mapped.read_buffer(stamp[0])
        with damage_as_os_error():
            batches = _batches(mapped)
        if told := columns.absent(batches.schema):
            raise OSError(told)

        def look(place: _Pair) -> _Header:
            return inspect(io.BufferedReader(Window(of_handle(file.fileno()), *place)), place[1])

        try:
            with damage_as_os_error():
                for batch in batches:
                    batch.validate(full=True)
                    places = _ranges(leaf(batch, columns.image), whole)
                    if places is None:
                        return False
                    found.add(batch, columns, ((place, look(place)) if place else None for place in places))
            marked = os.pread(file.fileno(), len(_FILE), 0) == _FILE
            if marked and os.pread(file.fileno(), len(_FILE), stamp[0] - len(_FILE)) != _FILE:
                raise OSError("cut off")
        except OSError as error:
            found.lost.append(("", f"{reason(error)}; the {found.row} rows before are used"))
    return True


def _batches(mapped: Any) -> Any:
    """The batches of an Arrow file or stream in their order; the former's footer is not needed."""
    mapped.seek(0)
    mapped.seek(8 if mapped.read(len(_FILE)) == _FILE else 0)
    return pa.ipc.open_stream(mapped)


def _ranges(column: pa.Array, whole: pa.Buffer) -> list[_Pair | None] | None:
    """(offset, bytes) in the mapped file of each value, None for null; None if they do not lie there."""
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return None
    data, ends = column.buffers()[2], value_ends(column)
    start = data.address - whole.address if data is not None else 0
    if start < 0 or start + int(ends[-1]) > whole.size:
        return None
    pairs = zip((start + ends[:-1]).tolist(), np.diff(ends).tolist(), strict=True)
    there = column.is_valid().to_pylist()
    return [pair if valid else None for pair, valid in zip(pairs, there, strict=True)]


def _by_groups(path: str, stamp: _Pair, columns: Columns, found: _Found, ranged: bool) -> bool:
    """Adds the images of a table by decoding its groups.

    Args:
        ranged: Their places are to be offsets and bytes.

    Returns:
        False if they are, but the images do not lie in the file as they are.
    """
    wanted = [name for name in (columns.image, columns.path, columns.label) if name is not None]
    with open_table(path, stamp) as table:
        if told := columns.absent(table.schema):
            raise OSError(told)
        for group in range(table.groups):
            try:
                with damage_as_os_error():
                    part, piece = table.read(group, wanted)
                    images = byte_arrays(leaf(part, columns.image))
                    rows = [(group, row) for row in range(len(images))]
                    places = _places_in(*piece, images) if ranged else rows
                    if places is None:
                        return False
                    looked = zip(places, images, strict=True)
                    found.add(
                        part, columns, [None if i is None else (place, _look(i)) for place, i in looked]
                    )
            except OSError as error:
                if table.rows is None:
                    raise OSError(f"{error}; the {found.row} rows before are used") from error
                lost = table.rows(group)
                found.lost.append((f"row group {group}", f"{reason(error)}; its {lost} rows are lost"))
                found.row += lost
    return True


def _places_in(start: int, piece: bytes, images: list[NDArray[np.uint8] | None]) -> list[_Pair] | None:
    """Where each image stands byte by byte in a piece of a file that starts there; None if one does not."""
    places, at = [], 0
    for image in images:
        if image is None:  # of which there is nothing in the file
            places.append((0, 0))
            continue
        content = image.tobytes()
        found = at + _LENGTH if piece.startswith(content, at + _LENGTH) else piece.find(content, at)
        if found < 0 and (found := piece.find(content)) < 0:  # of equal images, one may stand for all
            return None
        places.append((start + found, len(content)))
        at = max(at, found + len(content))
    return places


def _look(image: NDArray[np.uint8]) -> _Header:
    return inspect(io.BytesIO(image.data), len(image))


def _texts(column: Any) -> list[bytes | None]:
    """Text as bytes, for what should be UTF-8 in a file need not be."""
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    texts: list[bytes | None] = plain.cast(pa.large_binary()).to_pylist()
    return texts


def _words(column: Any) -> list[str | None]:
    """Labels, words or numbers in figures."""
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    if pa.types.is_integer(plain.type):
        return [None if number is None else str(number) for number in plain.to_pylist()]
    return [None if text is None else os.fsdecode(text) for text in _texts(plain)]
