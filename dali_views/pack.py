"""pack: a data set re-encoded once to a bounded short side, so that every later epoch decodes less.

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

import fcntl
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .atomic import PathLike, atomic_write
from .index import SampleIndex
from .index_file import unpack_names
from .pack_image import Done, Job, bounded, pack_image
from .pack_lists import packed_names, scaled_instances, write_list
from .pipeline import default_threads

__all__ = ["Packed", "pack"]

LIST, LEFT_OUT, INSTANCES, SETTINGS = "list.txt", "left_out.txt", "instances.json", "pack.json"
_CHUNK = 4


@dataclass(frozen=True)
class Packed:
    """What `pack` has done."""

    written: int
    """Images re-encoded by this run."""
    copied: int
    """JPEGs copied byte for byte by this run."""
    kept: int
    """Images that an earlier run had finished."""
    left_out: dict[str, str]
    """Why, by path relative to the source: what its index had left out, and what turned out to be bad."""
    bytes_before: int
    """Size of the source's files, without those left out."""
    bytes_after: int
    """Size of the packed images."""

    def __str__(self) -> str:
        kept = f", {self.kept} finished before" if self.kept else ""
        return (
            f"{self.written + self.copied + self.kept} images: {self.written} re-encoded, "
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
    """Writes a copy of a data set with bounded images; the top of this file tells what changes in them.

    The copy has the same folders and names; an ending other than .jpg or .jpeg becomes .jpg (of a.jpg and
    a.png, the second becomes a.png.jpg). So a class stays a class, and crops and boxes given as fractions
    stay valid; those in pixels do not. Beside the images lie

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
        source: Index of files.
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
        ValueError: The index is one of shards or a source; an option is out of range; the destination lies in
            the source, holds something else, was begun with other settings or is being packed by another
            process; a file is in the index twice; `instances` does not belong to the source; or no image is
            usable.
        FileNotFoundError: There is no such `instances` file.
        OSError: The copy cannot be written (a full disk).
        RuntimeError: A packed file is damaged: something else has written there.
    """
    if source.paths is None:
        raise TypeError("An index of arrays has no files to pack; its images are decoded already.")
    if source.source is not None:
        raise ValueError("Only images that are files are packed; unpack shards first.")
    if short_side < 1 or not 1 <= quality <= 100 or (workers is not None and workers < 1):
        raise ValueError(
            "short_side and workers are at least 1 and quality lies between 1 and 100; "
            f"got short_side={short_side}, workers={workers}, quality={quality}."
        )
    if instances is not None and not os.path.isfile(instances):
        raise FileNotFoundError(f"The COCO file {os.fspath(instances)!r} does not exist; check the path.")
    folder = Path(os.path.realpath(destination))
    if folder.is_relative_to(os.path.realpath(source.root)):
        raise ValueError(f"The copy {str(folder)!r} would lie in its source; choose a folder outside.")
    names = [os.fsdecode(name) for name in unpack_names(source.paths)]
    new_names = packed_names(names)
    jobs = [
        Job(source.path(row), None if new is None else os.path.join(folder, new), height, width)
        for row, (new, (height, width)) in enumerate(zip(new_names, source.sizes.tolist(), strict=True))
    ]
    settings = {"source": source.fingerprint[:16], "short_side": short_side, "quality": quality}
    with _claimed(folder, settings):
        done = _run(jobs, short_side, quality, workers or default_threads(), progress)
        bad = {names[row]: one.reason for row, one in enumerate(done) if one.reason}
        left_out = dict(source.left_out) | bad
        with atomic_write(folder / LEFT_OUT) as file:
            file.writelines(os.fsencode(f"{path}\t{reason}\n") for path, reason in left_out.items())
        good = [row for row, one in enumerate(done) if not one.reason]
        if not good:
            first = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3])
            raise ValueError(f"None of the {len(bad)} images could be packed ({first}); check the source.")
        part = source.subset(good)
        sizes = [bounded(height, width, short_side) for height, width in part.sizes.tolist()]
        images = {new: size for row, size in zip(good, sizes, strict=True) if (new := new_names[row])}
        write_list(folder / LIST, list(images), part.labels.tolist(), part.classes)
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


@contextmanager
def _claimed(folder: Path, settings: Mapping[str, object]) -> Iterator[None]:
    """Holds the folder for this process, once it is known to be new or begun with the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is packing to {str(folder)!r}; let it end first.") from None
        except OSError:
            pass  # a network file system without locks
        file = folder / SETTINGS
        if file.is_file():
            try:
                before = dict(json.loads(file.read_bytes()))
            except (TypeError, ValueError):
                raise ValueError(f"{str(file)!r} is damaged; choose a new folder or delete it.") from None
            differ = [f"{key} {before.get(key)}" for key in settings if before.get(key) != settings[key]]
            if differ:
                told = ", ".join(differ)
                raise ValueError(f"{str(folder)!r} was packed with {told}; choose a new folder or delete it.")
        elif set(os.listdir(folder)) - {f".{SETTINGS}.tmp"}:
            raise ValueError(f"{str(folder)!r} holds other things than a packed copy; choose a new folder.")
        else:
            with atomic_write(file) as draft:
                draft.write(json.dumps(settings).encode())
        yield
    finally:
        os.close(handle)


def _run(jobs: Sequence[Job], short_side: int, quality: int, workers: int, progress: bool) -> list[Done]:
    """Carries the jobs out in parallel; the results are in their order."""
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    done: list[Done] = []
    with (
        ThreadPoolExecutor(workers) as threads,
        tqdm(
            total=len(jobs), desc="pack", unit=" images", delay=1, disable=None if progress else True
        ) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and of large images
        for part in threads.map(lambda jobs: [pack_image(job, short_side, quality) for job in jobs], chunks):
            done += part
            bar.update(len(part))
    return done


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
    lost = [name for name in absent if os.path.isdir(os.path.join(part.root, name))]
    if lost:
        warnings.warn(
            f"No image of the classes {lost[:5]} is usable, so the folder's classes are numbered differently "
            f"than the source's; {LIST} has the labels of the source.",
            stacklevel=3,
        )
