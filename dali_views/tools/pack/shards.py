"""pack_shards: any index as tar shards, as WebDataset reads them and `SampleIndex.from_shards`.

Rows are divided among the shards by their numbers alone, before any image is looked at: so a shard hangs on
nothing but its own rows, and one that is finished is finished whatever becomes of the others.

Beside the shards lies what pack has to know of them when it is called again: in records/, the checksum of
every member and the reasons of every image that is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...data import bad_list
from ...data.headers import cores
from ...data.index import SampleIndex
from ...data.listing import number_labels
from ...data.source import GONE
from ...system.files import PathLike, atomic_write
from .claim import claimed, outside
from .folder import LEFT_OUT, Packed
from .image import Stored, pack_image
from .lists import image_names, label_words, not_packed, shard_keys
from .read import blocks, in_order, pack_bar, read_block
from .shard_write import Record, Shard, append, close, is_intact, read_record, write_record

__all__ = ["PER_SHARD", "pack_shards"]

PER_SHARD = 10_000
"""Images in a shard: of ImageNet's, about 1 GB."""


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
    """Writes a data set as tar shards; `SampleIndex.from_shards(destination/*.tar)` reads them.

    Images keep their order and their bytes, unless `short_side` has larger ones shrunk, as folder.py
    tells; those of arrays become PNG. Each is `KEY.jpg` (.png, ...: what it is), with its label in `KEY.cls`:
    the name of its class, or the number where names would be numbered anew. KEY is the image's name less its
    ending, with other dots made underscores. Ground-truth boxes are not packed. Beside the shards lie

    - left_out.txt: a line `path<tab>reason` per image of the source that is not in the shards;
    - pack.json and records/: the settings, and what a later call has to know. No reader needs them.

    Killed at any moment and called again, it goes on with the first shard that was not finished and ends with
    the same files. Every image is decoded, so a damaged one is found here and left out, as far as decoders
    tell. Every shard is read back before it gets its name; those that are there already are read by each
    call, and written anew if they are not, byte for byte, what was written. Where nothing is wrong with
    them the source is not read, also for what they have left out: to try again, delete a shard.

    Args:
        source: Any index.
        destination: A new or empty folder, or one that an earlier call with the same settings began.
        short_side: Bound on the shorter side, in pixels; by default all images stay as they are.
        quality: JPEG quality, 1 to 100, of what is shrunk.
        per_shard: Rows of the source for each shard, counted before any is left out.
        numbers: Labels are numbers and no names, as WebDataset's own decoder wants them.
        workers: Threads, by default one per core.
        progress: Shows a bar on a terminal.

    Raises:
        ValueError: An option is out of range; the destination lies in the source, holds something else, was
            begun with other settings or is being packed by another process; or no image is usable.
        SourceGoneError: The whole source cannot be read; the next call goes on.
        OSError: A shard cannot be written (a full disk) or is not what was written to it.
    """
    if not (short_side is None or short_side >= 1) or not 1 <= quality <= 100 or per_shard < 1:
        raise ValueError(
            "short_side and per_shard are at least 1 and quality lies between 1 and 100; "
            f"got short_side={short_side}, quality={quality}, per_shard={per_shard}."
        )
    if workers is not None and workers < 1:
        raise ValueError(f"workers are at least 1; got workers={workers}.")
    folder = outside(source, destination)
    words = label_words(source.labels, None if numbers else source.classes)
    settings = {
        "source": source.fingerprint[:16],
        "labels": _digest(source, words),
        "short_side": short_side,
        "quality": None if short_side is None else quality,
        "per_shard": per_shard,
    }
    shards = [
        Shard(folder, number, range(start, min(start + per_shard, len(source))))
        for number, start in enumerate(range(0, len(source), per_shard))
    ]
    workers = workers or cores()
    with claimed(folder, settings):
        kept = _finished(shards, workers, progress)
        missing = [shard for shard in shards if shard.number not in kept]
        written = _write_all(source, words, missing, short_side, quality, workers, progress)
        done = [(kept | written)[shard.number] for shard in shards]
        reasons = {row: reason for one in done for row, reason in one.left_out.items()}
        bad = {_name(source, row): reason for row, reason in reasons.items()}
        left_out = not_packed(source, bad)
        bad_list.save(folder / LEFT_OUT, left_out)
    images = sum(one.images for one in done)
    if not images:
        first = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3])
        raise ValueError(f"None of the {len(bad)} images could be packed ({first}); check the source.")
    _warn_of_other_labels(source, words, reasons)
    encoded, before = (sum(one.encoded for one in written.values()), sum(one.images for one in kept.values()))
    return Packed(
        written=encoded,
        copied=images - before - encoded,
        kept=before,
        left_out=left_out,
        bytes_before=sum(one.before for one in done),
        bytes_after=sum(one.after for one in done),
        shards=len(shards),
    )


def _digest(source: SampleIndex, words: Mapping[int, str]) -> str:
    """Of all labels as they are written."""
    digest = hashlib.sha256(json.dumps(words).encode())
    digest.update(np.ascontiguousarray(source.labels, "<i4").data)
    return digest.hexdigest()[:16]


