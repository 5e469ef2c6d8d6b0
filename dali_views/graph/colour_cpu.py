"""Colour, blur, solarise and normalisation of a view in one compiled pass, for `views_cpu`.

DALI's CPU operators do these one by one, which takes several times as long as this pass, and longer than
decoding (`tests/bench/results/cpu_operators_*.csv`). The compiled code runs without Python's lock. GPUs use
DALI's own operators (`colour.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

_Function = TypeVar("_Function", bound=Callable[..., Any])

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


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
def finish(
    out: F32,
    half: U16,
    image: U8,
    back: Bool,
    matrix: F32,
    pivot: F32,
    sigma: Any,
    window: Any,
    solarise: Any,
    mean: F32,
    scale: F32,
) -> None:
    """One view, (H, 3 W) bytes, as normalised numbers; what is larger than it in the output stays as it is.

    Args:
        out: (at least H, 3 W), the output, or with no rows at all.
        half: the same as bits of float16, if `out` has no rows.
        back: (2,) whether the view's rows and columns run backwards.
        matrix, pivot, sigma, window, solarise: see `ViewPlan`; mean, scale: (3,) in units of a byte.
    """
    height, line = image.shape
    taps = window // 2
    coloured = np.empty(line + 6 * taps, np.float32)  # a row, with room for its mirrored ends
    own = coloured[3 * taps : 3 * taps + line]
    same = _is_neutral(matrix, pivot)
    grey = np.float32(0) if same else _grey_mean(image)
    coefficients = _along_a_line(matrix, line)
    shift, before, factor = np.empty(line, np.float32), np.empty(line, np.float32), np.empty(line, np.float32)
    for x in range(line):
        shift[x], before[x], factor[x] = pivot[x % 3] * grey, mean[x % 3], scale[x % 3]
    weight = _gaussian(taps, sigma)
    numbers = np.zeros(line + 4, np.float32)  # a row, with two zeros on each side
    mirrored = np.empty(line, np.uint8)
    blurred = np.empty((2 * taps + 1, line), np.float32)  # the latest rows, each at its number modulo these
    across, ready, lost = np.empty(line, np.float32), np.empty(line, np.float32), np.empty(line, np.float32)
    for y in range(height + taps):
        if y < height:
            row = image[height - 1 - y] if back[0] else image[y]
            if back[1]:
                _mirror(mirrored, row)
                row = mirrored
            if same:
                _copy(own, row)
            else:
                _copy(numbers[2 : 2 + line], row)
                _map_colours(own, numbers, coefficients, shift)
            if taps > 0:
                _mirror_ends(coloured, taps)
                _blur_line(blurred[y % (2 * taps + 1)], coloured, weight)
        at = y - taps
        if at < 0:
            continue
        done = own
        if taps > 0:
            _blur_across(across, blurred, at, height, weight)
            _round(across)
            done = across
        if len(out) > 0:
            _normalise(out[at][:line], done, np.float32(solarise), before, factor)
        else:
            _normalise(ready, done, np.float32(solarise), before, factor)
            _to_half(half[at][:line], ready, lost)


@_compile
def _is_neutral(matrix: F32, pivot: F32) -> bool:
    for row in range(3):
        if pivot[row] != 0:
            return False
        for column in range(3):
            if matrix[row, column] != (1 if row == column else 0):
                return False
    return True


@_compile
def _copy(out: F32, row: U8) -> None:
    for x in range(len(out)):
        out[x] = row[x]


@_compile
def _mirror(out: U8, row: U8) -> None:
    """A row of RGB pixels from right to left."""
    pixels = len(row) // 3
    for x in range(pixels):
        other = 3 * (pixels - 1 - x)
        out[3 * x] = row[other]
        out[3 * x + 1] = row[other + 1]
        out[3 * x + 2] = row[other + 2]


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
def _normalise(out: F32, values: F32, threshold: np.float32, mean: F32, scale: F32) -> None:
    """Solarise and normalise."""
    for x in range(len(out)):
        value = values[x]
        value = np.float32(255) - value if value >= threshold else value
        out[x] = (value - mean[x]) * scale[x]


@_compile
def _to_half(out: U16, values: F32, lost: F32) -> None:
    """The nearest float16 of each number, as its bits; no processor needs to know the type.

    `lost` is for numbers below the least normal float16 (2**-14): added to 0.5, float32 rounds them to
    the same steps of 2**-24 that such a float16 has.
    """
    bits = values.view(np.uint32)
    for x in range(len(out)):
        lost[x] = abs(values[x]) + np.float32(0.5)
    small = lost.view(np.uint32)
    for x in range(len(out)):
        # Numba widens each result to 64 bits; casts keep vectors of 32.
        number = np.uint32(bits[x] & np.uint32(0x7FFFFFFF))
        odd = np.uint32(np.uint32(number >> np.uint32(13)) & np.uint32(1))
        # Half of the last place that stays, less one where that is even: ties go to the even number.
        rounded = np.uint32(np.uint32(number - np.uint32((112 << 23) - 0xFFF)) + odd)
        normal = np.uint32(rounded >> np.uint32(13))
        normal = normal if normal < np.uint32(0x7C00) else np.uint32(0x7C00)  # infinity
        chosen = normal if number >= np.uint32(113 << 23) else np.uint32(small[x] - np.uint32(126 << 23))
        sign = np.uint32(np.uint32(bits[x] >> np.uint32(16)) & np.uint32(0x8000))
        out[x] = np.uint16(chosen | sign)


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
def _blur_across(out: F32, lines: F32, y: int, height: int, weight: F32) -> None:
    """Blur line `y` of `height` with its neighbours; `lines` has each at its number modulo theirs."""
    count, own = len(lines), weight[0]
    here = lines[y % count]
    for x in range(len(out)):
        out[x] = own * here[x]
    for k in range(1, len(weight)):
        above, below = _mirrored(y - k, height) % count, _mirrored(y + k, height) % count
        _add_both(out, weight[k], lines[above], lines[below])
