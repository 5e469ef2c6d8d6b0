"""One image of a packed data set: what is stored for it, and why it may be left out."""

from __future__ import annotations

import io
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from ...data.headers import inspect

Encoded: TypeAlias = "bytes | memoryview"
"""What an image file holds."""

# By Pillow's name of the format. Readers look into a file of JPEG 2000, but not for one of that ending.
_ENDINGS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "JPEG2000": "jpg",
    "PNG": "png",
    "BMP": "bmp",
    "PPM": "ppm",
    "WEBP": "webp",
    "TIFF": "tif",
}
_ORIENTATION = 0x0112
_T = Image.Transpose
# What takes back the turn that Pillow gives TIFF files, and no others, while it decodes them.
_UNTURN = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_90,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_270,
}


def bounded(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width), shrunk if need be so that the shorter is `short_side`; the other is rounded."""
    shorter = min(height, width)
    if shorter <= short_side:
        return height, width
    return round(height * short_side / shorter), round(width * short_side / shorter)


class Stored(NamedTuple):
    """What is stored for an image."""

    data: Encoded
    ending: str
    """Of a file that holds it, by what it is: ``"jpg"``, ``"png"``, ..."""
    height: int
    """In pixels as stored, before any EXIF rotation."""
    width: int
    copied: bool
    """Whether these are the bytes it came in."""


def pack_image(
    data: Encoded, indexed: tuple[int, int], short_side: int | None, quality: int, *, only_jpeg: bool
) -> Stored | str:
    """What is stored for an encoded image, or why it is left out. Safe in threads.

    Args:
        data: The image file.
        indexed: (height, width) that its index tells.
        short_side: Bound on the shorter side in pixels; None keeps every size.
        quality: JPEG quality of what is encoded anew.
        only_jpeg: Whether images of other formats become JPEG too where they are small enough.
    """
    height, width, reason = inspect(io.BytesIO(data), len(data))
    if reason:
        return reason
    if (height, width) != indexed:
        now, then = f"{width} x {height}", f"{indexed[1]} x {indexed[0]}"
        return f"has changed since it was indexed: {now} pixels, then {then}"
    size = indexed if short_side is None else bounded(height, width, short_side)
    try:
        with Image.open(io.BytesIO(data)) as image:
            plain = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            if size == indexed and (plain or not only_jpeg):
                # Fails for a damaged one. An eighth of a JPEG is cheaper, and all of its file is read for it.
                image.draft(None, (1, 1))
                image.load()
                return Stored(data, _ENDINGS[str(image.format)], height, width, True)
            return Stored(_encoded(image, size, quality), "jpg", *size, False)
    except MemoryError:
        raise  # says nothing about the image
    except Exception as error:
        return f"cannot be decoded and stored ({' '.join(str(error).split()) or type(error).__name__})"


def _encoded(image: Image.Image, size: tuple[int, int], quality: int) -> bytes:
    """JPEG of a (height, width) with the orientation tag, and nothing else of the metadata."""
    # Of a large JPEG, no more is decoded than twice the size needs. The box is fractional: the last row and
    # column of such a draft are partly padding, and cut there the picture keeps its geometry.
    draft = image.draft(None, (2 * size[1], 2 * size[0]))
    pixels, turn = as_stored(image)
    if (pixels.height, pixels.width) != size:
        box = (0, 0, *pixels.size) if draft is None else draft[1]
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    pixels.info = {}  # Pillow would store comments and more of it
    exif = Image.Exif()
    if turn in _UNTURN:
        exif[_ORIENTATION] = turn
    out = io.BytesIO()
    pixels.save(out, "JPEG", quality=quality, optimize=True, exif=exif)
    return out.getvalue()


def as_stored(image: Image.Image) -> tuple[Image.Image, int]:
    """The pixels as stored, L or RGB, equal to what the loader decodes; and the orientation."""
    if image.format == "TIFF":  # has turned its pixels after it is loaded, and forgotten the tag
        turn = _orientation(image)
        image.load()
        image = image.transpose(_UNTURN[turn]) if turn in _UNTURN else image
    else:
        image.load()  # first: the tags of a PNG load it, too, and an error there would pass for bad tags
        turn = _orientation(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return image if image.mode == mode else image.convert(mode), turn


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1  # damaged metadata is no damage to the pixels
