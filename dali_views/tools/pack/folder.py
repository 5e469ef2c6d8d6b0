"""pack: a folder of images re-encoded once to a bounded short side, so that every later epoch decodes less.

An image whose short side exceeds the bound is shrunk to it and stored as JPEG; none is enlarged. A JPEG that
is small enough is copied byte for byte, for it would only lose; CMYK, PNG, WebP and the others become JPEG
with the pixels that the loader decodes: alpha is dropped, not blended, as `Image.convert("RGB")` does.
Shrinking is Lanczos, antialiased: views cut from the result came nearer to views of the originals (by 0.2 to
0.3 dB) than with bicubic, and much nearer than with a box or a triangle, for a tenth more time.

EXIF orientation is not applied, as in the loader, but its tag stays, so that other programs turn the packed
image as they turned the original. All other metadata of a re-encoded image is dropped, colour profiles
included: the loader's decoder does not look at them.

What is lost: a crop of a fifth of the area of a 256 x 341 image is about 132 pixels wide and is enlarged 1.7
times to make a view of 224. From photographs of 375 x 500 pixels, the median of ImageNet, it is enlarged
1.2 times. Pack to a larger short side where views cut small must be as sharp as from the originals.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...data import bad_list
from ...data.headers import cores
from ...data.index import SampleIndex
from ...system.files import PathLike, atomic_write
from .claim import claimed, outside
from .image import Encoded, bounded, pack_image
from .lists import image_names, not_packed, packed_names, scaled_instances, stored_names, write_list
from .read import blocks, in_order, pack_bar, read_block

__all__ = ["Packed", "pack"]

LIST, LEFT_OUT, INSTANCES = "list.txt", "left_out.txt", "instances.json"


@dataclass(frozen=True)
class Packed:
    """What `pack` or `pack_shards` has done."""

    written: int
    """Images re-encoded by this run."""
    copied: int
    """Images copied byte for byte by this run."""
    kept: int
    """Images that an earlier run had finished."""
    left_out: dict[str, str]
    """Why, by path relative to the source: what its index had left out, and what turned out to be bad. Of a
    file that was listed twice the first is in the copy."""
    bytes_before: int
    """Size of the source's images, without those left out; of arrays, as PNG."""
    bytes_after: int
    """Size of the packed images. Both are without what an earlier run copied to a folder from no folder."""
    shards: int = 0
    """Tar shards, of which a folder has none."""

    def __str__(self) -> str:
        kept = f", {self.kept} finished before" if self.kept else ""
        shards = f" in {self.shards} shard{'s' * (self.shards > 1)}" if self.shards else ""
        return (
            f"{self.written + self.copied + self.kept} images{shards}: {self.written} re-encoded, "
            f"{self.copied} copied as they are{kept}; {len(self.left_out)} left out; "
            f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after"
        )


def pack(
    source: SampleIndex,
    destination: PathLike,
    *,
    short_side: int = 256,
    quality: int = 90,
    workers: int | None = None,
    progress: bool = True,
    instances: PathLike | None = None,
) -> Packed:
    """Writes a copy of a data set as a folder of bounded images; the top of this file tells what changes.

    The copy has the same folders and names, of shards their members'; an ending other than .jpg or .jpeg
    becomes .jpg (of a.jpg and a.png, the second becomes a.png.jpg). So a class stays a class, and crops and
    boxes given as fractions stay valid; those in pixels do not. Beside the images lie

    - list.txt: a line per image with its label, in the order of the source, for `SampleIndex.from_list`;
    - left_out.txt: a line `path<tab>reason` per file of the source that is not in the copy;
    - instances.json: `instances` in pixels of the copy, for `SampleIndex.from_coco`;
    - pack.json: the settings.

    Killed at any moment and called again, it goes on and ends with the same files. What it wrote before is
    not made again, even if a source file has changed since then and kept its size in pixels. Every image is
    decoded in full, so a damaged one is found here; but as every decoder does, this one passes over most
    damage inside a JPEG. At the end each header and file end of the copy is read and compared with what
    should be there.

    Args:
        source: Index of files, shards or a source.
        destination: A new or empty folder, or one that an earlier call with the same settings began.
        short_side: Bound on the shorter side, in pixels.
        quality: JPEG quality, 1 to 100, of what is re-encoded.
        workers: Threads, by default one per core. Processes are hardly faster: Pillow lets go of the
            interpreter for all but half a millisecond per image.
        progress: Shows a bar on a terminal.
        instances: COCO instances file of the source. Boxes, areas, polygons and key points are scaled;
            run-length masks of shrunk images are dropped, with a warning.

    Raises:
        TypeError: The index is one of arrays.
        ValueError: An option is out of range; the destination lies in the source, holds something else, was
            begun with other settings or is being packed by another process; a file is in the index twice;
            `instances` does not belong to the source; or no image is usable.
        FileNotFoundError: There is no such `instances` file.
        SourceGoneError: The whole source cannot be read; the next call goes on.
        OSError: The copy cannot be written (a full disk).
        RuntimeError: A packed file is damaged: something else has written there.
    """
    if source.arrays is not None:
        raise TypeError("An index of arrays has no files to copy; pack it to shards (pack_shards).")
    if short_side < 1 or not 1 <= quality <= 100 or (workers is not None and workers < 1):
        raise ValueError(
            "short_side and workers are at least 1 and quality lies between 1 and 100; "
            f"got short_side={short_side}, workers={workers}, quality={quality}."
        )
    if instances is not None and not os.path.isfile(instances):
        raise FileNotFoundError(f"The COCO file {os.fspath(instances)!r} does not exist; check the path.")
    folder = outside(source, destination)
    names = stored_names(source)
    new_names = packed_names(image_names(source))
    targets = [None if new is None else os.path.join(folder, new) for new in new_names]
    settings = {"source": source.fingerprint[:16], "short_side": short_side, "quality": quality}
    with claimed(folder, settings):
        done = _run(source, targets, short_side, quality, workers or cores(), progress)
        bad = {names[row]: one.reason for row, one in enumerate(done) if one.reason}
        left_out = not_packed(source, bad)
        bad_list.save(folder / LEFT_OUT, left_out)
        good = [row for row, one in enumerate(done) if not one.reason]
        if not good:
            first = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3])
            raise ValueError(f"None of the {len(bad)} images could be packed ({first}); check the source.")
        part = source.subset(good)
        sizes = [bounded(height, width, short_side) for height, width in part.sizes.tolist()]
        images = {new: size for row, size in zip(good, sizes, strict=True) if (new := new_names[row])}
        write_list(folder / LIST, list(images), part.labels, part.classes)
        if instances is not None:
            renamed = dict(zip([names[row] for row in good], images.items(), strict=True))
            scaled = scaled_instances(instances, renamed)
            with atomic_write(folder / INSTANCES) as file:
                file.write(json.dumps(scaled).encode())
        _check(folder, sizes, progress)
    _warn_of_lost_classes(part)
    counts = Counter(one.what for one in done)
    return Packed(
        written=counts["written"],
        copied=counts["copied"],
        kept=counts["kept"],
        left_out=left_out,
        bytes_before=sum(one.before for one in done),
        bytes_after=sum(one.after for one in done),
    )


