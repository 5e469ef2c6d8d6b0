"""Ground-truth boxes: finding the rows of an index that they belong to, and refusing what is no box."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..system.files import PathLike


class RowBoxes(NamedTuple):
    """Ground-truth boxes of the rows of an index or a listing, in any order."""

    rows: NDArray[np.int64]
    """(M,) the row of each box."""
    boxes: NDArray[np.float32]
    """(M, 4) y0, x0, y1, x1 fractions."""
    labels: NDArray[np.int32]
    """(M,) the class of each box, -1 unknown."""


def match_boxes(
    given: Mapping[str, ArrayLike] | PathLike,
    names: Sequence[bytes],
    sizes: NDArray[np.int32],
    labels: NDArray[np.int32],
) -> RowBoxes:
    """Finds the rows that boxes were given for; `SampleIndex.with_boxes` explains the forms of `given`.

    Args:
        given: (n, 4) boxes by name, or a box file.
        names: Relative paths of all N rows.
        sizes: (N, 2) height and width.
        labels: (N,) each box takes the label of its row.

    Raises:
        FileNotFoundError: There is no such box file.
        ValueError: A box is no rectangle in the image, or none of the names is known.
    """
    in_pixels = not isinstance(given, Mapping)
    by_name = given if isinstance(given, Mapping) else _read_boxes(given)
    found = {name: np.asarray(boxes, np.float64).reshape(-1, 4) for name, boxes in by_name.items()}
    place = _find_rows(names, found)
    if not place:
        raise ValueError(f"None of the {len(found)} names with boxes is in the index; check the names.")
    rows = np.concatenate([np.full(len(found[name]), row, np.int64) for name, row in place.items()])
    values = np.concatenate([found[name] for name in place])
    if in_pixels:
        values = np.clip(values / np.tile(sizes[rows], 2), 0, 1)
    bad = ~((values >= 0).all(1) & (values <= 1).all(1) & (values[:, 2:] > values[:, :2]).all(1))
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"The box {values[first].tolist()} of {os.fsdecode(names[rows[first]])!r} is no rectangle "
            "(y0, x0, y1, x1) in [0, 1]; mend it."
        )
    return RowBoxes(rows, values.astype(np.float32), labels[rows])


def _read_boxes(path: PathLike) -> dict[str, list[tuple[float, float, float, float]]]:
    """Lines `name x0 y0 x1 y1` (a class column is skipped) as y0, x0, y1 + 1, x1 + 1 by name, in pixels."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The box file {os.fspath(path)!r} does not exist; check the path.")
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for number, line in enumerate(Path(path).read_text(errors="surrogateescape").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            head, *corners = line.strip().rsplit(None, 4)
            x0, y0, x1, y1 = (float(c) for c in corners)
            if not all(map(math.isfinite, (x0, y0, x1, y1))):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"Line {number} of {os.fspath(path)!r} is not `name x0 y0 x1 y1` ({line[:60]!r}); mend it."
            ) from None
        found.setdefault(head.split("\t")[0].strip(), []).append((y0, x0, y1 + 1, x1 + 1))
    return found


def _find_rows(paths: Sequence[bytes], names: Iterable[str]) -> dict[str, int]:
    """Row of each name: a relative path, or a file name that occurs once. Unknown names are absent."""
    wanted = {os.fsencode(name): name for name in names}
    exact: dict[str, int] = {}
    short: dict[str, int] = {}
    for row, path in enumerate(paths):
        if path in wanted:
            exact[wanted[path]] = row
        base = wanted.get(os.path.basename(path))
        if base is not None:
            short[base] = -1 if base in short else row
    return {**{name: row for name, row in short.items() if row >= 0}, **exact}
