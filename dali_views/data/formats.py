"""Formats: whether DALI decodes an image as Pillow does, and how large it is, by its header and its end.

A file whose end looks wrong is decoded in full with Pillow, so a truncated download is found here and not in
an epoch. What stays in was compared with DALI's own decoder. What a file claims is compared with its bytes
before it takes memory.
"""

from __future__ import annotations

import re
from typing import IO, Any, cast

from PIL import Image, UnidentifiedImageError

from .source import SPARE_BYTES, most_bytes

MAX_PIXELS = 178_956_970
"""Largest image accepted, in pixels; Pillow refuses more than this as a decompression bomb."""

MAX_PIXELS_PER_BYTE = 512
"""Most pixels of a JPEG per byte of its file: a block of 8 x 8 takes at least one bit, in any scan."""

_TAIL = 1024
_END = 16  # bytes at the end of a JPEG in a TIFF
_STEPS = 1 << 16  # segments of a JPEG, and chunks of a PNG with something behind it, that are looked at
_CHUNKS = 100  # of a WebP that are looked at; there are half a dozen kinds
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF", "JPEG2000", "AVIF", "ICO")
_MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB", "CMYK"),
    "JPEG2000": ("L", "RGB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
}


class Refused(Exception):
    """The reason why a file is left out."""


class _Header:
    """A file while Pillow looks at its header, which may not take memory without end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell, self._left = file, file.seek, file.tell, SPARE_BYTES

    def read(self, size: int = -1) -> bytes:
        part = self._file.read(size if 0 <= size <= self._left else self._left + 1)
        self._left -= len(part)
        if self._left < 0:
            raise Refused(f"its header, or a file that is read as a whole, exceeds {SPARE_BYTES >> 20} MB")
        return part


def size_of_image(file: IO[bytes], size: int) -> tuple[int, int]:
    """(height, width) as stored of an image of `size` bytes in a seekable file, or `Refused`."""
    try:
        image = Image.open(cast(IO[bytes], _Header(file)), formats=_FORMATS)
    except UnidentifiedImageError:
        raise Refused("not an image, or truncated in its header" if size else "empty file") from None
    except Image.DecompressionBombError:
        raise Refused(f"more pixels than Pillow's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0)}") from None
    kind, mode = str(image.format), image.mode
    if mode not in _MODES.get(kind, ()):
        raise Refused(f"{kind} image of mode {mode}, which DALI cannot decode")
    width, height = image.size
    if kind == "TIFF":
        # Pillow swaps the sides of a rotated TIFF; DALI is told not to.
        tags = image.tag_v2
        width, height = int(tags[256]), int(tags[257])
        _check_tiff(file, tags, size)
    if height < 1 or width < 1:
        raise Refused("image without pixels")
    if height * width > MAX_PIXELS:
        raise Refused(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
    if size > most_bytes(height, width):
        raise Refused(f"{size} bytes, more than its {width} x {height} pixels can take")
    if kind in ("JPEG", "MPO") and height * width > MAX_PIXELS_PER_BYTE * size:
        raise Refused(f"{width} x {height} pixels, more than its {size} bytes can hold")
    if mode == "CMYK" and kind in ("JPEG", "MPO") and "adobe" not in image.info:
        raise Refused("CMYK JPEG without an Adobe marker, whose colours DALI inverts")
    if kind == "PPM":
        _check_netpbm(file)
    if kind == "BMP" and _bits(file) == 16:
        raise Refused("BMP of 16 bits a pixel, whose colours DALI rounds in another way or cannot decode")
    if kind == "WEBP" and _hides_exif(file):
        raise Refused("WebP with EXIF behind a chunk of odd length, where DALI's parser fails")
    if _end_looks_wrong(file, kind, size):
        _decode(file, kind, size)
    return height, width


def _check_netpbm(file: IO[bytes]) -> None:
    file.seek(0)
    words = re.sub(rb"#[^\n]*", b" ", file.read(_TAIL)).split(maxsplit=4)
    if words[0] not in (b"P4", b"P5", b"P6"):
        raise Refused("text or float PPM, which DALI cannot decode")
    if words[0] != b"P4" and words[3] not in (b"255", b"65535"):
        raise Refused(f"PPM with maximum {words[3].decode(errors='replace')}, which DALI does not scale")


def _bits(file: IO[bytes]) -> int:
    """Bits of a pixel of a BMP; its first header had shorter numbers."""
    file.seek(14)
    header = file.read(16)
    return int.from_bytes(header[10:12] if header[0] == 12 else header[14:16], "little")


def _check_tiff(file: IO[bytes], tags: Any, size: int) -> None:
    """Refuses a TIFF by its first page. Libtiff makes up what is missing of a JPEG of unknown length."""
    if 1 in tags.get(338, ()):
        raise Refused("TIFF with associated alpha, by which DALI does not divide the colours")
    if tags.get(259) != 7:
        return
    starts, lengths = (tags.get(strips, tags.get(tiles, ())) for strips, tiles in ((273, 324), (279, 325)))
    for start, length in zip(starts, lengths or [size - start for start in starts], strict=False):
        file.seek(start + max(0, length - _END))
        if start + length > size or b"\xff\xd9" not in file.read(_END):
            raise Refused("incomplete: some of its pixels are missing, and decoders would invent them")


def _hides_exif(file: IO[bytes]) -> bool:
    """Whether a WebP's EXIF chunk lies behind one of odd length, whose padding DALI 2.4 forgets."""
    place, odd = 12, False
    for _ in range(_CHUNKS):
        file.seek(place)
        header = file.read(8)
        if len(header) < 8 or header[:4] == b"EXIF":
            return odd and len(header) == 8
        length = int.from_bytes(header[4:], "little")
        odd |= bool(length % 2)
        place += 8 + length + length % 2
    return False


