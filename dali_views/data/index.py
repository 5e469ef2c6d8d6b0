"""SampleIndex: which images there are, where, how large, of which class."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..system.files import PathLike
from . import bad_list
from .build import open_source, scan_coco, scan_folder, scan_list, scan_shards, scan_source
from .cache import CachedSource
from .listing import LeftOut, check_labels
from .lmdb_store import scan_lmdb
from .names import pack_names, unpack_names
from .remote import as_url, below, is_remote
from .scan import Scan, read_index, write_index
from .source import Form, Source, needs, picked, read_rows
from .truth import RowBoxes, match_boxes

__all__ = ["LeftOut", "SampleIndex"]

Cache: TypeAlias = "bool | PathLike"

# A folder too high, which would otherwise pass for a data set of such classes.
_PART = re.compile(r"(train(ing)?|val(id|idation)?|test(ing)?|unlabeled)_?(\d{4})?", re.IGNORECASE)


@dataclass(frozen=True, eq=False, repr=False)
class SampleIndex(Scan):
    """The images of a data set, in a fixed order, as a few NumPy arrays.

    Every file that was listed is either a row or in `left_out` with a reason. All rectangles are
    (y0, x0, y1, x1) fractions of the stored image. Do not change the arrays; `subset` and `with_boxes` return
    new indexes.

    Folders, lists, COCO sets and shards may lie in an object store, as s3://bucket/train or
    gs://bucket/train-{000..146}.tar. Credentials, region and endpoint come from the environment. A store is
    listed each time, and only what has changed is read again. A store that is gone, denies access or does not
    answer for $DALI_VIEWS_RETRY_SECONDS (default 60) raises a SourceGoneError.

    Arguments of several constructors:

        cache: Where the scan is kept. True: $DALI_VIEWS_CACHE, $XDG_CACHE_HOME/dali_views or
            ~/.cache/dali_views; a path: that folder; False: nowhere. Only changed files are opened again.
        processes: Worker processes of the scan; 0 means threads in this process. By default threads for small
            sets, else one process per core.
        progress: Shows a bar on a terminal.
        labels: (N,) whole numbers, -1 unknown.
        classes: Their names; by default their numbers.
    """

    arrays: NDArray[np.uint8] | None = None
    """(N, H, W, 3) pixels, for an index of arrays."""
    source: Source | None = field(default=None, metadata={"stored": False})
    """What reads the N images, unless they are local files of their own or arrays."""
    box_start: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(N + 1,) sample i has the boxes from box_start[i] up to box_start[i + 1]."""
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(M, 4) ground-truth boxes, for evaluation; nothing trains on them."""
    box_labels: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """(M,) class of each box, -1 unknown."""
    fingerprint: str = ""
    """Hex SHA-256 over relative paths and sizes (arrays: shape and pixels), but not the root."""
    quarantine: dict[str, str] = field(default_factory=dict, metadata={"stored": False})
    """Reason by full path of images that turned out to be unreadable. Loaders fill it; an index and its
    subsets share it. It is neither saved nor part of the fingerprint."""

    def __post_init__(self) -> None:
        if self.holder and self.source is None:
            object.__setattr__(self, "source", open_source(self))
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

    # -- constructors -----------------------------------------------------------------------------

    @classmethod
    def _of(cls, scan: Scan) -> SampleIndex:
        return cls(**{one.name: getattr(scan, one.name) for one in fields(Scan)})

    @classmethod
    def from_folder(
        cls,
        root: PathLike,
        cache: Cache = True,
        processes: int | None = None,
        progress: bool = True,
        classes: Sequence[str] | None = None,
    ) -> SampleIndex:
        """Indexes a folder of class folders, or a flat folder of images.

        A class is a folder in `root` with images in or below it, numbered in the order of the names; without
        such folders all labels are -1. Rows are sorted by relative path, folder by folder. Hidden folders are
        skipped. With `classes`, only these class folders count, numbered in the order given (ImageNet-100; or
        the classes of the training set, so that another split has the same numbers).

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: It holds no usable image, or lacks one of the classes.
        """
        return cls._of(scan_folder(root, cache, processes, progress, classes))

    @classmethod
    def from_list(
        cls,
        file: PathLike,
        root: PathLike | None = None,
        cache: Cache = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes the images that a text file names: a path and optionally a label per line.

        A tab separates path and label. Without a tab the whole line is the path if it is an existing file or
        ends like an image; else the last word is the label. Labels are numbers or, if any is not, words that
        are numbered in sorted order. Blank lines and lines starting with # are skipped. Relative paths start
        from `root` (default: the list's folder); files that do not lie below it are left out.

        Raises:
            FileNotFoundError: There is no such list or root.
            ValueError: It names no usable image, or a label below -1.
        """
        return cls._of(scan_list(file, root, cache, processes, progress))

    @classmethod
    def from_coco(
        cls,
        images: PathLike,
        instances: PathLike | None = None,
        cache: Cache = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes COCO images, with the boxes of an instances file (JSON) as ground truth.

        The label of an image is the class of its largest box (in pixels; the first of equals), -1 without
        boxes. Category ids become 0, 1, ... in their order. Crowd boxes are left out; boxes are clipped to
        the image. Without `instances` every image in the folder counts, unlabelled.

        Raises:
            FileNotFoundError: There is no such folder or file.
            ValueError: The file is not COCO's, or no image is usable.
        """
        scanned, boxes = scan_coco(images, instances, cache, processes, progress)
        return cls._of(scanned).with_row_boxes(boxes)

    @classmethod
    def from_arrays(
        cls, images: NDArray[np.uint8], labels: ArrayLike | None = None, classes: Sequence[str] | None = None
    ) -> SampleIndex:
        """Indexes (N, H, W, 3) uint8 RGB pixels in memory (CIFAR); they are neither copied nor encoded.

        Raises:
            TypeError: The images are not a uint8 array, or the labels not whole numbers.
            ValueError: A shape does not fit, or a label has no class.
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
    def from_shards(
        cls,
        pattern: PathLike | Sequence[PathLike],
        cache: Cache = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes the images in tar shards, as WebDataset writes them; the order is one over all of them.

        Every shard is scanned once, and its members are then read where they lie. An image takes the label of
        the member with the same key: `.cls`, a number or a word, else `.json` with a whole number as "label",
        "cls" or "class_id". A key is the name up to the first dot after its folder. Labels are numbered as in
        `from_list`. Other members are skipped. Left out are links, devices, sparse files, names that lead out
        of the shard, compressed shards, and the lost part of a damaged shard.

        Args:
            pattern: A shard; a glob; braces ("train-{000000..000146}.tar", "{a,b}.tar"); a text file with one
                of these per line, relative to it; or a list of all these. Rows are in the order of the shards
                and, in a shard, of its members.

        Raises:
            FileNotFoundError: There is no such shard.
            IsADirectoryError: It is a folder; name the shards in it.
            ValueError: They hold no usable image, or a label below -1.
        """
        return cls._of(scan_shards(pattern, cache, processes, progress))

    @classmethod
    def from_table(
        cls,
        pattern: PathLike | Sequence[PathLike],
        image: str | None = None,
        label: str | None = None,
        cache: Cache = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes the images in Parquet and Arrow tables, as Hugging Face's datasets have them.

        Images of uncompressed Arrow files are read where they lie, as those of shards are. An image in a
        Parquet or a compressed file is read with its whole group; a warning says where this is slow. A row is
        named table/path if the tables give a path to each image, else table/row 17. Left out are images
        without bytes, and the lost part of a damaged table. Needs pyarrow (the extra `tables`).

        Args:
            pattern: As in `from_shards` (.parquet, .pq, .arrow, .feather); or a folder of such files, as
                `save_to_disk` writes it. All tables must have the columns of the first.
            image: Column with the encoded images: binary, or a struct with the binary field `bytes`. By
                default the only column that is.
            label: Column with whole numbers, -1 or null unknown, or words, numbered in sorted order. By
                default the first of label, labels, cls, class and fine_label; else all labels are -1.
                Names that a table gives to its numbers (ClassLabel) become the classes.

        Raises:
            FileNotFoundError: There is no such table.
            ValueError: No column fits, or several do; the tables hold no usable image, or a label below -1;
                pyarrow is not installed.
        """
        with needs("pyarrow"):
            from .tables import scan_tables
        return cls._of(scan_tables(pattern, image, label, cache, processes, progress))

    @classmethod
    def from_lmdb(cls, path: PathLike, cache: Cache = True, progress: bool = True) -> SampleIndex:
        """Indexes the images in an LMDB environment whose values are encoded images, as LSUN's are.

        The names are the keys, in their order; a key that cannot be a name becomes "hex:" and its bytes in
        hexadecimal digits. If each has a folder, as n01440764/x.JPEG, the first folder is the class, and
        classes are numbered in sorted order; else all labels are -1. Keys like __len__ are skipped. Left out
        are values that are no encoded images (pickles, Caffe's Datum, pixels), and the lost part of a damaged
        environment. While the index is in use, nobody may write to the environment.

        Args:
            path: Folder with a data.mdb, or file of an environment without one.

        Raises:
            FileNotFoundError: There is no such environment.
            ValueError: It is no LMDB environment, lies in a store, or holds no usable image.
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
    ) -> SampleIndex:
        """Indexes the images of a source of one's own, which gives their encoded bytes; see `source.Source`.

        Args:
            sizes: (N, 2) stored height and width in pixels of each image. Without them every image is read
                once, and unusable ones are left out.
            names: A name of each, for messages, lists of bad images and the fingerprint; by default "row 7".

        Raises:
            TypeError: Labels or sizes are not whole numbers.
            ValueError: A number or shape does not fit, two names are equal, or no image is usable.
            SourceGoneError, ConnectionError: The whole source cannot be read.
        """
        given, kinds = check_labels(labels, len(source), classes)
        found = scan_source(source, sizes, names, progress)
        paths = pack_names([os.fsencode(name) for name in found.names])
        read = picked(source, found.rows)
        return cls("", paths, found.sizes, given[found.rows], kinds, found.left_out, source=read)

    # -- reading it -------------------------------------------------------------------------------

    def path(self, i: int) -> str:
        """Full path of row `i`; for arrays a name that messages can show."""
        if self.paths is None:
            return f"<array {range(len(self))[i]}>"
        return os.path.join(self.root, os.fsdecode(self.paths[i].tobytes().rstrip(b"\0")))

    def path_rows(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Full paths of many rows, as DALI's `io.file.read` takes them.

        Args:
            rows: (B,) row numbers.

        Returns:
            (B, P) UTF-8, padded with NULs.

        Raises:
            TypeError: This is no index of files.
        """
        if self.paths is None:
            raise TypeError("An index of arrays has no paths; read index.arrays instead.")
        if self.source is not None:
            raise TypeError("The images of this index are no files; read them by index.encoded instead.")
        root = np.frombuffer(os.fsencode(os.path.join(self.root, "")), np.uint8)
        out = np.empty((len(rows), len(root) + self.paths.shape[1]), np.uint8)
        out[:, : len(root)] = root
        out[:, len(root) :] = self.paths[rows]
        return out

    @property
    def form(self) -> Form:
        """How the graph is given the images: as names of files, encoded bytes or pixels."""
        return "pixels" if self.arrays is not None else "bytes" if self.source is not None else "names"

    def inputs(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """What a graph of this `form` is given for rows (B,): (B, P) names, B times bytes or (B, H, W, 3)."""
        if self.source is not None:
            return read_rows(self.source, rows.astype(np.int64))
        return self.path_rows(rows) if self.arrays is None else np.asarray(self.arrays[rows])

    def encoded(self, i: int) -> bytes:
        """What the image file of row `i` holds, wherever it lies.

        Raises:
            TypeError: This is an index of arrays.
            OSError: It cannot be read; of a source of one's own, any error.
        """
        if self.arrays is not None:
            raise TypeError("The images of an index of arrays are decoded; read index.arrays instead.")
        if self.source is None:
            return Path(self.path(i)).read_bytes()
        return read_rows(self.source, np.array([i]))[0].tobytes()

    def truth(self, i: int) -> NDArray[np.float32]:
        """(n, 4) ground-truth boxes of row `i`; n may be 0."""
        i = range(len(self))[i]
        return self.boxes[self.box_start[i] : self.box_start[i + 1]]

    def summary(self) -> str:
        """A few lines for people: how many images, which sizes, what was left out and why."""
        kinds = "class" if len(self.classes) == 1 else "classes"
        middle = np.median(self.sizes, axis=0)
        largest = self.sizes[np.argmax(np.prod(self.sizes, 1, np.int64))]
        lines = [
            f"{len(self)} images in {len(self.classes)} {kinds} ({self.root or self.form}), "
            f"{int((self.labels < 0).sum())} without a label",
            f"height x width: median {middle[0]:.0f} x {middle[1]:.0f}, largest {largest[0]} x {largest[1]}",
        ]
        if self.classes and all(_PART.fullmatch(name) for name in self.classes):
            parts = ", ".join(self.classes)
            lines.append(f"named like parts of a data set ({parts}); to use one of them, name its folder")
        if len(self.boxes):
            boxed = int(np.count_nonzero(np.diff(self.box_start)))
            lines.append(f"{len(self.boxes)} ground-truth boxes on {boxed} images")
        if self.left_out:
            lines.append(f"{len(self.left_out)} files left out:")
            lines += [f"  {path}: {reason}" for path, reason in self.left_out[:20]]
        if len(self.left_out) > 20:
            lines.append(f"  and {len(self.left_out) - 20} more")
        return "\n".join(lines)

    # -- making others of it ----------------------------------------------------------------------

    def subset(self, rows: ArrayLike) -> SampleIndex:
        """The index of some rows, in the order given (or of a mask of N truth values); classes stay.

        Raises:
            ValueError: No row is named, or `rows` is no list.
            IndexError: A row that is not there, a mask of another length, or what are no whole numbers.
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
            source=None if self.source is None else picked(self.source, chosen),
            box_start=np.concatenate([[0], ends]).astype(np.int64),
            boxes=self.boxes[inside],
            box_labels=self.box_labels[inside],
            fingerprint="",
        )

    def without(self, bad: PathLike) -> SampleIndex:
        """The same index less the files that a list names, which join `left_out` with the list's reasons.

        Args:
            bad: Text file as `dali-views check`, `dali-views pack` and a training run write it: a line
                `path<tab>reason` per file, relative to the root or absolute. Files that the index does not
                have are passed over.

        Raises:
            FileNotFoundError: There is no such list.
            TypeError: This is an index of arrays.
            ValueError: It names every image.
        """
        if self.paths is None:
            raise TypeError("An index of arrays has no files to leave out; choose rows by subset instead.")
        listed, start = bad_list.load(bad), os.path.join(self.root, "")
        reasons = {below(path, self.root): reason for path, reason in listed.items()}
        # A table or an environment may have names like ./a.jpg, which a list of them has, too.
        reasons |= {path.removeprefix(start): reason for path, reason in listed.items()}
        names = [os.fsdecode(name) for name in unpack_names(self.paths)]
        keep = np.array([name not in reasons for name in names])
        if keep.all():
            if reasons and not reasons.keys() & {path for path, _ in self.left_out}:
                warnings.warn(
                    f"None of the {len(listed)} files that {os.fspath(bad)!r} names is below {self.root!r}; "
                    "its paths are relative to that folder, or absolute.",
                    stacklevel=2,
                )
            return self
        if not keep.any():
            raise ValueError(f"The list {os.fspath(bad)!r} names every image of {self.root!r}; check it.")
        gone = [LeftOut(name, reasons[name]) for name in names if name in reasons]
        return replace(self.subset(keep), left_out=self.left_out + gone)

    def with_boxes(self, boxes: Mapping[str, ArrayLike] | PathLike) -> SampleIndex:
        """The same index with other ground-truth boxes; each takes the label of its image.

        Args:
            boxes: (n, 4) fractions y0, x0, y1, x1 by relative path or by file name where that occurs
                once; or a text file with a line `name x0 y0 x1 y1` per box, in pixels and inclusive, as
                Tiny-ImageNet has it (a box reaches from x0 / width to (x1 + 1) / width).

        Raises:
            FileNotFoundError: There is no such text file.
            ValueError: A box is no rectangle in the image, or none of the names is known.
        """
        names = [] if self.paths is None else unpack_names(self.paths)
        return self.with_row_boxes(match_boxes(boxes, names, self.sizes, self.labels))

    def with_row_boxes(self, truth: RowBoxes) -> SampleIndex:
        """The same index with these ground-truth boxes."""
        order = np.argsort(truth.rows, kind="stable")
        ends = np.cumsum(np.bincount(truth.rows, minlength=len(self)))
        start = np.concatenate([[0], ends]).astype(np.int64)
        return replace(self, box_start=start, boxes=truth.boxes[order], box_labels=truth.labels[order])

    def cached(self, folder: PathLike, gigabytes: float, content: str = "") -> SampleIndex:
        """The same index, whose encoded images are kept on a local disk as they are read.

        Several processes and data sets may share the folder; see `cache.CachedSource`. Cache first and
        choose subsets of it then, so that all subsets share what is kept.

        Args:
            folder: On a local disk; made if it is not there.
            gigabytes: That all that is kept in the folder may take.
            content: Of a source of one's own, a text that tells what it holds from what another one does, or
                this one at another time: its path and its version. Names and sizes alone do not.

        Raises:
            OSError: The folder cannot be made or written.
            TypeError: The images are arrays, or local files of their own.
            ValueError: They are of a source of one's own, and `content` is not told; or the folder is a URL.
        """
        if self.source is None:
            raise TypeError("The images of this index are at hand already; only those of a source are kept.")
        if not self.holder and not content:
            raise ValueError(
                "What a source of one's own holds is not known here, so that another one's images might be "
                "taken for its own; tell them apart by cached(..., content=) with its path and version."
            )
        if is_remote(folder):
            raise ValueError(
                f"Images are kept on a local disk, not in {as_url(folder)}; name a folder there."
            )
        told_of = [self.fingerprint, self.column, content]
        digest = hashlib.sha256(json.dumps(told_of).encode())
        for told in (self.places, self.file_stamps):
            if told is not None:
                digest.update(np.ascontiguousarray(told).data)
        kept = CachedSource(self.source, folder, int(gigabytes * 1e9), digest.hexdigest()[:32])
        return replace(self, source=kept)

    # -- storing it -------------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Writes the index to one file (safetensors), in one step.

        Raises:
            TypeError: This is an index of a source of one's own, which no file can hold.
        """
        if self.source is not None and not self.holder:
            raise TypeError("An index of a source cannot be saved; make it of the source again.")
        write_index(path, self)

    @classmethod
    def load(cls, path: PathLike) -> SampleIndex:
        """Reads what `save` wrote; the images are not looked at.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, contradicts itself, or is of another format version.
        """
        return read_index(path, cls)
