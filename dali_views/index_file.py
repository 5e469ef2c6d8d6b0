"""How an index is stored: one .npz of its arrays, uncompressed, with all else as JSON in the array `meta`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .atomic import PathLike, atomic_write, open_npz
from .sources import LeftOut

FORMAT = 1
"""Raised whenever the stored arrays or the rules of the scan change; older files are scanned anew."""

T = TypeVar("T")


def write_index(path: PathLike, index: Any) -> None:
    """Writes all fields of a dataclass of NumPy arrays and JSON-able facts, in one step."""
    values = {field.name: getattr(index, field.name) for field in fields(index)}
    arrays: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays and value is not None}
    text = json.dumps({"format": FORMAT, **facts}).encode()
    with atomic_write(path, shared=True) as file:
        np.savez(file, meta=np.frombuffer(text, np.uint8), **arrays)


def read_index(path: PathLike, kind: type[T]) -> T:
    """Makes a `kind` of the fields that it has and the file stores; a `SampleIndex` reads a kept scan, too.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, something else, or of another format version.
    """
    make: Any = kind
    with open_npz(path, "index") as arrays:
        facts: Mapping[str, Any] = json.loads(arrays.pop("meta").tobytes())
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
        left_out = [LeftOut(*pair) for pair in facts["left_out"]]
        values = {"paths": None, **facts, **arrays, "left_out": left_out}
        known = {field.name for field in fields(make)}
        index: T = make(**{name: value for name, value in values.items() if name in known})
    return index


def pack_names(names: Sequence[bytes]) -> NDArray[np.uint8]:
    """(N, L) names as bytes, padded with NULs to the longest."""
    return np.array(names, dtype=np.bytes_).view(np.uint8).reshape(len(names), -1)


def unpack_names(paths: NDArray[np.uint8]) -> list[bytes]:
    """What `pack_names` packed."""
    names: list[bytes] = np.ascontiguousarray(paths).view(f"S{paths.shape[1]}").ravel().tolist()
    return names
