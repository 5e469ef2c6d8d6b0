"""Colour, blur, solarise and normalisation of a view in one compiled pass, for graphs on the CPU.

DALI's CPU operators do these one by one, which takes several times as long as this pass, and longer than
decoding and resizing (`tests/bench/results/cpu_operators_*.csv`). The graph calls it through
`fn.python_function`; it computes without holding Python's lock. GPUs use DALI's own operators (`colour.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

_Function = TypeVar("_Function", bound=Callable[..., Any])

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


NEUTRAL: dict[str, NDArray[Any]] = {
    "matrix": np.eye(3, dtype=np.float32),
    "pivot": np.zeros(3, np.float32),
    "sigma": np.array(0.01, np.float32),
    "window": np.array(1, np.int32),
    "solarise": np.array(256, np.int16),
}
"""Parameters of a sample that an operator does not apply to."""


class Photometric:
    """The operators with their constants; a callable for `fn.python_function(..., batch_processing=True)`.

    Args:
        names: the parts of a `ViewPlan` that will be given; the others are neutral.
        threads: views computed at the same time.
        mean, std: (3,) of the normalisation, in units of a byte.
    """

    def __init__(
        self, names: Sequence[str], threads: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self._names = names
        self._threads = threads
        self._mean = np.array(mean, np.float32)
        self._scale = (1.0 / np.array(std)).astype(np.float32)
        # Kept for all batches: fresh memory costs as much as the computation. DALI copies the result.
        self._out = np.empty((0, 0, 0), np.float32)

    def __call__(self, images: list[U8], *given: list[NDArray[Any]]) -> list[F32]:
        """Normalised views (S, S, 3) float32.

        Args:
            images: B views (S, S, 3) uint8.
            given: B values of each name.
        """
        count, size = len(images), images[0].shape[0]
        parameters = {name: [value] * count for name, value in NEUTRAL.items()}
        parameters.update(zip(self._names, given, strict=True))
        columns = list(parameters.values())
        if self._out.shape[0] < count:
            self._out = np.empty((count, size, 3 * size), np.float32)
        out = self._out[:count]
        # A shared iterator balances the load: blurred views take longer than others.
        todo = iter(range(count))

        def work() -> None:
            for i in todo:
                lines = images[i].reshape(size, 3 * size)
                _view(out[i], lines, self._mean, self._scale, *(column[i] for column in columns))

        for done in [_pool(self._threads).submit(work) for _ in range(self._threads)]:
            done.result()
        return list(out.reshape(count, size, size, 3))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """One pool for all graphs of the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="photometric")


# A forked process inherits the pool without its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _compile(function: _Function) -> _Function:
    """Compile a function; the result is cached on disk where that is writable."""
    # No option that changes the order or the rounding of sums: a view is the same on every machine.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"nnan", "ninf", "nsz"}}
    try:
        compiled: _Function = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        compiled = njit(**options)(function)
    return compiled


# The kernel treats a row of a view as one line of 3 W numbers: inner loops run over neighbours in memory and
# compile to vector instructions. Between operators values are rounded to bytes, as on the GPU.


@_compile
def _view(
    out: F32,
    image: U8,
    mean: F32,
    scale: F32,
    matrix: F32,
    pivot: F32,
    sigma: Any,
    window: Any,
    solarise: Any,
) -> None:
    """One view, (H, 3 W) bytes to normalised floats."""
    height, line = image.shape
    taps = int(window.item()) // 2
    threshold = np.float32(solarise.item())
    grey = _grey_mean(image) if pivot[0] != 0 or pivot[1] != 0 or pivot[2] != 0 else np.float32(0)
    coefficients = _along_a_line(matrix, line)
    shift, before, factor = np.empty(line, np.float32), np.empty(line, np.float32), np.empty(line, np.float32)
    for x in range(line):
        shift[x], before[x], factor[x] = pivot[x % 3] * grey, mean[x % 3], scale[x % 3]
    weight = _gaussian(taps, sigma.item())
    numbers = np.zeros(line + 4, np.float32)  # a row, with two zeros on each side
    coloured = np.empty(line + 6 * taps, np.float32)  # a row, with room for its mirrored ends
    blurred = np.empty((height if taps > 0 else 0, line), np.float32)
    total = np.empty(line, np.float32)
    for y in range(height):
        numbers[2 : 2 + line] = image[y]
        _map_colours(coloured[3 * taps : 3 * taps + line], numbers, coefficients, shift)
        if taps == 0:
            _finish(out[y], coloured, threshold, before, factor)
        else:
            _mirror_ends(coloured, taps)
            _blur_line(blurred[y], coloured, weight)
    if taps > 0:
        for y in range(height):
            _blur_across(total, blurred, y, weight)
            _round(total)
            _finish(out[y], total, threshold, before, factor)


