"""Which images an LMDB environment holds: where each lies in its file, how large it is, of which class."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from ..system.files import PathLike
from .headers import inspect, scan_bar
from .listing import LeftOut
from .lmdb_pages import LOST, NO_VALUE, Pages, Value
from .names import may_be_name, pack_names
from .remote import as_url, is_remote
from .scan import Scan, ScanCache, stamp_of
from .window import Window, of_handle

_THREADS = 4
_BLOCK, _CHUNK = 1 << 14, 1 << 8  # entries that wait for threads at a time, and that one takes
_META_KEY = re.compile(rb"__\w+__")
_HEX = "hex:"


def names_lmdb(path: PathLike) -> bool:
    """Whether the name is one of an environment, rather than of images."""
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, "data.mdb"))
    return os.path.splitext(path)[1] in (".lmdb", ".mdb")


def scan_lmdb(path: PathLike, cache: bool | PathLike, progress: bool) -> Scan:
    """The images of an environment; if it has not changed, it is not opened. See `SampleIndex.from_lmdb`."""
    if is_remote(path):
        raise ValueError(
            f"LMDB is read from local files alone; copy {as_url(path)}, or pack it as tar shards."
        )
    file = os.path.abspath(os.fspath(path))
    file = os.path.join(file, "data.mdb") if os.path.isdir(file) else file
    if not os.path.isfile(file):
        raise FileNotFoundError(f"There is no LMDB environment {os.fspath(path)!r}; check the path.")
    root, name = os.path.split(file)
    place = ScanCache(cache, root, ["lmdb", name], Scan)
    if place.kept is not None and place.kept.holds():
        return place.kept
    stamp = stamp_of(file)
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        scanned = _scan(root, name, handle, stamp, progress)
    except ValueError as error:
        raise ValueError(f"{file!r} cannot be read: {error}.") from error
    finally:
        os.close(handle)
    if stamp_of(file) != stamp:
        raise ValueError(f"{file!r} has changed while it was read; index it when nobody writes to it.")
    place.keep(scanned)
    return scanned


def _scan(root: str, file: str, handle: int, stamp: tuple[int, int], progress: bool) -> Scan:
    pages = Pages(handle, stamp[0])
    names: list[bytes] = []
    seen: set[bytes] = set()
    places: list[tuple[int, int, int]] = []
    sizes: list[tuple[int, int]] = []
    left_out: list[LeftOut] = []
    count = 0
    with scan_bar(pages.entries, " images", progress) as bar:
        for value, height, width, refused in _looked_at(pages.values(), handle, stamp[0]):
            bar.update()
            count += 1
            if _META_KEY.fullmatch(value.key):
                continue
            name = name_of(value.key)
            if name in seen:
                refused = "stands twice; the first time counts"
            seen.add(name)
            if refused:
                left_out.append(LeftOut(os.fsdecode(name), refused))
                continue
            names.append(name)
            places.append((0, value.offset, value.size))
            sizes.append((height, width))
    if pages.lost or count != pages.entries:
        told = f"damaged or cut off; of its {pages.entries} entries {count} were found"
        left_out.append(LeftOut(file, told))
    if not names:
        first = "; ".join(f"{key}: {refused}" for key, refused in left_out[:3]) or "it is empty"
        raise ValueError(f"it holds no encoded image such as a JPEG, one to a key ({first})")
    folders = [name.partition(b"/")[0] if b"/" in name else b"" for name in names]
    classes = sorted(set(folders)) if all(folders) else []
    number = {kind: i for i, kind in enumerate(classes)}
    return Scan(
        root=root,
        paths=pack_names(names),
        sizes=np.array(sizes, np.int32),
        labels=np.array([number.get(folder, -1) for folder in folders], np.int32),
        classes=[os.fsdecode(kind) for kind in classes],
        left_out=left_out,
        holder="ranges",
        files=[file],
        file_stamps=np.array([stamp], np.int64),
        places=np.array(places, np.int64),
    )


def name_of(key: bytes) -> bytes:
    """The key, or if it can be no name, its bytes in hexadecimal figures after "hex:"; each has another."""
    plain = may_be_name(key) and not key.startswith(_HEX.encode())
    return key if plain else (_HEX + key.hex()).encode()


def _looked_at(values: Iterator[Value], handle: int, end: int) -> Iterator[tuple[Value, int, int, str]]:
    """Every value with its height, its width and why it cannot be used, or ""."""
    with ThreadPoolExecutor(_THREADS) as threads:
        while block := list(islice(values, _BLOCK)):
            chunks = [block[start : start + _CHUNK] for start in range(0, len(block), _CHUNK)]
            for chunk in threads.map(lambda part: [(v, *_look(v, handle, end)) for v in part], chunks):
                yield from chunk


def _look(value: Value, handle: int, end: int) -> tuple[int, int, str]:
    if value.size == NO_VALUE:
        return 0, 0, "a named database, or several values of one key"
    if value.size == LOST or value.offset + value.size > end:
        return 0, 0, "damaged or cut off with its environment"
    height, width, refused = inspect(
        io.BufferedReader(Window(of_handle(handle), value.offset, value.size)), value.size
    )
    if refused:
        start = os.pread(handle, min(4, value.size), value.offset)
        if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            refused = "a pickle, which is not loaded; write the encoded image alone"
        elif start[:1] == b"\x08" and start[2:3] == b"\x10":
            refused = "a Caffe Datum; write the encoded image alone"
    return height, width, refused