def _end_looks_wrong(file: IO[bytes], kind: str, size: int) -> bool:
    """Whether the file may have been cut off, judged by its last bytes or by the lengths it states."""
    if kind in ("BMP", "PPM", "TIFF"):
        return True  # mostly uncompressed: decoding them is reading them
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 > size
    if kind == "PNG":
        file.seek(max(0, size - _TAIL))
        return b"IEND\xaeB`\x82" not in file.read(_TAIL)
    file.seek(max(_first_scan(file, size), size - _TAIL))
    return b"\xff\xd9" not in file.read(_TAIL)


def _first_scan(file: IO[bytes], size: int) -> int:
    """Where the pixels of a JPEG begin, or its `size`. Before them a thumbnail may have an end of its own."""
    place = 2
    for _ in range(_STEPS):
        file.seek(place)
        start = file.read(4)
        if len(start) < 4 or start[0] != 0xFF or start[1] == 0xDA:
            return place if start[:2] == b"\xff\xda" else size
        place += 1 if start[1] == 0xFF else 2 + int.from_bytes(start[2:], "big")
    return size


def _has_end(file: IO[bytes], size: int) -> bool:
    """Whether the chunks of a PNG lead to its last one."""
    place = 8
    for _ in range(_STEPS):
        file.seek(place)
        start = file.read(8)
        if start[4:] == b"IEND":
            return True
        place += 12 + int.from_bytes(start[:4], "big")
        if place > size or not start[4:].isalpha():
            return False
    return False


def _decode(file: IO[bytes], kind: str, size: int) -> None:
    """Decodes in full; `Refused` where that fails here or would fail in DALI."""
    # Pillow forgives a PNG without its last chunk, DALI does not.
    if kind == "PNG" and not _has_end(file, size):
        raise Refused("truncated or damaged (no IEND chunk)")
    file.seek(0)
    with Image.open(file, formats=_FORMATS) as image:
        image.load()
