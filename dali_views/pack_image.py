"""One image of a packed data set: what is stored for it, and why it may be left out."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .atomic import atomic_write
from .scan import inspect_file

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


class Job(NamedTuple):
    """An image to be packed."""

    source: str
    target: str | None
    """None if the copy cannot have a file of its name."""
    height: int
    """In pixels as stored, before any EXIF rotation."""
    width: int


class Done(NamedTuple):
    """What became of a job."""

    what: str
    """``"written"``, ``"copied"``, ``"kept"`` from an earlier run, or ``""`` if left out."""
    before: int = 0
    """Size of the source in bytes; after: of the copy."""
    after: int = 0
    reason: str = ""
    """Why it was left out."""


def pack_image(job: Job, short_side: int, quality: int) -> Done:
    """Writes one image, unless it is there or cannot be used. Safe in threads.

    Raises:
        OSError: The copy cannot be written; a source that cannot be read is left out.
    """
    if job.target is None:
        return Done("", reason="its path leads out of the source, or holds a tab or a line break")
    if os.path.isfile(job.target):
        return Done("kept", os.path.getsize(job.source), os.path.getsize(job.target))
    height, width, before, _, reason = inspect_file(os.fsencode(job.source))
    if reason:
        return Done("", reason=reason)
    if (height, width) != (job.height, job.width):
        now, then = f"{width} x {height}", f"{job.width} x {job.height}"
        return Done("", reason=f"has changed since it was indexed: {now} pixels, then {then}")
    try:
        data, copied = _packed_bytes(job, short_side, quality)
    except MemoryError:
        raise  # says nothing about the image
    except Exception as error:
        return Done("", reason=f"cannot be decoded and stored as JPEG ({error})")
    with atomic_write(job.target) as file:
        file.write(data)
    return Done("copied" if copied else "written", before, len(data))


def _packed_bytes(job: Job, short_side: int, quality: int) -> tuple[bytes, bool]:
    """The JPEG that is stored, and whether it is the file itself; raises what Pillow does for a bad image."""
    size = bounded(job.height, job.width, short_side)
    with Image.open(job.source) as image:
        small = size == (job.height, job.width)
        if small and image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            image.load()  # fails for a damaged one
            return Path(job.source).read_bytes(), True
        return _encoded(image, size, quality), False


def _encoded(image: Image.Image, size: tuple[int, int], quality: int) -> bytes:
    """JPEG of a (height, width) with the orientation tag, and nothing else of the metadata."""
    # Of a large JPEG, no more is decoded than twice the size needs. The box is fractional: the last row and
    # column of such a draft are partly padding, and cut there the picture keeps its geometry.
    draft = image.draft(None, (2 * size[1], 2 * size[0]))
    pixels, turn = _stored(image)
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


def _stored(image: Image.Image) -> tuple[Image.Image, int]:
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
