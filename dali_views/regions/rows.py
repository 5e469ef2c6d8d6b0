"""What a valid row of a region table is: conversions and checks, all before anything is written.

Every check takes what a caller passed (NumPy, sequences or torch tensors on any device) and returns an array
in the type of the table, or raises an error that names the first bad row and its position in the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

_TOLERANCE = 1e-6  # rounding of a box computed in float32 elsewhere
_KINDS = {"iuf": "numbers", "iu": "integers", "b": "truth values"}


def as_array(values: Any, name: str, kinds: str) -> Array:
    """Any array, sequence or tensor as NumPy; TypeError if it is not empty and its dtype not of `kinds`."""
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
    _refuse((rows < 0) | (rows >= length), rows, lambda i: f"is not in the table of {length} rows")
    return rows


def check_boxes(values: Any, rows: NDArray[np.int64], regions: int) -> NDArray[np.float32]:
    """(B, K, 4) rectangles with an area in [0, 1]; (B, 4) is repeated for each of the K regions."""
    boxes = _per_region(values, "boxes", rows, regions, (4,))

    def has(what: str) -> Callable[[int], str]:
        return lambda i: f"has a box {what}: {boxes[i].round(7).tolist()} (y0, x0, y1, x1)"

    _refuse(~np.isfinite(boxes).all((1, 2)), rows, has("with NaN or infinity"))
    _refuse(((boxes < -_TOLERANCE) | (boxes > 1 + _TOLERANCE)).any((1, 2)), rows, has("outside [0, 1]"))
    clipped = boxes.clip(0, 1).astype(np.float32)
    # Compared in float32: a box can be empty after rounding only.
    _refuse((clipped[..., 2:] <= clipped[..., :2]).any((1, 2)), rows, has("that is inverted or empty"))
    return clipped


def check_weights(values: Any, rows: NDArray[np.int64], regions: int) -> NDArray[np.float32]:
    """(B, K) finite weights >= 0, with K > 1 not all zero; (B,) is repeated for each of the K regions."""
    weights = _per_region(values, "weights", rows, regions)

    def has(what: str) -> Callable[[int], str]:
        return lambda i: f"has {what}: {weights[i].tolist()}"

    with np.errstate(over="ignore"):
        rounded = weights.astype(np.float32)
    _refuse(~np.isfinite(rounded).all(1), rows, has("a weight that is NaN or infinite"))
    _refuse((rounded < 0).any(1), rows, has("a negative weight"))
    if regions > 1:
        _refuse((rounded == 0).all(1), rows, has("only zero weights, so that no region can be drawn"))
    return rounded


def check_partner(values: Any, rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """(B,) row numbers of a table of `length` rows."""
    partner = as_array(values, "partner", "iu").astype(np.int64)
    if partner.shape != rows.shape:
        raise ValueError(f"partner has shape {partner.shape}; give {rows.shape} to match index.")
    outside = (partner < 0) | (partner >= length)
    _refuse(outside, rows, lambda i: f"has partner {partner[i]}, which is not in the table of {length} rows")
    return partner


def _per_region(
    values: Any, name: str, rows: NDArray[np.int64], regions: int, tail: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    array = as_array(values, name, "iuf").astype(np.float64)
    full, single = (len(rows), regions, *tail), (len(rows), *tail)
    if array.shape == single:
        return np.broadcast_to(array[:, None], full)
    if array.shape != full:
        raise ValueError(f"{name} has shape {array.shape}; give {full} or {single} to match index.")
    return array


def _refuse(bad: Any, rows: NDArray[np.int64], why: Callable[[int], str]) -> None:
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"Row {rows[i]} (position {i}) {why(i)}; nothing was written.")
