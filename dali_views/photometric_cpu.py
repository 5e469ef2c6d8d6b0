"""Colour, blur, solarise and normalisation of a view in one compiled pass, for graphs on the CPU.

DALI's kernels for the CPU do each of these apart and without vector instructions: together they take four
times as long as this does (`tests/bench/results`), and more than decoding and resizing. The graph calls it
through `fn.python_function`; no Python lock is held while it computes. The GPU has DALI's own operators
(`photometric.py`), and the tests hold the two against each other.
"""

from __future__ import annotations

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

# Of a grey value, ITU-R 601, as in PIL and torchvision.
_R, _G, _B = np.float32(0.299), np.float32(0.587), np.float32(0.114)
_ZERO, _HALF, _TOP = np.float32(0.0), np.float32(0.5), np.float32(255.0)


_NEUTRAL: dict[str, NDArray[Any]] = {
    "matrix": np.eye(3, dtype=np.float32),
    "pivot": np.zeros(3, np.float32),
    "sigma": np.array(0.01, np.float32),
    "window": np.array(1, np.int32),
    "solarise": np.array(256, np.int16),
}


class Photometric:
    """The operators with their constants; a callable for `fn.python_function(..., batch_processing=True)`.

    Args:
        names: the parts of a `plan.ViewPlan` that will be given; the others are neutral.
        threads: views worked on at the same time.
        mean, std: (3,) of the normalisation, in units of a byte.
    """

    def __init__(
        self, names: Sequence[str], threads: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self._names = names
        self._threads = threads
        self._mean = np.array(mean, np.float32)
        self._scale = (1.0 / np.array(std)).astype(np.float32)

    def __call__(self, images: list[U8], *given: list[NDArray[Any]]) -> list[F32]:
        """Normalised views (S, S, 3) float32.

        Args:
            images: B views (S, S, 3) uint8.
            given: B values of each name.
        """
        count, size = len(images), images[0].shape[0]
        parameters = {name: [value] * count for name, value in _NEUTRAL.items()}
        parameters.update(zip(self._names, given, strict=True))
        columns = list(parameters.values())
        out = np.empty((count, size, 3 * size), np.float32)
        # Blurred views take longer than others, so that each worker takes the next one when it is free.
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
    """Shared by all graphs of the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="photometric")


def _compile(function: _Function) -> _Function:
    """Machine code in place of a function; kept on disk between processes where that can be written to."""
    try:
        compiled: _Function = njit(nogil=True, fastmath=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        compiled = njit(nogil=True, fastmath=True)(function)
    return compiled


@_compile
def _mirror(at: int, length: int) -> int:
    """Where a position outside range(length) lies when the line is mirrored about its end pixels."""
    if length == 1:
        return 0
    at = abs(at) % (2 * (length - 1))
    return min(at, 2 * (length - 1) - at)


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
    """One view: (H, 3 W) bytes to normalised floats, rounded to bytes between the operators as on the GPU.

    A row is one line of 3 W numbers, so that all inner loops but the first run over neighbours in memory.
    """
    height, line = image.shape
    width = line // 3
    taps = int(window.item()) // 2
    threshold = np.float32(solarise.item())
    m00, m01, m02 = matrix[0, 0], matrix[0, 1], matrix[0, 2]
    m10, m11, m12 = matrix[1, 0], matrix[1, 1], matrix[1, 2]
    m20, m21, m22 = matrix[2, 0], matrix[2, 1], matrix[2, 2]

    t0, t1, t2 = pivot[0], pivot[1], pivot[2]
    if t0 != _ZERO or t1 != _ZERO or t2 != _ZERO:
        total = 0.0
        for y in range(height):
            for x in range(width):
                total += _R * image[y, 3 * x] + _G * image[y, 3 * x + 1] + _B * image[y, 3 * x + 2]
        grey = np.float32(total / (height * width))
        t0, t1, t2 = t0 * grey, t1 * grey, t2 * grey

    weight = np.empty(taps + 1, np.float32)
    if taps > 0:
        spread = -0.5 / (sigma.item() * sigma.item())
        total = 0.0
        for k in range(taps + 1):
            weight[k] = np.exp(spread * k * k)
            total += weight[k] if k == 0 else 2.0 * weight[k]
        for k in range(taps + 1):
            weight[k] /= total

    shift = np.empty(line, np.float32)
    factor = np.empty(line, np.float32)
    for x in range(line):
        shift[x], factor[x] = mean[x % 3], scale[x % 3]

    padded = np.empty(line + 6 * taps, np.float32)
    blurred = np.empty((height if taps > 0 else 1, line), np.float32)
    row = np.empty(line, np.float32)
    for y in range(height):
        for x in range(width):
            r, g, b = (
                np.float32(image[y, 3 * x]),
                np.float32(image[y, 3 * x + 1]),
                np.float32(image[y, 3 * x + 2]),
            )
            at = 3 * (x + taps)
            padded[at] = np.floor(min(max(m00 * r + m01 * g + m02 * b + t0, _ZERO), _TOP) + _HALF)
            padded[at + 1] = np.floor(min(max(m10 * r + m11 * g + m12 * b + t1, _ZERO), _TOP) + _HALF)
            padded[at + 2] = np.floor(min(max(m20 * r + m21 * g + m22 * b + t2, _ZERO), _TOP) + _HALF)
        if taps == 0:
            for x in range(line):
                v = padded[x]
                v = _TOP - v if v >= threshold else v
                out[y, x] = (v - shift[x]) * factor[x]
            continue
        # The image is mirrored about its edge pixels, as often as the window asks for.
        for k in range(1, taps + 1):
            low, high = _mirror(-k, width), _mirror(width - 1 + k, width)
            for c in range(3):
                padded[3 * (taps - k) + c] = padded[3 * (taps + low) + c]
                padded[3 * (taps + width - 1 + k) + c] = padded[3 * (taps + high) + c]
        for x in range(line):
            blurred[y, x] = weight[0] * padded[3 * taps + x]
        for k in range(1, taps + 1):
            for x in range(line):
                blurred[y, x] += weight[k] * (padded[3 * (taps - k) + x] + padded[3 * (taps + k) + x])
    if taps == 0:
        return
    for y in range(height):
        for x in range(line):
            row[x] = weight[0] * blurred[y, x]
        for k in range(1, taps + 1):
            low, high = _mirror(y - k, height), _mirror(y + k, height)
            for x in range(line):
                row[x] += weight[k] * (blurred[low, x] + blurred[high, x])
        for x in range(line):
            v = np.floor(min(row[x], _TOP) + _HALF)
            v = _TOP - v if v >= threshold else v
            out[y, x] = (v - shift[x]) * factor[x]
