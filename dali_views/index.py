"""SampleIndex: which images there are, where, how large, of which class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dali_views.scan import Record, scan
from dali_views.scan_cache import Stamp, cache_file, read_npz, write_npz
from dali_views.sources import (
    LeftOut,
    Listing,
    find_rows,
    list_coco,
    list_file,
    list_folder,
    read_boxes,
)

__all__ = ["LeftOut", "SampleIndex"]

PathLike: TypeAlias = "str | os.PathLike[str]"
_STORED = ("paths", "sizes", "labels", "arrays", "box_start", "boxes", "box_labels")


@dataclass(frozen=True, eq=False, repr=False)
class SampleIndex:
    """The images of a data set, in a fixed order, as a few NumPy arrays.

    Built by `from_folder`, `from_list`, `from_coco` or `from_arrays`. Every file that was listed is
    either a row or in `left_out` with a reason. All rectangles are (y0, x0, y1, x1) fractions of the
    stored image. Do not change the arrays; `subset` and `with_boxes` return new indexes.
    """

    root: str
    """Absolute folder; "" for arrays."""
    paths: NDArray[np.uint8] | None
    """(N, L) path of each file relative to the root, UTF-8, NUL-padded; None for arrays."""
    sizes: NDArray[np.int32]
    """(N, 2) stored height and width in pixels; EXIF rotation is not applied."""
    labels: NDArray[np.int32]
    """(N,) class of each image, -1 unknown."""
    classes: list[str] = field(default_factory=list)
    arrays: NDArray[np.uint8] | None = None
    """(N, H, W, 3) pixels, for an index of arrays."""
    box_start: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(N + 1,) sample i has the boxes from box_start[i] up to box_start[i + 1]."""
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(M, 4) ground-truth boxes, for evaluation; nothing trains on them."""
    box_labels: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """(M,) class of each box, -1 unknown."""
    left_out: list[LeftOut] = field(default_factory=list)
    fingerprint: str = ""
    """Hex SHA-256 over relative paths and sizes (arrays: shape and pixels); the root plays no part."""

    def __post_init__(self) -> None:
        if not len(self.box_start):
            object.__setattr__(self, "box_start", np.zeros(len(self) + 1, np.int64))
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self._digest())

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        return f"SampleIndex({len(self)} images, {len(self.classes)} classes, root={self.root!r})"

    # -- where the images are ---------------------------------------------------------------------

    @classmethod
    def from_folder(
        cls,
        root: PathLike,
        cache: bool | PathLike = True,
        processes: int | None = None,
        progress: bool = True,
        classes: Sequence[str] | None = None,
    ) -> SampleIndex:
        """Indexes a folder of class folders, or a flat folder of images.

        A class is a folder in `root` with images in or below it, numbered in the order of the names;
        without such folders all labels are -1. Files are sorted by relative path, folder by folder.
        Hidden folders are passed over.

        Args:
            root: The folder.
            cache: Keep the scan under $DALI_VIEWS_CACHE, $XDG_CACHE_HOME/dali_views or
                ~/.cache/dali_views (True), in another folder (a path), or nowhere (False).
            processes: See `dali_views.scan.scan`.
            progress: Shows a bar on a terminal.
            classes: Only these class folders, numbered in the order given (ImageNet-100; or the
                classes of the training set, so that another split has the same numbers).

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: It holds no usable image, or not the classes asked for.
        """
        base = os.path.abspath(os.fspath(root))
        file = cache_file(cache, base, ["folder", None if classes is None else list(classes)])
        stored = _stored(file)
        if stored is not None:
            index, stamp = stored
            if index.paths is not None and stamp.holds(base, index.paths, (f.path for f in index.left_out)):
                return index
        return _build(list_folder(base, classes), file, stored, processes, progress)

    @classmethod
    def from_list(
        cls,
        file: PathLike,
        root: PathLike | None = None,
        cache: bool | PathLike = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes the images that a text file names: a path and optionally a label per line.

        A tab parts path and label. Without a tab the whole line is the path if it is an existing file
        or ends like an image; else the last word is the label. Labels are numbers or, if any is not,
        words that are numbered in sorted order. Blank lines and lines starting with # are skipped.

        Args:
            file: The list.
            root: Folder that relative paths start from (default: the list's); absolute paths must lie
                below it.
            cache: See `from_folder`; all files are compared, only changed ones are opened again.
            processes: See `dali_views.scan.scan`.
            progress: Shows a bar on a terminal.

        Raises:
            FileNotFoundError: There is no such list or root.
            ValueError: It names no usable image, or a label below -1.
        """
        listing = list_file(file, root)
        key = cache_file(cache, listing.root, ["list", os.path.abspath(os.fspath(file))])
        return _build(listing, key, _stored(key), processes, progress)

    @classmethod
    def from_coco(
        cls,
        images: PathLike,
        instances: PathLike | None = None,
        cache: bool | PathLike = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes COCO images, with the boxes of an instances file as ground truth.

        The label of an image is the class of its largest box (in pixels; the first of equals), -1
        without boxes. Category ids become 0, 1, ... in their order. Crowd boxes are left out, boxes are
        clipped to the image.

        Args:
            images: Folder of the images.
            instances: COCO instances JSON; without it every image in the folder is taken, unlabelled.
            cache: See `from_list`.
            processes: See `dali_views.scan.scan`.
            progress: Shows a bar on a terminal.

        Raises:
            FileNotFoundError: There is no such folder or file.
            ValueError: The file is not COCO's, or no image is usable.
        """
        if instances is None:
            listing = list_folder(images)
            listing.labels, listing.classes = [-1] * len(listing.names), []
            listing.folders = {}
            key = cache_file(cache, listing.root, ["coco", None])
            return _build(listing, key, _stored(key), processes, progress)
        listing, truth = list_coco(images, instances)
        key = cache_file(cache, listing.root, ["coco", os.path.abspath(os.fspath(instances))])
        index = _build(listing, key, _stored(key), processes, progress)
        place = {name: row for row, name in enumerate(index._names())}
        rows = np.array([place.get(name, -1) for name in truth.names], np.int64)
        return index._attach(rows[rows >= 0], truth.boxes[rows >= 0], truth.labels[rows >= 0])

    @classmethod
    def from_arrays(
        cls, images: NDArray[np.uint8], labels: ArrayLike | None = None, classes: Sequence[str] | None = None
    ) -> SampleIndex:
        """Indexes pixels in memory (CIFAR); they are neither copied nor encoded.

        Args:
            images: (N, H, W, 3) uint8 RGB.
            labels: (N,) whole numbers, -1 unknown.
            classes: Their names; by default their numbers.

        Raises:
            TypeError: The images are not a uint8 array, or the labels not whole numbers.
            ValueError: A shape does not fit, or a label has no class.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            kind = getattr(images, "dtype", type(images).__name__)
            raise TypeError(f"images must be a NumPy array of uint8, not {kind}; convert it first.")
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ValueError(f"images must have the shape (N, H, W, 3), not {images.shape}; transpose them.")
        count = len(images)
        given = np.full(count, -1, np.int32) if labels is None else np.asarray(labels)
        if given.dtype.kind not in "iu":
            raise TypeError(f"labels must be whole numbers, not {given.dtype}; convert them first.")
        if given.shape != (count,):
            raise ValueError(f"labels must have the shape ({count},) of the images, not {given.shape}.")
        top = int(given.max()) + 1
        names = [str(i) for i in range(top)] if classes is None else list(classes)
        if given.min() < -1 or top > len(names):
            raise ValueError(
                f"labels must lie between -1 (unknown) and {len(names) - 1}; mend them or classes."
            )
        sizes = np.tile(np.array(images.shape[1:3], np.int32), (count, 1))
        return cls("", None, sizes, given.astype(np.int32), names, images)

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
            TypeError: This is an index of arrays.
        """
        if self.paths is None:
            raise TypeError("An index of arrays has no paths; read index.arrays instead.")
        root = np.frombuffer(os.fsencode(os.path.join(self.root, "")), np.uint8)
        out = np.empty((len(rows), len(root) + self.paths.shape[1]), np.uint8)
        out[:, : len(root)] = root
        out[:, len(root) :] = self.paths[rows]
        return out

    def truth(self, i: int) -> NDArray[np.float32]:
        """(n, 4) ground-truth boxes of row `i`; n may be 0."""
        i = range(len(self))[i]
        return self.boxes[self.box_start[i] : self.box_start[i + 1]]

    def summary(self) -> str:
        """A few lines for people: how many images, which sizes, what was left out and why."""
        middle, largest = (
            np.median(self.sizes, axis=0),
            self.sizes[np.argmax(np.prod(self.sizes, 1, np.int64))],
        )
        lines = [
            f"{len(self)} images in {len(self.classes)} classes ({self.root or 'arrays'}), "
            f"{int((self.labels < 0).sum())} without a label",
            f"height x width: median {middle[0]:.0f} x {middle[1]:.0f}, largest {largest[0]} x {largest[1]}",
        ]
        if len(self.boxes):
            lines.append(
                f"{len(self.boxes)} ground-truth boxes on {int((np.diff(self.box_start) > 0).sum())} images"
            )
        if self.left_out:
            lines.append(f"{len(self.left_out)} files left out:")
            lines += [f"  {path}: {reason}" for path, reason in self.left_out[:20]]
        if len(self.left_out) > 20:
            lines.append(f"  and {len(self.left_out) - 20} more")
        return "\n".join(lines)

    # -- making others of it ----------------------------------------------------------------------

    def subset(self, rows: ArrayLike) -> SampleIndex:
        """The index of some rows, in the order given (or of a mask of N truth values); classes stay."""
        picks = np.asarray(rows)
        chosen = np.arange(len(self))[picks] if picks.size else picks
        if chosen.ndim != 1 or not len(chosen):
            raise ValueError("A subset needs a list of at least one row, or a mask with one True.")
        counts = np.diff(self.box_start)[chosen]
        ends = np.cumsum(counts)
        picked = np.repeat(self.box_start[chosen] - ends + counts, counts) + np.arange(ends[-1])
        paths = None if self.paths is None else _trim(self.paths[chosen])
        return replace(
            self,
            paths=paths,
            sizes=self.sizes[chosen],
            labels=self.labels[chosen],
            arrays=None if self.arrays is None else self.arrays[chosen],
            box_start=np.concatenate([[0], ends]).astype(np.int64),
            boxes=self.boxes[picked],
            box_labels=self.box_labels[picked],
            fingerprint="",
        )

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
        if isinstance(boxes, Mapping):
            found = {name: np.asarray(value, np.float64).reshape(-1, 4) for name, value in boxes.items()}
        else:
            found = {name: np.asarray(value, np.float64) for name, value in read_boxes(boxes).items()}
        place = find_rows(self._names(), found)
        if not place:
            raise ValueError(f"None of the {len(found)} names with boxes is in the index; check the names.")
        rows = np.concatenate([np.full(len(found[name]), row, np.int64) for name, row in place.items()])
        values = np.concatenate([found[name] for name in place])
        if not isinstance(boxes, Mapping):
            values = np.clip(values / np.tile(self.sizes[rows], 2), 0, 1)
        good = (values >= 0).all(1) & (values <= 1).all(1) & (values[:, 2:] > values[:, :2]).all(1)
        if not good.all():
            bad = int(np.flatnonzero(~good)[0])
            raise ValueError(
                f"The box {values[bad].tolist()} of {self.path(int(rows[bad]))!r} is no rectangle "
                "(y0, x0, y1, x1) in [0, 1]; mend it."
            )
        return self._attach(rows, values.astype(np.float32), self.labels[rows])

    def _attach(
        self, rows: NDArray[np.int64], boxes: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> SampleIndex:
        order = np.argsort(rows, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(self)))]).astype(np.int64)
        return replace(self, box_start=start, boxes=boxes[order], box_labels=labels[order])

    # -- storing it -------------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Writes the index to one file (NumPy's .npz, uncompressed), in one step."""
        write_npz(Path(path), *self._facts())

    @classmethod
    def load(cls, path: PathLike) -> SampleIndex:
        """Reads what `save` wrote; the images are not looked at.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or of another format version.
        """
        return cls._from_facts(path, *read_npz(Path(path)))

    def _facts(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        meta = {
            "root": self.root,
            "classes": self.classes,
            "left_out": self.left_out,
            "fingerprint": self.fingerprint,
        }
        return meta, {name: getattr(self, name) for name in _STORED if getattr(self, name) is not None}

    @classmethod
    def _from_facts(
        cls, path: PathLike, meta: dict[str, Any], arrays: dict[str, NDArray[Any]]
    ) -> SampleIndex:
        try:
            left_out = [LeftOut(*pair) for pair in meta.pop("left_out")]
            known = {name: arrays[name] for name in _STORED if name in arrays}
            return cls(**{"paths": None, **meta, **known}, left_out=left_out)
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is damaged or no index ({error}); build it anew."
            ) from error

    def _names(self) -> list[bytes]:
        """Relative paths as bytes."""
        if self.paths is None:
            return []
        width = self.paths.shape[1]
        names: list[bytes] = np.ascontiguousarray(self.paths).view(f"S{width}").ravel().tolist()
        return names

    def _digest(self) -> str:
        content = self.arrays if self.paths is None else _trim(self.paths)
        digest = hashlib.sha256(repr(None if content is None else content.shape).encode())
        for array in (content, self.sizes):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def _trim(paths: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cuts the padding that no row needs."""
    width = int(np.flatnonzero(paths.any(axis=0))[-1]) + 1
    return paths if width == paths.shape[1] else np.ascontiguousarray(paths[:, :width])


_Stored: TypeAlias = "tuple[SampleIndex, Stamp]"


def _stored(file: Path | None) -> _Stored | None:
    """What the cache has, if it has anything readable."""
    if file is None or not file.is_file():
        return None
    try:
        meta, arrays = read_npz(file)
        stamp = Stamp.from_arrays(arrays)
        return SampleIndex._from_facts(file, meta, arrays), stamp
    except (ValueError, KeyError, FileNotFoundError):
        return None


def _build(
    listing: Listing, file: Path | None, stored: _Stored | None, processes: int | None, progress: bool
) -> SampleIndex:
    """Scans the listed files, sorts good from bad and stores the result."""
    known: dict[bytes, Record] = {}
    if stored is not None:
        old, stamp = stored
        rows = zip(old._names(), old.sizes.tolist(), stamp.files.tolist(), strict=True)
        known = {name: (*size, *seen, "") for name, size, seen in rows}
        lost = zip(old.left_out, stamp.left.tolist(), strict=False)
        known |= {os.fsencode(f.path): (0, 0, *seen, f.reason) for f, seen in lost}
    records = scan(os.fsencode(listing.root), listing.names, known, processes=processes, progress=progress)
    good = [i for i, record in enumerate(records) if not record[4]]
    bad = [i for i, record in enumerate(records) if record[4]]
    left_out = [LeftOut(os.fsdecode(listing.names[i]), records[i][4]) for i in bad] + listing.left_out
    if not good:
        first = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        raise ValueError(f"None of the {len(left_out)} files below {listing.root!r} is usable ({first}).")
    paths = np.array([listing.names[i] for i in good], dtype=np.bytes_)
    table = np.array([records[i][:4] for i in good], np.int64)
    index = SampleIndex(
        root=listing.root,
        paths=paths.view(np.uint8).reshape(len(good), -1),
        sizes=table[:, :2].astype(np.int32),
        labels=np.array([listing.labels[i] for i in good], np.int32),
        classes=listing.classes,
        left_out=left_out,
    )
    if file is not None:
        # What the listing refused has no stamp: its reason does not lie in the file.
        left = [records[i][2:4] for i in bad]
        stamp = Stamp(table[:, 2:], np.array(left, np.int64).reshape(-1, 2), listing.folders)
        meta, arrays = index._facts()
        try:
            write_npz(file, meta, {**arrays, **stamp.arrays()})
        except OSError as error:
            warnings.warn(f"The index is not kept: {str(file)!r} cannot be written ({error}).", stacklevel=3)
    return index