class _Done(NamedTuple):
    """What a finished shard comes to."""

    images: int
    encoded: int
    before: int
    after: int
    left_out: dict[int, str]


def _done(record: Record) -> _Done:
    sizes = [member.size for member in record.members if member.height]
    return _Done(len(sizes), record.encoded, record.before, sum(sizes), record.left_out)


def _finished(shards: Sequence[Shard], workers: int, progress: bool) -> dict[int, _Done]:
    """The shards that are there and whole, by their numbers."""

    def check(shard: Shard) -> _Done | None:
        record = read_record(shard.record)
        try:
            whole = record is not None and is_intact(shard.file, record.members)
        except OSError:
            whole = False
        return _done(record) if record is not None and whole else None

    there = [shard for shard in shards if os.path.lexists(shard.file)]
    done: dict[int, _Done] = {}
    with (
        pack_bar("verify", sum(len(shard.rows) for shard in there), progress) as bar,
        ThreadPoolExecutor(workers) as threads,
    ):
        for shard, one in zip(there, threads.map(check, there), strict=True):
            bar.update(len(shard.rows))
            if one is not None:
                done[shard.number] = one
    if damaged := [shard.file.name for shard in there if shard.number not in done]:
        told = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        warnings.warn(f"Not what was written there, so written anew: {told}.", stacklevel=3)
    return done


def _write_all(
    source: SampleIndex,
    words: Mapping[int, str],
    shards: Sequence[Shard],
    short_side: int | None,
    quality: int,
    workers: int,
    progress: bool,
) -> dict[int, _Done]:
    """Writes shards one after the other, of images that threads make ready in their order."""
    keys = shard_keys(image_names(source)) if shards else []
    work = partial(_pack_block, source, short_side, quality)
    tasks = [block for shard in shards for block in blocks(shard.rows)]
    done: dict[int, _Done] = {}
    with (
        pack_bar("pack", sum(map(len, tasks)), progress) as bar,
        ThreadPoolExecutor(workers) as threads,
        closing(in_order(threads, work, tasks, workers + 2)) as parts,
    ):
        for shard in shards:
            images = (one for part in islice(parts, len(blocks(shard.rows))) for one in part)
            done[shard.number] = _done(_write(shard, images, source.labels, keys, words, bar))
    return done


class _Image(NamedTuple):
    """A row on its way into a shard."""

    row: int
    before: int
    """Bytes in the source."""
    stored: Stored | str
    """Or why it is left out."""


def _pack_block(source: SampleIndex, short_side: int | None, quality: int, rows: range) -> list[_Image]:
    images = []
    for row, data in zip(rows, read_block(source, rows), strict=True):
        height, width = source.sizes[row].tolist()
        stored: Stored | str
        if isinstance(data, str):
            stored = data
        else:
            stored = pack_image(data, (height, width), short_side, quality, only_jpeg=False)
            if source.arrays is not None and not isinstance(stored, str):
                stored = stored._replace(copied=False)
        images.append(_Image(row, len(data), stored))
    return images


def _write(
    shard: Shard,
    images: Iterable[_Image],
    labels: NDArray[np.int32],
    keys: Sequence[str],
    words: Mapping[int, str],
    bar: Any,
) -> Record:
    """Writes one shard, reads it back, writes its record, and only then gives it its name."""
    record = Record()
    try:
        with atomic_write(shard.file) as file:
            for row, before, stored in images:
                bar.update()
                if isinstance(stored, str):
                    record.left_out[row] = stored
                    continue
                name = f"{keys[row]}.{stored.ending}"
                record.members.append(append(file, name, stored.data, stored.height, stored.width))
                if word := words.get(int(labels[row])):
                    record.members.append(append(file, f"{keys[row]}.cls", word.encode()))
                record.before += before
                record.encoded += not stored.copied
            close(file)
            if not is_intact(Path(file.name), record.members):
                raise OSError("the disk gives other bytes than were written")
            write_record(shard.record, record)
    except GONE:
        raise
    except OSError as error:
        raise OSError(
            f"{str(shard.file)!r} cannot be written ({error.strerror or error}); make room or mend the disk, "
            "and pack again: finished shards are kept."
        ) from error
    return record


def _name(source: SampleIndex, row: int) -> str:
    """As in the index's own list of what is left out."""
    if source.paths is None:
        return source.path(row)
    return os.fsdecode(source.paths[row].tobytes().rstrip(b"\0"))


def _warn_of_other_labels(source: SampleIndex, words: Mapping[int, str], bad: Collection[int]) -> None:
    """Names are numbered by those that are there, so a class that has lost all its images shifts others."""
    good = np.ones(len(source), np.bool_)
    good[list(bad)] = False
    used = [label for label in np.unique(source.labels[good]).tolist() if label >= 0]
    if used and number_labels([words[label] for label in used])[0] != used:
        lost = [word for label, word in words.items() if label not in set(used)]
        warnings.warn(
            f"No image of the classes {lost[:5]} is usable, so the shards' classes are numbered differently "
            f"than the source's; to keep its numbers, leave out what {LEFT_OUT} lists, and pack anew.",
            stacklevel=3,
        )
