"""Parquet and Arrow tables: which columns hold images, where each image lies, and what reads it.

Images of uncompressed Arrow lie in the file as they are: the scan finds their offsets in the mapped file, and
they are read like pieces of tar shards. To read an image of Parquet, its row group is decoded; a few groups
stay in memory.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from typing_extensions import Unpack

from ..system.files import PathLike
from .cache import MemoryCache
from .headers import inspect, look_through, size_of
from .remote import is_remote
from .scan import Options, Scan, ScanCache, may_be_name, stamp_of
from .shards import TABLE, Shard, list_shards, merge, shard_of
from .source import RangeSource, open_stamped, reason
from .unpacking import check_rows, check_words, is_compressed, read_group

_LABELS = ("label", "labels", "cls", "class", "fine_label")
_BINARY, _WORDS = ("binary", "large_binary"), ("integer", "string", "large_string")
_FILE, _STREAM, _PARQUET = b"ARROW1", b"\xff\xff\xff\xff", b"PAR1"  # the first bytes of each format
_FOOTERS = 64  # of Parquet files, kept parsed: one of thousands of groups takes as long as a group
_FEW = 16  # images of a group that may be decoded for the sake of one without a warning
KEPT_BYTES = int(os.environ.get("DALI_VIEWS_GROUP_MB", "256")) << 20
"""Groups that a process keeps, over all indexes; $DALI_VIEWS_GROUP_MB, by default 256 MB."""


class _Table(NamedTuple):
    kinds: dict[str, str]  # types of columns, and of fields of structs as "image.bytes"
    metadata: dict[bytes, bytes]
    rows: list[int]  # of each group
    read: Callable[[int, list[str]], Any]  # of a group, these columns or more, flattened
    whole: Any = None  # the mapped file, of which the groups of Arrow are views
    cut: str = ""  # why groups at the end are missing


@contextmanager
def _open(path: str, stamp: tuple[int, int]) -> Iterator[_Table]:
    """A table; OSError if it has changed since its stamp, is damaged, or is none."""
    with open(open_stamped(path, stamp), "rb") as file:
        with _damage():
            start = file.read(6)
            if start.startswith(_PARQUET):
                table = _parquet(file, stamp[0], _footer(path, stamp))
            elif start == _FILE or start.startswith(_STREAM):
                table = _arrow(file, start == _FILE)
            else:
                raise OSError("neither a Parquet nor an Arrow file")
        yield table


def _parquet(file: Any, size: int, footer: Any) -> _Table:
    parquet = pq.ParquetFile(file, metadata=footer, pre_buffer=False)
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    check_rows(sum(rows), size)
    kinds = _described(parquet.schema_arrow)
    return _Table(*kinds, rows, lambda *job: read_group(file, size, parquet, *job).flatten())


@lru_cache(_FOOTERS)
def _footer(path: str, stamp: tuple[int, int]) -> Any:
    with open(open_stamped(path, stamp), "rb") as file:
        return pq.read_metadata(file)


def _arrow(file: Any, is_file: bool) -> _Table:
    """An Arrow file or stream; both are read as a stream, which needs no footer."""
    # By number: the name may be another file by now.
    whole = pa.memory_map(f"/proc/self/fd/{file.fileno()}").read_buffer()
    part = whole[8:] if is_file else whole
    stream = pa.ipc.open_stream(part)
    batches: list[Any] = []
    cut = "cut off" if is_file and whole[-6:].to_pybytes() != _FILE else ""
    try:
        with _damage():
            if is_compressed(part):  # found out before anything is unpacked
                raise OSError("it is compressed, so that no image can be read alone; write it as Parquet")
            for batch in stream:
                batch.validate(full=True)  # the offsets are used as they stand in the file
                batches.append(pa.Table.from_batches([batch]).flatten())
    except OSError as error:
        cut = reason(error)
    rows = [batch.num_rows for batch in batches]
    return _Table(*_described(stream.schema), rows, lambda group, _: batches[group], whole, cut)


def _described(schema: Any) -> tuple[dict[str, str], dict[bytes, bytes]]:
    kinds = {}
    for one in schema.empty_table().flatten().schema:
        inner = one.type.value_type if pa.types.is_dictionary(one.type) else one.type
        kind = one.type if str(inner) in _BINARY else inner  # a dictionary has equal images once
        kinds[one.name] = "integer" if pa.types.is_integer(kind) else str(kind)
    return kinds, schema.metadata or {}


@contextmanager
def _damage() -> Iterator[None]:
    """Whatever pyarrow raises for a damaged file becomes an OSError."""
    try:
        yield
    except (pa.ArrowException, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        what = "too large for the memory" if isinstance(error, MemoryError) else "damaged"
        raise OSError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


# Path or b"", label, place (offset and bytes, or group and row in it), and what `inspect` returns.
_Row: TypeAlias = tuple[bytes, str, tuple[int, int], tuple[int, int, str]]


class _Columns(NamedTuple):
    """The columns that a scan reads; a field of a struct has a dot, as "image.bytes"."""

    image: str
    path: str | None  # text, a name of each image
    label: str | None  # whole numbers or text
    classes: list[str] | None  # names of the numbers, from the metadata of Hugging Face's ClassLabel
    ranged: bool  # images lie in the file as they are


def _columns_of(table: _Table, image: str | None, label: str | None) -> _Columns:
    """The columns of a table; ValueError unless exactly one fits `image`, and `label` fits."""
    kinds = table.kinds
    fits = [name for name, kind in kinds.items() if kind in _BINARY]
    fits = [name for name in fits if image in (None, name, name.removesuffix(".bytes"))]
    fits = [name for name in fits if name == image or "." not in name or name.endswith(".bytes")]
    if len(fits) != 1:
        words = f"The columns {', '.join(map(repr, fits))} can all" if fits else "No column can"
        named = "" if image is None else f" of the name {image!r}"
        raise ValueError(
            f"{words} hold encoded images{named} (binary, or a struct with a binary field 'bytes'); the "
            f"columns are {', '.join(map(repr, kinds))}; "
            + ("name one of them as `image`." if fits or image else "choose a table of encoded images.")
        )
    if label is not None and kinds.get(label) not in _WORDS:
        raise ValueError(
            f"There is no column {label!r} of whole numbers or words; the columns are "
            f"{', '.join(map(repr, kinds))}; name another as `label`."
        )
    path = fits[0].removesuffix(".bytes") + ".path"
    classes = _class_names(table.metadata, label) if label and kinds[label] == "integer" else None
    has_path = kinds.get(path) in _WORDS[1:]
    return _Columns(fits[0], path if has_path else None, label, classes, table.whole is not None)


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    try:
        names: Any = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        "".join(names).encode()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) else None


def scan_tables(
    pattern: PathLike | Sequence[PathLike], image: str | None, label: str | None, **options: Unpack[Options]
) -> Scan:
    """The images in tables; if no table has changed, none is opened. See `SampleIndex.from_table`."""
    paths = _tables(pattern)
    if any(map(is_remote, paths)):
        raise ValueError("Tables are read from local files alone; copy them, or pack them as tar shards.")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = [os.path.relpath(path, root) for path in paths]
    place = ScanCache(root, ["tables", files, image, label], Scan, options)
    scanned = place.kept
    if scanned is None or not scanned.holds():
        columns = _columns(paths, image, label)
        jobs, progress = [(path, columns) for path in paths], options.get("progress", True)
        found = look_through(_scan_table, jobs, size_of(paths), options.get("processes"), "tables", progress)
        scanned = merge(root, files, found, "tables")
        classes = columns.classes or scanned.classes
        if len(classes) < len(scanned.classes):
            raise ValueError(
                f"The column {columns.label!r} has labels up to {len(scanned.classes) - 1}, but names of "
                f"{len(classes)} classes; correct the tables."
            )
        scanned = replace(scanned, classes=classes)
        if not columns.ranged:
            scanned = replace(scanned, holder="groups", column=columns.image)
        place.keep(scanned)
    if scanned.holder == "groups":
        _warn_if_slow(scanned, size_of(paths))
    return scanned


def _tables(pattern: PathLike | Sequence[PathLike]) -> list[str]:
    """Absolute paths of the tables."""
    if not isinstance(pattern, (str, os.PathLike)) or not os.path.isdir(pattern):
        return list_shards(pattern, TABLE)
    names = sorted(name for name in os.listdir(pattern) if TABLE.search(name))
    if not names:
        raise FileNotFoundError(f"The folder {os.fspath(pattern)!r} holds no table; name tables.")
    # Beside a saved set, Hugging Face keeps what was computed from it.
    saved = [name for name in names if re.fullmatch(r"data-\d+-of-\d+\.arrow", name)]
    return [os.path.abspath(os.path.join(pattern, name)) for name in saved or names]


def _columns(paths: list[str], image: str | None, label: str | None) -> _Columns:
    """The columns to read, from the first table that can be opened."""
    words = ""
    for path in paths:
        try:
            with _open(path, stamp_of(path)) as table:
                kinds = {name: table.kinds[name] for name in _LABELS if name in table.kinds}
        except OSError as error:
            words = reason(error)
            continue
        fits = [name for name, kind in kinds.items() if kind in _WORDS]
        if label is None and kinds and not fits:
            told = f"No labels: the column {min(kinds)!r} holds {kinds[min(kinds)]}, not numbers or words"
            warnings.warn(f"{told}; name another as `label`.", stacklevel=5)
        return _columns_of(table, image, label or next(iter(fits), None))
    raise ValueError(f"None of the {len(paths)} tables can be read ({paths[-1]}: {words}); check the path.")


def _scan_table(job: tuple[str, _Columns]) -> Shard:
    """The images in one table; never raises for a bad one. What is whole in a damaged one counts."""
    (path, columns), done = job, 0
    rows: dict[int, _Row] = {}
    stamp, lost = stamp_of(path), list[tuple[str, str]]()
    try:
        with _open(path, stamp) as table:
            if _columns_of(table, columns.image, columns.label) != columns:
                raise OSError("its format, columns or classes are not those of the first table")
            for group, count in enumerate(table.rows):
                try:
                    with _damage():
                        rows |= dict(enumerate(_rows(table, group, columns), done))
                except OSError as error:
                    lost.append((f"group {group}", f"{reason(error)}; its {count} rows are lost"))
                done += count
            if table.cut:
                raise OSError(f"{table.cut}; the {done} rows before are used")
    except (OSError, ValueError) as error:
        lost.append(("", reason(error)))
    # Rows have the names of their paths if these are different and may be names, else their numbers.
    paths = {path for path, *_ in rows.values()}
    by_path = len(paths) == len(rows) and all(map(may_be_name, paths))
    good, bad = [], []
    for number, (own, word, place, (height, width, refused)) in rows.items():
        name = os.fsdecode(own) if by_path else f"row {number}"
        if refused:
            bad.append((name, refused))
        else:
            good.append((name, word, *place, height, width))
    return shard_of(stamp, good, bad + lost)


def _rows(table: _Table, group: int, columns: _Columns) -> Iterator[_Row]:
    part, whole = table.read(group, [one for one in columns[:3] if one]), table.whole
    images = _views(part.column(columns.image))
    paths, labels = _texts(part, columns.path), _texts(part, columns.label)
    for row, (image, path, label) in enumerate(zip(images, paths, labels, strict=True)):
        look, place = (0, 0, "no bytes, at most a path"), (group, row)
        if image is not None:
            look = inspect(pa.BufferReader(image), image.size)
            place = place if whole is None else (image.address - whole.address, image.size)
        yield path or b"", os.fsdecode(label or b""), place, look


def _views(column: Any) -> Iterator[Any]:
    """The values of a binary column as buffers that share its memory, None for null."""
    for chunk in column.chunks:
        kind = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        _, ends, content = chunk.buffers()
        starts = np.frombuffer(ends, kind)[chunk.offset :][: len(chunk) + 1].tolist() if len(chunk) else []
        for start, end, there in zip(starts, starts[1:], chunk.is_valid().to_pylist(), strict=False):
            yield (content or pa.py_buffer(b"")).slice(start, end - start) if there else None


def _texts(part: Any, name: str | None) -> list[bytes | None]:
    """Text of a column as bytes, because in a file it need not be UTF-8; numbers as text."""
    if name is None:
        return [None] * part.num_rows
    column = part.column(name)
    check_words(column)
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    words = plain.cast(pa.string()) if pa.types.is_integer(plain.type) else plain
    return [*words.cast(pa.large_binary()).to_pylist()]


def _warn_if_slow(scan: Scan, size: int) -> None:
    """Warns about groups of many images that do not fit the memory for groups."""
    assert scan.places is not None
    images, groups = len(scan.places), len(np.unique(scan.places[:, 0] << 32 | scan.places[:, 1]))
    if images > _FEW * groups and size > KEPT_BYTES:
        warnings.warn(
            f"Tables below {scan.root!r} have about {images / groups:.0f} images in a group, decoded as a "
            f"whole: in random order, {size / groups / 1e6:.1f} MB for each image of "
            f"{size / images / 1e3:.0f} kB. Before training, run `dali-views pack TABLE SHARDS`.",
            stacklevel=4,
        )


_CACHE = MemoryCache(KEPT_BYTES)
os.register_at_fork(after_in_child=_CACHE.clear)


@dataclass(frozen=True, eq=False)
class GroupSource(RangeSource):
    """Images in groups of tables; `places` (N, 3) are file, group in it and row in that."""

    column: str
    """Column with the encoded bytes, or field of one, as "image.bytes"."""

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; an OSError for a file that is missing, has changed or cannot be read."""
        places, images = self.places[rows], [b""] * len(rows)
        for i in np.lexsort(places.T[::-1]).tolist():  # group by group
            file, group, row = places[i].tolist()
            values = self._group(file, group)
            image = values[row].as_py() if row < len(values) else None
            if not isinstance(image, bytes):
                raise OSError(f"{self.files[file]} has no image in row {row} of its group {group}")
            images[i] = image  # a copy: a view would keep the whole group in memory as long as the batch
        return images

    def _group(self, file: int, group: int) -> Any:
        path, stamp = os.path.join(self.root, self.files[file]), tuple(self.stamps[file].tolist())

        def decode() -> Any:
            with _open(path, stamp) as table, _damage():
                if group >= len(table.rows):
                    raise OSError(f"{self.files[file]} has no group {group}")
                return table.read(group, [self.column]).column(self.column)

        return _CACHE.get((path, stamp, self.column, group), decode)
