"""SampleIndex: which images there are, where, how large, of which class."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self, Unpack

from ..system.files import PathLike, pack_names, unpack_names
from . import bad_list
from .cache import CachedSource
from .headers import scan_source
from .listing import check_labels, scan_folder, scan_list
from .lmdb_store import scan_lmdb
from .remote import ObjectSource, as_url, is_remote
from .scan import Cache, LeftOut, Options, Scan, read_index, write_index
from .shards import scan_shards
from .source import FileSource, Form, Picked, RangeSource, Source, needs, read_rows
from .truth import RowBoxes, largest, match_boxes, scan_coco

# A folder too high, which would otherwise pass for a data set of such classes.
_PART = re.compile(r"(train(ing)?|val(id|idation)?|test(ing)?|unlabeled)_?(\d{4})?", re.IGNORECASE)


@dataclass(frozen=True, eq=False, repr=False)
class SampleIndex(Scan):
    """The images of a data set, in a fixed order, as a few NumPy arrays.

    Every listed file is either a row or in `left_out` with a reason. Rectangles are (y0, x0, y1, x1)
    fractions of the stored image. Do not change the arrays; `subset` returns a new index. Folders, lists,
    COCO sets and shards may lie in an object store, as s3://bucket/train-{000..146}.tar.

    Options of a scan are `cache`, where it is kept (True: $DALI_VIEWS_CACHE, $XDG_CACHE_HOME/dali_views or
    ~/.cache/dali_views; a path; False: nowhere), worker `processes` (0: threads; None: by the size of the
    set) and a bar of `progress`. Constructors raise FileNotFoundError for an absent name, ValueError if no
    image is usable or labels, classes or columns do not fit, SourceGoneError for a store without answer.
    """

    arrays: NDArray[np.uint8] | None = None
    """(N, H, W, 3) pixels, for an index of arrays."""
    source: Source | None = field(default=None, metadata={"stored": False})
    """What reads the N images, unless they are local files of their own or arrays."""
    box_start: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(N + 1,) sample i has the boxes from box_start[i] up to box_start[i + 1]."""
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(M, 4) ground-truth boxes, for evaluation; they guide no crop by themselves, see `largest_boxes`."""
    box_labels: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """(M,) class of each box, -1 unknown."""
    fingerprint: str = ""
    """Hex SHA-256 over relative paths and sizes (arrays: shape and pixels), but not the root."""
    quarantine: dict[str, str] = field(default_factory=dict, metadata={"stored": False})
    """Reason by full path of images that loaders could not read; an index and its subsets share it."""

    def __post_init__(self) -> None:
        if self.holder and self.source is None:
            object.__setattr__(self, "source", _open_source(self))
        if not len(self.box_start):
            object.__setattr__(self, "box_start", np.zeros(len(self) + 1, np.int64))
        if not self.fingerprint:
            content: Any = np.ascontiguousarray(self.arrays if self.paths is None else self.paths)
            digest = hashlib.sha256(repr(content.shape).encode())
            digest.update(content.data)
            digest.update(np.ascontiguousarray(self.sizes).data)
            object.__setattr__(self, "fingerprint", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        return f"SampleIndex({len(self)} images, {len(self.classes)} classes, root={self.root!r})"

    @classmethod
    def _of(cls, scan: Scan) -> Self:
        return cls(**{one.name: getattr(scan, one.name) for one in fields(Scan)})

    @classmethod
    def from_folder(
        cls, root: PathLike, *, classes: Sequence[str] | None = None, **options: Unpack[Options]
    ) -> Self:
        """Indexes a folder of class folders, or a flat folder of images.

        A class is a folder in `root` with images in or below it, numbered by name (without any, labels are
        -1), or with `classes` in the order given. Rows are sorted by path; hidden folders are skipped.
        """
        return cls._of(scan_folder(root, classes, **options))

    @classmethod
    def from_list(cls, file: PathLike, root: PathLike | None = None, **options: Unpack[Options]) -> Self:
        """Indexes the images that a text file names: a path and optionally a label per line.

        A tab separates the two; without one, the last word is the label unless the line ends like an image or
        is a file. Labels are numbers, else words numbered in sorted order. Lines with # are skipped. Paths
        start from `root` (default: the list's folder); files outside are left out.
        """
        return cls._of(scan_list(file, root, **options))

    @classmethod
    def from_coco(
        cls, images: PathLike, instances: PathLike | None = None, **options: Unpack[Options]
    ) -> Self:
        """Indexes COCO images, with the boxes of an instances file (JSON) as ground truth.

        The label of an image is the class of its largest box (the first of equals), -1 without boxes. Crowd
        boxes are left out. Without `instances` every image in the folder counts, unlabelled.
        """
        scanned, boxes = scan_coco(images, instances, **options)
        return cls._of(scanned)._with_row_boxes(boxes)

    @classmethod
    def from_arrays(
        cls, images: NDArray[np.uint8], labels: ArrayLike | None = None, classes: Sequence[str] | None = None
    ) -> Self:
        """Indexes pixels in memory (CIFAR), (N, H, W, 3) uint8 RGB; they are neither copied nor encoded.

        Labels are (N,) whole numbers, -1 unknown; `classes` are their names, by default their numbers.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            kind = getattr(images, "dtype", type(images).__name__)
            raise TypeError(f"images must be a NumPy array of uint8, not {kind}; convert it first.")
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ValueError(f"images must have the shape (N, H, W, 3), not {images.shape}; transpose them.")
        given, names = check_labels(labels, len(images), classes)
        sizes = np.full((len(images), 2), images.shape[1:3], np.int32)
        return cls("", None, sizes, given, names, arrays=images)

    @classmethod
    def from_shards(cls, pattern: PathLike | Sequence[PathLike], **options: Unpack[Options]) -> Self:
        """Indexes the images in tar shards, as WebDataset writes them; one order is drawn over all of them.

        `pattern` is a shard; a glob; braces ("train-{000000..000146}.tar", "{a,b}.tar"); a text file with one
        of these per line, relative to it; or a list of all these. Rows keep the order of shards and members.
        The label of an image is in the member of the same key (the name up to the first dot): `.cls`, a
        number or a word, else `.json` with a whole number as "label", "cls" or "class_id"; see `from_list`.
        """
        return cls._of(scan_shards(pattern, **options))

    @classmethod
    def from_table(
        cls,
        pattern: PathLike | Sequence[PathLike],
        image: str | None = None,
        label: str | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """Indexes the images in Parquet and Arrow tables, as Hugging Face's datasets have them.

        `pattern` is as in `from_shards` (.parquet, .pq, .arrow, .feather), or a folder of such files, all
        with the columns of the first. A row is named table/path if each image has a path, else table/row 17.
        `image` is a column of binary, or of structs with the binary field `bytes`; by default the only one.
        `label` is a column of whole numbers (-1 or null: unknown) or words, by default the first of label,
        labels, cls, class and fine_label. Names of numbers (ClassLabel) become the classes.
        """
        with needs("pyarrow"):
            from .tables import scan_tables
        return cls._of(scan_tables(pattern, image, label, **options))

    @classmethod
    def from_lmdb(cls, path: PathLike, cache: Cache = True, progress: bool = True) -> Self:
        """Indexes the images in an LMDB environment (a file, or a folder with a data.mdb), as LSUN's are.

        The names are the keys, in their order, or "hex:" and the digits of a key that cannot be a name. If
        each has a folder, as n01440764/x.JPEG, the first folder is the class; else all labels are -1. Keys
        like __len__ are skipped. While the index is in use, nobody may write to the environment.
        """
        return cls._of(scan_lmdb(path, cache, progress))

    @classmethod
    def from_source(
        cls,
        source: Source,
        labels: ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        sizes: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        progress: bool = True,
    ) -> Self:
        """Indexes the images of your own source; see `Source`, and `from_arrays` for the labels.

        Without `sizes`, (N, 2) heights and widths, every image is read once. `names` are for messages.
        """
        given, kinds = check_labels(labels, len(source), classes)
        rows, paths, shapes, bad = scan_source(source, sizes, names, progress)
        left_out = [LeftOut(*one) for one in bad]
        return cls("", paths, shapes, given[rows], kinds, left_out, source=Picked(source, rows))

    def path(self, i: int) -> str:
        """Full path of row `i`; for arrays a name that messages can show."""
        if self.paths is None:
            return f"<array {range(len(self))[i]}>"
        return os.path.join(self.root, os.fsdecode(self.paths[i].tobytes().rstrip(b"\0")))

    @property
    def form(self) -> Form:
        """Where the images are: "names" (files of their own), "bytes" (a source) or "pixels" (arrays)."""
        return "pixels" if self.arrays is not None else "bytes" if self.source is not None else "names"

    @property
    def reader(self) -> Source | None:
        """What reads the encoded images, wherever they are; None for arrays."""
        if self.source is not None or self.paths is None:
            return self.source
        return FileSource(self.root, self.paths, self.sizes)

    def inputs(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """What a graph receives for rows (B,): B times encoded bytes, or (B, H, W, 3) pixels."""
        if (reader := self.reader) is not None:
            return read_rows(reader, rows.astype(np.int64))
        assert self.arrays is not None
        return np.asarray(self.arrays[rows])

    def encoded(self, i: int) -> bytes:
        """The encoded image of row `i`, wherever it lies; an OSError, or what its source raises."""
        if (reader := self.reader) is None:
            raise TypeError("The images of an index of arrays are decoded; read index.arrays instead.")
        return read_rows(reader, np.array([range(len(self))[i]]))[0].tobytes()

    def truth(self, i: int) -> NDArray[np.float32]:
        """(n, 4) ground-truth boxes of row `i`; n may be 0."""
        i = range(len(self))[i]
        return self.boxes[self.box_start[i] : self.box_start[i + 1]]

    def largest_boxes(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The n rows with ground-truth boxes, and (n, 4) the largest box of each, the first of equals.

        ``regions.update(*index.largest_boxes())`` makes them guide crops.
        """
        return largest(self.box_start, self.boxes)

    def summary(self) -> str:
        """A short text for readers: how many images, which sizes, what was left out and why."""
        high, wide = np.median(self.sizes, axis=0)
        largest = self.sizes[np.argmax(np.prod(self.sizes, 1, np.int64))]
        kinds = f"{len(self.classes)} class{'es' * (len(self.classes) != 1)} ({self.root or self.form})"
        lines = [
            f"{len(self)} images in {kinds}, {int((self.labels < 0).sum())} without a label",
            f"height x width: median {high:.0f} x {wide:.0f}, largest {largest[0]} x {largest[1]}",
        ]
        if self.classes and all(_PART.fullmatch(name) for name in self.classes):
            parts = ", ".join(self.classes)
            lines.append(f"named like parts of a data set ({parts}); to use one of them, name its folder")
        if boxed := np.count_nonzero(np.diff(self.box_start)):
            lines.append(f"{len(self.boxes)} ground-truth boxes on {boxed} images")
        lines += [f"{len(self.left_out)} files left out:"] if self.left_out else []
        lines += [f"  {path}: {reason}" for path, reason in self.left_out[:20]]
        lines += [f"  and {len(self.left_out) - 20} more"] if len(self.left_out) > 20 else []
        return "\n".join(lines)

    def subset(self, rows: ArrayLike) -> Self:
        """The index of some rows, in the order given (or of a mask of N truth values); classes stay.

        A ValueError without any row, an IndexError for a row that is not there or a mask of another length.
        """
        picks = np.asarray(rows)
        chosen = np.arange(len(self))[picks] if picks.size else picks
        if chosen.ndim != 1 or not len(chosen):
            raise ValueError("A subset needs a list of at least one row, or a mask with one True.")
        counts = np.diff(self.box_start)[chosen]
        ends = np.cumsum(counts)
        inside = np.repeat(self.box_start[chosen] - ends + counts, counts) + np.arange(ends[-1])
        return replace(
            self,
            paths=None if self.paths is None else pack_names(unpack_names(self.paths[chosen])),
            sizes=self.sizes[chosen],
            labels=self.labels[chosen],
            arrays=None if self.arrays is None else self.arrays[chosen],
            places=None if self.places is None else self.places[chosen],
            source=None if self.source is None else Picked(self.source, chosen),
            box_start=np.concatenate([[0], ends]).astype(np.int64),
            boxes=self.boxes[inside],
            box_labels=self.box_labels[inside],
            fingerprint="",
        )

    def without(self, bad: PathLike) -> Self:
        """The same index without the files in a list (see `bad_list`), which join `left_out`.

        Its paths are relative to the root or absolute. A ValueError if it names every image.
        """
        if self.paths is None:
            raise TypeError("An index of arrays has no files to leave out; choose rows by subset instead.")
        names = [os.fsdecode(name) for name in unpack_names(self.paths)]
        reasons = bad_list.load_below(bad, self.root)
        keep = np.array([name not in reasons for name in names])
        if not keep.any():
            raise ValueError(f"The list {os.fspath(bad)!r} names every image of {self.root!r}; check it.")
        if not keep.all():
            gone = [LeftOut(name, reasons[name]) for name in names if name in reasons]
            return replace(self.subset(keep), left_out=self.left_out + gone)
        if reasons and not reasons.keys() & {path for path, _ in self.left_out}:
            told = f"None of the files that {os.fspath(bad)!r} names is below {self.root!r}"
            warnings.warn(f"{told}; its paths are relative to that folder, or absolute.", stacklevel=2)
        return self

    def with_boxes(self, boxes: Mapping[str, ArrayLike] | PathLike) -> Self:
        """The same index with other ground-truth boxes; each takes the label of its image.

        `boxes` are (n, 4) fractions y0, x0, y1, x1 by relative path or by file name where that occurs once;
        or a text file with a line `name x0 y0 x1 y1` per box, in pixels, x1 and y1 inclusive; or a folder of
        YOLO's label files: labels/NAME.txt, beside images/NAME.jpg, has a line `class cx cy w h` per box, in
        fractions of the image, and is empty if there is no object. Their classes are not used.
        """
        names = [] if self.paths is None else unpack_names(self.paths)
        return self._with_row_boxes(match_boxes(boxes, names, self.sizes, self.labels))

    def _with_row_boxes(self, truth: RowBoxes) -> Self:
        order = np.argsort(truth.rows, kind="stable")
        ends = np.cumsum(np.bincount(truth.rows, minlength=len(self)))
        start = np.concatenate([[0], ends]).astype(np.int64)
        return replace(self, box_start=start, boxes=truth.boxes[order], box_labels=truth.labels[order])

    def cached(self, folder: PathLike, gigabytes: float, content: str = "") -> Self:
        """The same index, whose encoded images are kept on a local disk as they are read.

        `gigabytes` is the limit of all that share the folder. Cache first, then choose subsets. `content`
        identifies the content of your own source, for example its path and version.
        """
        if self.source is None:
            raise TypeError("The images of this index are local already; only those of a source are cached.")
        if not self.holder and not content:
            raise ValueError("Identify this source by its path and version: cached(..., content=).")
        if is_remote(folder):
            raise ValueError(f"{as_url(folder)} is not a local disk; name a local folder to keep images in.")
        digest = hashlib.sha256(json.dumps([self.fingerprint, self.column, content]).encode())
        for array in (a for a in (self.places, self.file_stamps) if a is not None):
            digest.update(np.ascontiguousarray(array).data)
        kept = CachedSource(self.source, folder, int(gigabytes * 1e9), digest.hexdigest()[:32])
        return replace(self, source=kept)

    def save(self, path: PathLike) -> None:
        """Writes the index to one file (safetensors), in one step; a TypeError for a source of your own."""
        if self.source is not None and not self.holder:
            raise TypeError("An index of a source cannot be saved; make it from the source again.")
        write_index(path, self)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Reads what `save` wrote; a ValueError if it is damaged, wrong or of another format."""
        return read_index(path, cls)


def _open_source(scan: Scan) -> Source:
    """What reads images that are neither local files of their own nor arrays; no file is opened yet."""
    names = scan.paths if scan.holder == "objects" else scan.files
    read: Any = ObjectSource if is_remote(scan.root) else RangeSource
    if scan.holder == "groups":
        with needs("pyarrow"):
            from .tables import GroupSource
        read = partial(GroupSource, column=scan.column)
    return cast(Source, read(scan.root, names, scan.file_stamps, scan.places))
