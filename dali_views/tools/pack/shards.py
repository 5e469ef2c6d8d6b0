"""pack_shards: any index as tar shards in WebDataset's layout, which `SampleIndex.from_shards` reads.

    shard-000000.tar    ant/0001.jpg  ant/0001.cls  ant/0002.png  ant/0002.cls  ...
    left_out.txt        path<tab>reason of each image of the source that is not in the shards
    boxes.txt           true boxes, if the source has any, for `SampleIndex.with_boxes` and `data.boxes`
    pack.json           the settings, and the rows that finished shards lack; no reader needs it

A row's number decides its shard, so a shard depends on its own rows only. It is written aside and renamed: a
shard with its final name is finished, and a later call skips it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ...data import bad_list
from ...data.headers import cores
from ...data.index import SampleIndex
from ...data.listing import number_labels
from ...data.remote import as_url, is_remote
from ...data.source import GONE, SourceGoneError, read_each, reason
from ...system.files import PathLike, atomic_write
from .image import Stored, image_names, label_words, pack_image, shard_keys

PER_SHARD = 10_000  # about 1 GB of ImageNet
LEFT_OUT, BOXES, STATE = "left_out.txt", "boxes.txt", "pack.json"
_BLOCK = 8  # rows that a thread reads at a time, which is faster in some sources


@dataclass(frozen=True)
class Packed:
    """The result of `pack_shards`."""

    shards: int
    images: int
    """Images in all of them, also in those that an earlier call had finished."""
    left_out: dict[str, str]
    """Reason by path relative to the source: what its index had left out, and what turned out to be bad."""

    def __str__(self) -> str:
        shards = f"{self.shards} shard{'s' * (self.shards > 1)}"
        return f"{self.images} images in {shards}; {len(self.left_out)} left out"


def pack_shards(
    source: SampleIndex,
    destination: PathLike,
    *,
    short_side: int | None = None,
    quality: int = 90,
    per_shard: int = PER_SHARD,
    numbers: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Packed:
    """Writes a data set as tar shards, for `SampleIndex.from_shards(destination/*.tar)`.

    Images keep order and bytes, unless `short_side` shrinks larger ones to JPEG; arrays become PNG. KEY.cls
    holds the class of KEY.jpg: its name, or its number if names would be numbered differently. KEY is the
    image's name without its ending. Every image is decoded, and a damaged one left out (delete its shard to
    try again). After a kill, the same call skips the finished shards and ends with the same files.

    Args:
        destination: A new or empty local folder, or one that an earlier call with the same settings began.
        short_side: Bound on the shorter side, in pixels; by default all images stay as they are.
        quality: JPEG quality, 1 to 100, of what is shrunk.
        per_shard: Rows of the source per shard, counted before any is left out. A shard must fit in memory.
        numbers: Labels are numbers, never names, as WebDataset's own decoder requires.
        workers: Threads, by default one per core.

    Raises:
        ValueError: An option is out of range; the destination lies in the source, holds something else or was
            begun with other settings; or no image is usable.
        OSError: A shard cannot be written (a full disk), or the source is gone; the next call continues.
    """
    if not 1 <= quality <= 100 or min(per_shard, 1 if short_side is None else short_side) < 1:
        given = f"quality={quality}, short_side={short_side}, per_shard={per_shard}"
        raise ValueError(f"quality is 1 to 100, short_side and per_shard are at least 1; got {given}.")
    words = label_words(source.labels, None if numbers else source.classes)
    labels = json.dumps(words).encode() + source.labels.astype("<i4").tobytes()
    settings = {
        "source": source.fingerprint[:16],
        "labels": hashlib.sha256(labels).hexdigest()[:16],
        "short_side": short_side,
        "quality": None if short_side is None else quality,
        "per_shard": per_shard,
    }
    folder, before = _begin(source, destination, settings)
    rows, names = range(len(source)), image_names(source)
    shards = {
        folder / f"shard-{start // per_shard:06d}.tar": rows[start : start + per_shard]
        for start in rows[::per_shard]
    }
    missing = {file: part for file, part in shards.items() if not file.is_file()}
    bad = {row: why for row, why in before.items() if not any(row in part for part in missing.values())}
    keys = shard_keys(names) if missing else []
    convert = partial(_convert, source, short_side, quality)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # Pillow's about odd EXIF and large images
        threads = ThreadPoolExecutor(workers or cores())
        stack.callback(threads.shutdown, cancel_futures=True)
        for file, part in missing.items():
            blocks = [part[start : start + _BLOCK] for start in range(0, len(part), _BLOCK)]
            images = zip(part, chain.from_iterable(threads.map(convert, blocks)), strict=True)
            text, hidden = f"{file.name} of {len(shards)}", None if progress else True
            try:
                # The name of a shard is written last, after the state.
                with atomic_write(file) as draft, tarfile.open(None, "w", draft) as tar:
                    for row, stored in tqdm(images, text, len(part), disable=hidden):
                        if isinstance(stored, str):
                            bad[row] = stored
                            continue
                        _add(tar, f"{keys[row]}.{stored[0]}", stored[1])
                        if word := words.get(int(source.labels[row])):
                            _add(tar, f"{keys[row]}.cls", word.encode())
                    _save(folder, settings, bad)
            except GONE:
                raise
            except OSError as error:
                raise OSError(
                    f"{str(file)!r} cannot be written ({error.strerror or error}); free some space and pack "
                    "again: finished shards are kept."
                ) from error
    # A file that the index left out because it is listed twice is in the shards, once.
    there = set(names) if source.left_out else set()
    left_out = {name: why for name, why in source.left_out if name not in there}
    left_out |= {names[row]: bad[row] for row in sorted(bad)}
    bad_list.save(folder / LEFT_OUT, left_out)
    if len(bad) == len(source):
        first = "; ".join(f"{path}: {why}" for path, why in list(left_out.items())[:3])
        raise ValueError(f"None of the {len(bad)} images could be packed ({first}); check the source.")
    good = np.delete(np.arange(len(source)), list(bad))
    used = [label for label in np.unique(source.labels[good]).tolist() if label >= 0]
    if used and number_labels([words[label] for label in used])[0] != used:
        lost = [word for label, word in words.items() if label not in used]
        text = f"No image of the classes {lost[:5]} is usable, so readers number the others differently; to "
        text += f"keep the numbers, leave out what {LEFT_OUT} lists, and pack again."
        warnings.warn(text, stacklevel=2)
    if len(source.boxes):
        _write_boxes(source, good, list(shards))
    return Packed(len(shards), len(good), left_out)


def _convert(source: SampleIndex, short_side: int | None, quality: int, rows: range) -> list[Stored | str]:
    """What is stored for each row, or why it is left out. Safe in threads."""
    try:
        if source.source is None:
            found = [_encoded(source, row) for row in rows]
        else:
            arrays = read_each(source.source, np.array(rows, np.int64))
            found = [one if isinstance(one, str) else one.tobytes() for one in arrays]
    except GONE as error:
        raise SourceGoneError(
            f"The source of the images is gone ({error}); restore it and pack again to continue."
        ) from error
    return [
        data if isinstance(data, str) else pack_image(data, (height, width), short_side, quality)
        for data, (height, width) in zip(found, source.sizes[rows].tolist(), strict=True)
    ]


def _encoded(index: SampleIndex, row: int) -> bytes | str:
    """The file of an image, a PNG of an array; or why it cannot be read."""
    try:
        if index.arrays is None:
            return index.encoded(row)
        Image.fromarray(index.arrays[row]).save(png := io.BytesIO(), "PNG")
        return png.getvalue()
    except (OSError, ValueError) as error:
        if not os.path.isdir(index.root):
            raise SourceGoneError(f"there is no folder {index.root!r}") from error
        return reason(error)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # without time and user, so that equal images give equal bytes
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _begin(source: SampleIndex, place: PathLike, settings: dict[str, Any]) -> tuple[Path, dict[int, str]]:
    """The folder, without links in its path; and why shards of an earlier call lack rows, by row."""
    if is_remote(place):
        raise ValueError(
            f"Shards are written to a local folder, not to {as_url(place)}; name one, then upload."
        )
    folder = Path(os.path.realpath(place))
    if source.form == "names" and folder.is_relative_to(os.path.realpath(source.root)):
        raise ValueError(f"The copy {str(folder)!r} would lie in its source; choose a folder outside.")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STATE).is_file():
        if any(not file.name.startswith(f".{STATE}.") for file in folder.iterdir()):
            raise ValueError(f"{str(folder)!r} holds other things than packed shards; choose a new folder.")
        _save(folder, settings, {})
    try:
        state = json.loads((folder / STATE).read_bytes())
        before, bad = dict(state["settings"]), {int(row): str(why) for row, why in state["left_out"]}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{str(folder / STATE)!r} is damaged; choose a new folder or delete it.") from None
    differ = ", ".join(f"{key} {before.get(key)}" for key in settings if before.get(key) != settings[key])
    if differ:
        raise ValueError(f"{str(folder)!r} was packed with {differ}; choose a new folder or delete it.")
    for name in ("shard-*.tar", STATE, LEFT_OUT, BOXES):
        for draft in folder.glob(f".{name}.*.tmp"):  # of a killed call
            draft.unlink(missing_ok=True)
    return folder, bad


def _save(folder: Path, settings: dict[str, Any], bad: dict[int, str]) -> None:
    with atomic_write(folder / STATE) as file:
        file.write(json.dumps({"settings": settings, "left_out": sorted(bad.items())}).encode())


def _write_boxes(source: SampleIndex, rows: NDArray[np.int64], shards: Sequence[Path]) -> None:
    """True boxes as `SampleIndex.with_boxes` reads them: pixels of the copy, ends included."""
    copy = SampleIndex.from_shards(shards, cache=False, progress=False)
    with atomic_write(shards[0].with_name(BOXES)) as file:
        for row, name, (height, width) in zip(rows, image_names(copy), copy.sizes.tolist(), strict=True):
            for y0, x0, y1, x1 in source.truth(row).tolist():
                corners = x0 * width, y0 * height, x1 * width - 1, y1 * height - 1
                file.write(os.fsencode(f"{name} {' '.join(f'{corner:.9g}' for corner in corners)}\n"))
