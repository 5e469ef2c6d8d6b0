"""What a packed data set stores for one image: its name, the text of its label, and its content.

Shrinking is Lanczos, antialiased: views of the result came nearer to views of the originals (by 0.2 to
0.3 dB) than with bicubic, for a tenth more time. As in the loader, EXIF orientation is not applied; its tag
stays, for other programs. Alpha and all other metadata are dropped, colour profiles too.

A crop of a fifth of a 256 x 341 image is enlarged 1.7 times to a view of 224; of a 375 x 500 photograph, the
median of ImageNet, 1.2 times. Choose a larger short side if small crops must be as sharp as from originals.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...data.headers import inspect
from ...data.index import SampleIndex
from ...data.listing import EXTENSIONS, number_labels
from ...system.files import unpack_names

_SHARD = re.compile(r".*?\.tar/")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# By Pillow's name of the format. Readers accept JPEG 2000 by content, but not by its usual ending.
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jpg", "TIFF": "tif"}
_ORIENTATION = 0x0112

Stored = tuple[str, bytes]  # ending (what the image is, not what it was called) and content


def image_names(index: SampleIndex) -> list[str]:
    """The name of each image in its index; the row's number where there are none, as in arrays."""
    if index.paths is None:
        width = len(str(len(index) - 1))
        return [f"{row:0{width}d}" for row in range(len(index))]
    return [os.fsdecode(name) for name in unpack_names(index.paths)]


def shard_keys(names: Sequence[str]) -> list[str]:
    """The key of each image: its name without the ending, and a number if two would be equal.

    No key leaves its folder or has a dot after its last slash, where WebDataset would end it. A member of
    another shard loses the shard's name if the names stay different.
    """
    short = [_SHARD.sub("", name, count=1) for name in names]
    if len(set(short)) == len(names):
        names = short
    taken: set[str] = set()
    number: Counter[str] = Counter()
    keys = []
    for name in names:
        steps = _CONTROL.sub("_", name).split("/")
        *folders, last = [step for step in steps if step not in ("", ".", "..")] or ["_"]
        stem, ending = os.path.splitext(last)
        base = stem if ending.lower() in EXTENSIONS else last
        base = key = "/".join([*folders, base.replace(".", "_")])
        while key in taken:
            number[base] += 1
            key = f"{base}_{number[base]}"
        taken.add(key)
        keys.append(key)
    return keys


def label_words(labels: NDArray[np.int32], classes: Sequence[str] | None) -> dict[int, str]:
    """The text of each label in (N,) `labels` but -1: its class, if readers then number the labels as here.

    If not (names are unsorted, look like numbers, are no text; one has no image; no `classes`), its number.
    """
    used = [label for label in np.unique(labels).tolist() if label >= 0]
    try:
        names = [] if classes is None else [classes[label] for label in used]
        read = [name.encode().decode().strip() for name in names]
        if names and read == names and all(names) and number_labels(names)[0] == used:
            return dict(zip(used, names, strict=True))
    except ValueError:
        pass  # no UTF-8, or names that look like numbers and are too large
    return {label: str(label) for label in used}


def pack_image(data: bytes, indexed: tuple[int, int], short_side: int | None, quality: int) -> Stored | str:
    """What is stored for a file of `indexed` (height, width), or why it is left out. Safe in threads."""
    height, width, reason = inspect(io.BytesIO(data), len(data))
    if reason:
        return reason
    if (height, width) != indexed:
        return (
            f"has changed since it was indexed: {width} x {height} pixels, then {indexed[1]} x {indexed[0]}"
        )
    try:
        with Image.open(io.BytesIO(data)) as image:
            if short_side is not None and min(indexed) > short_side:
                return "jpg", _shrunk(image, height, width, short_side, quality)
            # Decode it, to find damage. An eighth of a JPEG is cheaper, and still reads the whole file.
            image.draft(None, (1, 1))
            image.load()
            kind = str(image.format)
            return _ENDINGS.get(kind, kind.lower()), data
    except MemoryError:
        raise  # not a fault of the image
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        return f"cannot be decoded and stored ({' '.join(str(error).split()) or type(error).__name__})"


def _shrunk(image: Image.Image, height: int, width: int, short_side: int, quality: int) -> bytes:
    """JPEG with this short side (the other side is rounded) and the orientation tag."""
    scale = short_side / min(height, width)
    size = round(width * scale), round(height * scale)
    # A large JPEG is decoded to no more than twice the size. The box is fractional: the last row and column
    # of such a draft are partly padding, which must not shift the picture.
    draft = image.draft(None, (2 * size[0], 2 * size[1]))
    pixels, turn = as_stored(image)
    box = (0, 0, *pixels.size) if draft is None else draft[1]
    pixels = pixels.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    pixels.info = {}  # Pillow would store comments and more from it
    exif = Image.Exif()
    if turn in range(2, 9):
        exif[_ORIENTATION] = turn
    out = io.BytesIO()
    pixels.save(out, "JPEG", quality=quality, optimize=True, exif=exif)
    return out.getvalue()


def as_stored(image: Image.Image) -> tuple[Image.Image, int]:
    """The pixels as stored, L or RGB, equal to what the loader decodes; and the EXIF orientation."""
    if image.format == "TIFF":  # Pillow turns these, and only these, while it loads them: turn it back
        turn = _orientation(image)
        image.load()
        image.getexif()[_ORIENTATION] = {6: 8, 8: 6}.get(turn, turn)
        image = ImageOps.exif_transpose(image)
    else:
        image.load()  # before the tags: those of a PNG load it, too, and its damage would pass for bad tags
        turn = _orientation(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), turn


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1  # damaged metadata is no damage to the pixels