class _Done(NamedTuple):
    """What became of an image."""

    what: str
    """``"written"``, ``"copied"``, ``"kept"`` from an earlier run, or ``""`` if left out."""
    before: int = 0
    """Size in the source in bytes; after: in the copy."""
    after: int = 0
    reason: str = ""
    """Why it was left out."""


def _run(
    source: SampleIndex,
    targets: Sequence[str | None],
    short_side: int,
    quality: int,
    workers: int,
    progress: bool,
) -> list[_Done]:
    """Packs every image to its target in parallel; the results are in their order."""
    work = partial(_pack_block, source, targets, short_side, quality)
    done: list[_Done] = []
    with (
        pack_bar("pack", len(source), progress) as bar,
        ThreadPoolExecutor(workers) as threads,
        closing(in_order(threads, work, blocks(range(len(source))), workers + 2)) as parts,
    ):
        for part in parts:
            done += part
            bar.update(len(part))
    return done


def _pack_block(
    source: SampleIndex, targets: Sequence[str | None], short_side: int, quality: int, rows: range
) -> list[_Done]:
    """Writes the images of some rows, less those that are there or cannot be used. Safe in threads.

    Raises:
        OSError: The copy cannot be written; an image that cannot be read is left out.
    """
    missing = [row for row in rows if (target := targets[row]) and not os.path.isfile(target)]
    read = dict(zip(missing, read_block(source, missing), strict=True))
    return [_pack_row(source, row, targets[row], read.get(row), short_side, quality) for row in rows]


def _pack_row(
    source: SampleIndex,
    row: int,
    target: str | None,
    data: Encoded | str | None,
    short_side: int,
    quality: int,
) -> _Done:
    if target is None:
        return _Done(
            "", reason="its path leads out of the source, holds a tab or a line break, or is too long"
        )
    if data is None:
        # What a source had to be read for again is not counted.
        sizes = () if source.source else (os.path.getsize(source.path(row)), os.path.getsize(target))
        return _Done("kept", *sizes)
    if isinstance(data, str):
        return _Done("", reason=data)
    height, width = source.sizes[row].tolist()
    stored = pack_image(data, (height, width), short_side, quality, only_jpeg=True)
    if isinstance(stored, str):
        return _Done("", reason=stored)
    with atomic_write(target) as file:
        file.write(stored.data)
    return _Done("copied" if stored.copied else "written", len(data), len(stored.data))


def _check(folder: Path, sizes: Sequence[tuple[int, int]], progress: bool) -> None:
    """Reads the header and the end of every image in the copy."""
    index = SampleIndex.from_list(folder / LIST, cache=False, progress=progress)
    wrong = [f"{folder / path} ({reason})" for path, reason in index.left_out]
    if not wrong:
        rows = np.flatnonzero((index.sizes != np.array(sizes)).any(axis=1)).tolist()
        wrong = [f"{index.path(row)} (wrong size)" for row in rows]
    if wrong:
        raise RuntimeError(f"Damaged in the copy: {', '.join(wrong[:3])}; delete these files and pack again.")


def _warn_of_lost_classes(part: SampleIndex) -> None:
    """Class folders without a usable image are not in the copy, which changes the numbers of the others."""
    present = set(part.labels.tolist())
    absent = [name for label, name in enumerate(part.classes) if label not in present]
    lost = [name for name in absent if part.root and os.path.isdir(os.path.join(part.root, name))]
    if lost:
        warnings.warn(
            f"No image of the classes {lost[:5]} is usable, so the folder's classes are numbered differently "
            f"than the source's; {LIST} has the labels of the source.",
            stacklevel=3,
        )
