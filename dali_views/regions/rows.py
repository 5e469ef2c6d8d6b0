"""Rows of a region table: the columns, their first values, and the checks before anything is written.

A check takes NumPy arrays, sequences or torch tensors and returns an array in the type of the table. Its
error names the first bad row and its position in the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"
Columns: TypeAlias = "Mapping[str, Array]"
"""Arrays of N rows under the names in `COLUMNS`."""

FROZEN = ("boxes", "weights", "partner", "written")
"""Columns that a snapshot holds."""
COLUMNS = (*FROZEN, "writes", "written_epoch")

_CHUNK = 1 << 17  # rows per piece of work on a whole table: temporary arrays stay small
_TOLERANCE = 1e-6  # rounding of a box that was computed in float32 elsewhere
_KINDS = {"iuf": "numbers", "iu": "integers", "b": "truth values"}


def new_columns(length: int, regions: int) -> dict[str, Array]:
    """Columns of an unwritten table: read-only; only `partner` takes memory."""
    return {
        "boxes": np.broadcast_to(np.array([0, 0, 1, 1], np.float32), (length, regions, 4)),
        "weights": np.broadcast_to(np.float32(1), (length, regions)),
        "partner": np.arange(length, dtype=np.int64),
        "written": np.broadcast_to(np.False_, length),
        "writes": np.broadcast_to(np.int32(0), length),
        "written_epoch": np.broadcast_to(np.int32(-1), length),
    }


def chunks(length: int) -> Iterator[slice]:
    """Slices that cover all rows."""
    for start in range(0, length, _CHUNK):
        yield slice(start, min(start + _CHUNK, length))


def as_array(values: Any, name: str, kinds: str) -> Array:
    """Any array, sequence or tensor as NumPy; TypeError if it holds values of a dtype outside `kinds`."""
    if hasattr(values, "detach"):  # a torch tensor, without importing torch
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        narrow = values.is_floating_point() and values.element_size() < 4
        values = (values.float() if narrow else values).numpy()
    array = np.asarray(values)
    if array.size and array.dtype.kind not in kinds:
        raise TypeError(f"{name} holds {array.dtype} values; give {_KINDS[kinds]}.")
    return array


def check_index(index: Any, length: int) -> NDArray[np.int64]:
    """(B,) row numbers of a table of `length` rows."""
    rows = as_array(index, "index", "iu").astype(np.int64)
    if rows.ndim != 1:
        raise ValueError(f"index has shape {rows.shape}; give one row number per sample, shape (B,).")
    _refuse((rows < 0) | (rows >= length), rows, f"is not in the table of {length} rows", rows)
    return rows


def check(name: str, values: Any, rows: NDArray[np.int64], length: int, regions: int) -> Array:
    """Values of one column for rows (B,) of a table of `length` rows.

    - boxes (B, K, 4): rectangles with an area, in [0, 1]; (B, 4) is repeated for each of the K regions.
    - weights (B, K): finite and >= 0, with K > 1 not all zero; (B,) is repeated for each of the K regions.
    - partner (B,): row numbers. written (B,): truth values. writes, written_epoch (B,): -1 ... 2^31 - 1.
    """
    if name == "boxes":
        boxes = _per_region(values, name, (len(rows), regions, 4))
        outside = (boxes < -_TOLERANCE) | (boxes > 1 + _TOLERANCE)
        _refuse(~np.isfinite(boxes).all((1, 2)), rows, "has a box with NaN or infinity", boxes)
        _refuse(outside.any((1, 2)), rows, "has a box outside [0, 1]", boxes)
        clipped = boxes.clip(0, 1).astype(np.float32)
        # Compared in float32: rounding alone can make a box empty.
        empty = (clipped[..., 2:] <= clipped[..., :2]).any((1, 2))
        _refuse(empty, rows, "has a box (y0, x0, y1, x1) that is inverted or empty", boxes)
        return clipped
    if name == "weights":
        weights = _per_region(values, name, (len(rows), regions))
        with np.errstate(over="ignore"):
            rounded = weights.astype(np.float32)
        _refuse(~np.isfinite(rounded).all(1), rows, "has a weight that is NaN or infinite", weights)
        _refuse((rounded < 0).any(1), rows, "has a negative weight", weights)
        undrawable = (rounded == 0).all(1) & (regions > 1)
        _refuse(undrawable, rows, "has only zero weights, so that no region can be drawn", weights)
        return rounded
    array = as_array(values, name, "b" if name == "written" else "iu")
    if array.shape != rows.shape:
        raise ValueError(f"{name} has shape {array.shape}; give {rows.shape} to match index.")
    if name == "written":
        return array.astype(np.bool_)
    if name == "partner":
        outside = (array < 0) | (array >= length)
        _refuse(outside, rows, f"has a partner that is not in the table of {length} rows", array)
        return array.astype(np.int64)
    _refuse((array < -1) | (array >= 2**31), rows, f"has {name} that are not a count", array)
    return array.astype(np.int32)


def _per_region(values: Any, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Numbers of shape (B, K, ...); those of shape (B, ...) are repeated K times."""
    array = as_array(values, name, "iuf").astype(np.float64)
    single = (shape[0], *shape[2:])
    if array.shape == single:
        return np.broadcast_to(array[:, None], shape)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; give {shape} or {single} to match index.")
    return array


def _refuse(bad: Any, rows: NDArray[np.int64], what: str, values: Array) -> None:
    if bad.any():
        i = int(bad.argmax())
        value = values[i].round(7).tolist()
        raise ValueError(f"Row {rows[i]} (position {i}) {what}: {value}; nothing was written.")
