"""Parquet and Arrow files: opened if they are as they were, and read group by group.

A group is a row group of a Parquet file or a record batch of an Arrow file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .source import open_stamped

_ARROW, _PARQUET = b"ARROW1", b"PAR1"  # what the files begin with
_FOOTERS = 64  # of Parquet files, kept parsed: one with thousands of row groups takes as long as a group


class _Read(io.FileIO):
    """A file that keeps the longest piece that was read of it, to know where a column lies.

    pyarrow can tell that, too, but to ask it for the place of a column in damaged metadata ends the process.
    """

    piece: tuple[int, bytes] = (0, b"")
    """Where it starts, and what it holds."""

    def read(self, size: int | None = -1, /) -> bytes:
        start = self.tell()
        content = super().read(-1 if size is None else size) or b""
        if len(content) > len(self.piece[1]):
            self.piece = start, content
        return content


@dataclass(frozen=True)
class TableFile:
    """An open table."""

    schema: pa.Schema
    groups: int
    rows: Callable[[int], int] | None
    """Of a group; None where that is only known after reading it."""
    read: Callable[[int, Sequence[str]], tuple[pa.Table, tuple[int, bytes]]]
    """Some columns of a group, of a struct's field "image.bytes" a struct with no more than needed; and the
    longest piece of the file that this took, with where it starts."""


def open_file(path: str, stamp: tuple[int, int] | None = None) -> _Read:
    """See `open_stamped`."""
    return _Read(open_stamped(path, stamp))


@contextmanager
def open_table(path: str, stamp: tuple[int, int]) -> Iterator[TableFile]:
    """Opens a Parquet file or an Arrow file (no stream, which can only be read from its start).

    Raises:
        OSError: There is none, it has changed (see `open_file`), it is neither, or damaged.
    """
    with open_file(path, stamp) as file, damage_as_os_error():
        start = file.read(len(_ARROW))
        if start.startswith(_PARQUET):
            yield _parquet(file, _footer(path, *stamp))
        elif start == _ARROW:
            yield _arrow(file)
        else:
            raise OSError("neither a Parquet nor an Arrow file")


@contextmanager
def damage_as_os_error() -> Iterator[None]:
    """Whatever pyarrow stumbles over in a damaged file becomes an OSError."""
    try:
        yield
    except (pa.ArrowException, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        what = "too large for the memory" if isinstance(error, MemoryError) else "damaged"
        raise OSError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


@lru_cache(_FOOTERS)
def _footer(path: str, size: int, mtime_ns: int) -> Any:
    with open_file(path, (size, mtime_ns)) as file:
        return pq.read_metadata(file)


def _parquet(file: _Read, footer: Any) -> TableFile:
    parquet = pq.ParquetFile(file, metadata=footer, pre_buffer=False)

    def read(group: int, columns: Sequence[str]) -> tuple[pa.Table, tuple[int, bytes]]:
        if group >= parquet.num_row_groups:
            raise IndexError(f"it has no row group {group}")
        file.piece = 0, b""
        return parquet.read_row_group(group, columns=list(columns), use_threads=False), file.piece

    return TableFile(
        parquet.schema_arrow, parquet.num_row_groups, lambda group: read(group, [])[0].num_rows, read
    )


def _arrow(file: _Read) -> TableFile:
    whole = pa.ipc.open_file(file)
    names = whole.schema.names

    def read(group: int, columns: Sequence[str]) -> tuple[pa.Table, tuple[int, bytes]]:
        tops = {column if column in names else column.rpartition(".")[0] for column in columns}
        fields = [number for number, name in enumerate(names) if name in tops]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        file.piece = 0, b""
        batch = pa.ipc.open_file(file, options=options).get_batch(group)
        batch.validate(full=True)
        return pa.Table.from_batches([batch]), file.piece

    return TableFile(whole.schema, whole.num_record_batches, None, read)


def leaf(part: Any, column: str) -> Any:
    """A column of a table or a batch, or a struct's field, null where the struct is."""
    if column in part.schema.names:
        return part.column(column)
    top, _, field = column.rpartition(".")
    return pc.struct_field(part.column(top), field)


def byte_arrays(column: pa.ChunkedArray) -> list[NDArray[np.uint8] | None]:
    """The values of a binary column as views of its memory, which they keep alive; None for null."""
    values: list[NDArray[np.uint8] | None] = []
    for chunk in column.chunks:
        plain = chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk
        array = plain.cast(pa.large_binary())
        data = array.buffers()[2]
        content = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        ends = value_ends(array).tolist()
        there = array.is_valid().to_pylist()
        values += [
            content[start:end] if valid else None
            for start, end, valid in zip(ends, ends[1:], there, strict=False)
        ]
    return values


def value_ends(array: pa.Array) -> NDArray[np.int64]:
    """(n + 1,) where the values of a binary array start in its data, and where the last ends.

    Raises:
        ValueError: They lead out of the data.
    """
    kind = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    offsets, data = array.buffers()[1:]
    if not len(array):
        return np.zeros(1, np.int64)
    ends = np.frombuffer(offsets, kind)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    if len(ends) <= len(array) or ends[0] < 0 or (np.diff(ends) < 0).any():
        raise ValueError("offsets of values are not in order")
    if ends[-1] > (0 if data is None else data.size):
        raise ValueError("a value leads out of its data")
    return ends
