"""Files that are whole or not there; arrays in a safetensors file, mapped into memory and never executed.

And names as one array of bytes: 100 million of them as Python objects would not fit in memory.
"""

from __future__ import annotations

import glob
import json
import math
import mmap
import os
import stat
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

PathLike: TypeAlias = "str | os.PathLike[str]"
Arrays = dict[str, NDArray[Any]]
_TYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8", "BOOL": "?"}


@contextmanager
def atomic_write(path: PathLike) -> Iterator[IO[bytes]]:
    """Opens a draft beside `path` that takes its place when the block has ended without an error.

    Readers see the old file or the new one, never a part, also beside a kill and beside other writers: the
    draft is `.NAME.RANDOM.tmp`. What a killed writer left stays until `remove_drafts`.

    Raises:
        OSError: it cannot be written; the error names `path`, and the old file stays.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        # The rename must survive a power cut, too.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        # The system names the draft, or nothing at all where it cannot write to an open file.
        if error.errno is not None and error.filename in (None, str(draft)):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def remove_drafts(path: PathLike) -> None:
    """Removes what killed writers of `path` left; for a process that knows itself to be its only writer."""
    target = Path(path)
    for draft in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        draft.unlink(missing_ok=True)


def append_line(path: PathLike, line: str) -> None:
    """Adds a line to a text file; an OSError, for example of a full disk, names the file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def save_arrays(path: PathLike, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Writes arrays of numbers (no float16) and JSON-able facts in one step; see `atomic_write`."""
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)  # a header of safetensors has at most 100 MB
    tensors = {name: np.ascontiguousarray(array) for name, array in {**arrays, "facts": text}.items()}
    header: dict[str, Any] = {"__metadata__": {"crc32": _checksum(tensors)}}
    codes, end = {np.dtype(kind): code for code, kind in _TYPES.items()}, 0
    # The library's own writers hold all arrays twice in memory. Wide numbers first: all stay aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in order:
        array, start = tensors[name], end
        end += array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_write(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(tensors[name].reshape(-1).view(np.uint8).data)


def open_regular(path: PathLike | bytes) -> tuple[int, os.stat_result]:
    """A descriptor for reading, which the caller closes, and its state; an OSError if it is no regular file.

    The descriptor is looked at, not the name, which may stand for another file a moment later.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer, for good.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode):
        return handle, status
    os.close(handle)
    raise OSError("not a regular file")


@contextmanager
def load_arrays(path: PathLike, what: str) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    """Gives arrays (read-only; processes share their memory) and facts to a block that makes `what` of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or something else, or the block failed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {what} at {path}; save one there first or correct the path.")
    handle, _ = open_regular(path)  # outside the try: a file one may not read is not a damaged file
    with open(handle, "rb") as file:
        try:
            if file.read(2) == b"PK":
                raise ValueError("it is an .npz, which this version does not read; make it again")
            arrays = _mapped(file)
            yield arrays, json.loads(arrays.pop("facts").tobytes())
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable {what} but damaged or something else "
                f"({' '.join(str(error).split())}); delete it or restore it from a copy."
            ) from error


def _mapped(file: IO[bytes]) -> Arrays:
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Verified by the library, which would copy the arrays. By number: the name may be another file by now.
    with safe_open(f"/proc/self/fd/{file.fileno()}", framework="np") as verified:
        checksum = (verified.metadata() or {}).get("crc32")
    start = 8 + int.from_bytes(content[:8], "little")
    arrays: Arrays = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            kind, count = np.dtype(_TYPES[entry["dtype"]]), math.prod(entry["shape"])
            if max(entry["shape"], default=0) > len(content):
                # An array without a byte may claim any number of rows, for which others take memory.
                raise ValueError(f"its array {name} claims {entry['shape']}, more than the file can hold")
            offset = start + entry["data_offsets"][0] if count else 0
            arrays[name] = np.frombuffer(content, kind, count, offset).reshape(entry["shape"])
    if _checksum(arrays) != checksum:
        raise ValueError("its checksum is wrong")
    return arrays


def _checksum(arrays: Arrays) -> str:
    total = 0
    for name, array in sorted(arrays.items()):
        total = zlib.crc32(f"{name} {array.dtype.name} {array.shape}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8).data, total)
    return f"{total:08x}"


def pack_names(names: Sequence[bytes] | NDArray[np.bytes_]) -> NDArray[np.uint8]:
    """(N, L) bytes of N names, padded with NULs to the longest."""
    packed = np.array(names, dtype=np.bytes_)
    return packed.view(np.uint8).reshape(len(names), packed.itemsize)


def unpack_names(paths: NDArray[np.uint8]) -> list[bytes]:
    """The N names that `pack_names` packed."""
    names: list[bytes] = np.ascontiguousarray(paths).view(f"S{paths.shape[1]}").ravel().tolist()
    return names