@_compile
def _grey_mean(image: U8) -> np.float32:
    """Mean grey value (ITU-R 601, as in PIL and torchvision); integer sums do not depend on their order."""
    sums = np.zeros(image.shape[1], np.int64)
    for y in range(image.shape[0]):
        row = image[y]
        for x in range(len(row)):
            sums[x] += row[x]
    grey = 0.299 * sums[0::3].sum() + 0.587 * sums[1::3].sum() + 0.114 * sums[2::3].sum()
    return np.float32(3.0 * grey / image.size)


@_compile
def _along_a_line(matrix: F32, line: int) -> tuple[F32, F32, F32, F32, F32]:
    """Five times (3 W,): weights of the numbers from two before to two after each one, in its new value."""
    coefficients = np.zeros((5, line), np.float32)
    for x in range(line):
        channel = x % 3
        for other in range(3):
            coefficients[other - channel + 2, x] = matrix[channel, other]
    return coefficients[0], coefficients[1], coefficients[2], coefficients[3], coefficients[4]


@_compile
def _map_colours(out: F32, numbers: F32, coefficients: tuple[F32, ...], shift: F32) -> None:
    """(3 W,) new values of numbers, which have two more on each side."""
    a, b, c, d, e = coefficients
    # Slices: Numba would check each index x + k for a negative value.
    p, q, r, s, t = numbers, numbers[1:], numbers[2:], numbers[3:], numbers[4:]
    for x in range(len(out)):
        out[x] = shift[x] + a[x] * p[x] + b[x] * q[x] + c[x] * r[x] + d[x] * s[x] + e[x] * t[x]
    _round(out)


@_compile
def _add_both(out: F32, weight: np.float32, left: F32, right: F32) -> None:
    for x in range(len(out)):
        out[x] += weight * (left[x] + right[x])


@_compile
def _round(values: F32) -> None:
    """To whole numbers of a byte, in place."""
    for x in range(len(values)):
        values[x] = np.floor(min(max(values[x], np.float32(0)), np.float32(255)) + np.float32(0.5))


@_compile
def _finish(out: F32, values: F32, threshold: np.float32, mean: F32, scale: F32) -> None:
    """Solarise and normalise."""
    for x in range(len(out)):
        value = values[x]
        value = np.float32(255) - value if value >= threshold else value
        out[x] = (value - mean[x]) * scale[x]


@_compile
def _gaussian(taps: int, sigma: float) -> F32:
    """(taps + 1,) weights at distance k from the centre; with their mirror image they sum to 1."""
    weight = np.ones(taps + 1, np.float32)
    total = 1.0
    for k in range(1, taps + 1):
        weight[k] = np.exp(-0.5 * k * k / (sigma * sigma))
        total += 2.0 * weight[k]
    for k in range(taps + 1):
        weight[k] /= total
    return weight


@_compile
def _mirrored(at: int, length: int) -> int:
    """The position in range(length) that `at` has when the line is mirrored about its end pixels."""
    if length == 1:
        return 0
    at = abs(at) % (2 * (length - 1))
    return min(at, 2 * (length - 1) - at)


@_compile
def _mirror_ends(padded: F32, taps: int) -> None:
    """Fill `taps` pixels before and after a line with its mirror image."""
    width = len(padded) // 3 - 2 * taps
    for k in range(1, taps + 1):
        for c in range(3):
            padded[3 * (taps - k) + c] = padded[3 * (taps + _mirrored(-k, width)) + c]
            padded[3 * (taps + width - 1 + k) + c] = padded[3 * (taps + _mirrored(width - 1 + k, width)) + c]


@_compile
def _blur_line(out: F32, padded: F32, weight: F32) -> None:
    """Blur one line along itself."""
    middle, line, own = 3 * (len(weight) - 1), len(out), weight[0]
    here = padded[middle : middle + line]
    for x in range(line):
        out[x] = own * here[x]
    for k in range(1, len(weight)):
        left, right = middle - 3 * k, middle + 3 * k
        _add_both(out, weight[k], padded[left : left + line], padded[right : right + line])


@_compile
def _blur_across(out: F32, lines: F32, y: int, weight: F32) -> None:
    """Blur line `y` with the lines above and below it."""
    height, here, own = len(lines), lines[y], weight[0]
    for x in range(len(out)):
        out[x] = own * here[x]
    for k in range(1, len(weight)):
        _add_both(out, weight[k], lines[_mirrored(y - k, height)], lines[_mirrored(y + k, height)])
