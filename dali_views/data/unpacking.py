"""Unpacking: how much memory a table takes, known before it is unpacked.

A few bytes of zstd may stand for gigabytes, a dictionary has a value once for any number of rows, and the
sizes in a footer may be wrong. So the headers of pages and messages are read here, which pyarrow does not
show: those of Parquet in Thrift's compact protocol (parquet-format, parquet.thrift, PageHeader), those of
Arrow as FlatBuffers (Arrow, Message.fbs). Encoded images hardly shrink: what unpacks to more than 20 times
its bytes, and to more than 64 MB, is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from .source import SPARE_BYTES

_TIMES = 20  # its bytes, or SPARE_BYTES if this is more, is what a group may unpack to
_BATCH = 16 << 20  # bytes that are unpacked at a time where few may stand for many
_ROW = 500  # bytes that a row takes in a scan, whatever it holds
_HEADS = 1 << 12, 1 << 24  # bytes that are read for the header of a page; Arrow reads at most the second
_DICTIONARY, _PREFIXES = (2, 8), 7  # encodings in which few bytes repeat long values
_DEPTH = 4  # of structs in the header of a page


def most_unpacked(size: int) -> int:
    """Bytes that `size` bytes of a table may unpack to."""
    return max(SPARE_BYTES, _TIMES * size)


def check_rows(rows: int, size: int) -> None:
    """A ValueError for more rows than a table of `size` bytes can hold."""
    if _ROW * rows > most_unpacked(size):
        raise ValueError(f"it claims {rows} rows, more than its {size} bytes can hold")


def read_group(file: IO[bytes], size: int, parquet: Any, group: int, columns: Sequence[str]) -> Any:
    """Columns of a row group of a `pq.ParquetFile` of `size` bytes; a ValueError if they are too large."""
    described = parquet.metadata.row_group(group)
    if not described.num_rows:
        return parquet.schema_arrow.empty_table()  # where its pages should be, there may be others
    packed, unpacked, widest = 0, 0, 0
    for number in range(described.num_columns):
        column = described.column(number)
        if not any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns):
            continue
        start, length = _extent(column)
        if not 0 <= start <= start + length <= size:
            raise ValueError("a column lies behind the end of the file")
        pages = list(_pages(file, start, start + length))
        packed += length
        unpacked += sum(page.size for page in pages)
        if any(page.encoding in (*_DICTIONARY, _PREFIXES) for page in pages):
            widest = max(widest, *(page.size for page in pages))
    most = most_unpacked(packed)
    if unpacked > most:
        raise ValueError(f"its {packed} bytes claim to unpack to {unpacked}, more than images do")
    if not widest:
        return parquet.read_row_group(group, columns, use_threads=False)
    # A value has at most the bytes of a page, so that a batch of so many rows stays small.
    rows, total, batches = max(1, _BATCH // widest), 0, []
    for batch in parquet.iter_batches(rows, [group], columns, use_threads=False):
        batches.append(batch)
        total += batch.nbytes
        if total > most:
            raise ValueError(f"its {packed} bytes unpack to more than {most}, more than images do")
    return pa.Table.from_batches(batches)


def _extent(column: Any) -> tuple[int, int]:
    """First byte and length of the pages of a column, as Arrow's reader finds them."""
    start, dictionary = column.data_page_offset, column.dictionary_page_offset or 0
    return dictionary if 0 < dictionary < start else start, column.total_compressed_size


class _Page(NamedTuple):
    size: int  # bytes, unpacked
    encoding: int


def _pages(file: IO[bytes], start: int, stop: int) -> Iterator[_Page]:
    """The pages from a byte of a file to another, by their headers."""
    while start < stop:
        header, length = _header(file, start)
        size, packed = header[2], header[3]
        if not (isinstance(size, int) and isinstance(packed, int) and size >= 0 <= packed):
            raise ValueError("a page without a size")
        data, field = (header[5], 2) if 5 in header else (header.get(8, {}), 4)
        yield _Page(size, data.get(field, 0) if isinstance(data, dict) else 0)
        start += length + packed


def _header(file: IO[bytes], start: int) -> tuple[dict[int, Any], int]:
    """Fields of the header of a page by number, and its length."""
    for most in _HEADS:
        file.seek(start)
        content = file.read(most)
        try:
            return _struct(content, 0, 0)
        except IndexError:
            continue  # longer than what was read
    raise ValueError("the header of a page has no end")


def _struct(content: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while head := content[at]:
        step, kind, at = head >> 4, head & 15, at + 1
        number = number + step
        if not step:
            number, at = _number(content, at)
        if kind in (1, 2):
            value: Any = kind == 1
        elif kind in (4, 5, 6):
            value, at = _number(content, at)
        elif kind == 8:
            length, at = _varint(content, at)
            value, at = None, at + length  # a bound of the statistics
        elif kind == 12 and depth < _DEPTH:
            value, at = _struct(content, at, depth + 1)
        else:
            raise ValueError("the header of a page has a field that it cannot have")
        fields[number] = value
    return fields, at + 1


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return value, at
    raise ValueError("the header of a page has a number without an end")


def _number(content: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(content, at)
    return value >> 1 ^ -(value & 1), at


def is_compressed(stream: Any) -> bool:
    """Whether an Arrow stream (a buffer) has a compressed message before its first damage."""
    try:
        return any(_compression(message) for message in pa.ipc.MessageReader.open_stream(stream))
    except (pa.ArrowException, OSError, struct.error):
        return False


def _compression(message: Any) -> bool:
    """Whether the record batch in a message has the field 3, `compression`."""
    content = memoryview(message.metadata)
    header = _followed(content, _field(content, _followed(content, 0), 2))
    if message.type == "dictionary":
        header = _followed(content, _field(content, header, 1))
    return message.type != "schema" and _field(content, header, 3) > 0


def _field(content: memoryview, table: int, number: int) -> int:
    """Where a field of a table begins, 0 if it is absent."""
    places = table - struct.unpack_from("<i", content, table)[0]
    if 6 + 2 * number > struct.unpack_from("<H", content, places)[0]:
        return 0
    offset: int = struct.unpack_from("<H", content, places + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _followed(content: memoryview, at: int) -> int:
    return at + int(struct.unpack_from("<I", content, at)[0])


def check_words(column: Any) -> None:
    """A ValueError if a dictionary stands for words of more bytes than a column of so many rows has."""
    worded = pa.types.is_dictionary(column.type) and not pa.types.is_integer(column.type.value_type)
    chunks = column.chunks if worded else ()
    total = sum(pc.sum(pc.binary_length(one.dictionary).take(one.indices)).as_py() or 0 for one in chunks)
    if total > max(SPARE_BYTES, _ROW * len(column)):
        raise ValueError(f"the words of its {len(column)} rows have {total} bytes")
