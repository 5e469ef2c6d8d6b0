"""The constructors of SampleIndex: each kind of data set as an index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..system.files import PathLike
from .build import scan_coco, scan_folder, scan_list, scan_shards
from .extras import needs
from .index_file import pack_names
from .listing import check_labels
from .lmdb_scan import scan_lmdb
from .source import Source, picked
from .source_scan import scan_source

if TYPE_CHECKING:
    from .index import SampleIndex


class Constructors:
    """What `SampleIndex.from_...` does; scanning itself is in `index_build`.

    Folders, lists, COCO sets and shards may lie in an object store: then they are named by URLs, as
    s3://bucket/train or gs://bucket/train-{000..146}.tar. Credentials, region and endpoint come from the
    environment, as they do for the store's own tools. A store is listed anew each time, and only what has
    changed is looked at again. One that is gone, denies, or does not answer for $DALI_VIEWS_RETRY_SECONDS
    (default 60) raises a SourceGoneError.
    """

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
            cache: Keep the scan under $DALI_VIEWS_CACHE, $XDG_CACHE_HOME/dali_views or
                ~/.cache/dali_views (True), in another folder (a path), or nowhere (False).
            processes: See `dali_views.data.headers.scan`.
            progress: Shows a bar on a terminal.
            classes: Only these class folders, numbered in the order given (ImageNet-100; or the
                classes of the training set, so that another split has the same numbers).

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: It holds no usable image, or not the classes asked for.
        """
        return _index_of(cls, scan_folder(root, cache, processes, progress, classes))

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
            root: Folder that relative paths start from (default: the list's); files that do not lie below
                it are left out.
            cache, processes, progress: See `from_folder`; only changed files are opened again.

        Raises:
            FileNotFoundError: There is no such list or root.
            ValueError: It names no usable image, or a label below -1.
        """
        return _index_of(cls, scan_list(file, root, cache, processes, progress))

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
            instances: COCO instances JSON; without it every image in the folder is taken, unlabelled. Files
                that do not lie below the folder are left out.
            cache, processes, progress: See `from_list`.

        Raises:
            FileNotFoundError: There is no such folder or file.
            ValueError: The file is not COCO's, or no image is usable.
        """
        scanned, boxes = scan_coco(images, instances, cache, processes, progress)
        return _index_of(cls, scanned).with_row_boxes(boxes)

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
        given, names = check_labels(labels, count, classes)
        sizes = np.full((count, 2), images.shape[1:3], np.int32)
        return _index_of(
            cls,
            {"root": "", "paths": None, "sizes": sizes, "labels": given, "classes": names, "arrays": images},
        )

    @classmethod
    def from_shards(
        cls,
        pattern: PathLike | Sequence[PathLike],
        cache: bool | PathLike = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes the images in tar shards, as WebDataset writes them; the order is one over all of them.

        Every shard is looked through once, and its members are then read where they lie. They take the label
        that a member of the same key has: `.cls`, a number or a word, else `.json` with a whole number as
        "label", "cls" or "class_id". A key is the name up to the first dot after its folder. Labels are
        numbered as in `from_list`. Other members are passed over. Left out are links, devices, sparse files,
        names that lead out of the shard, compressed shards, and what a damaged shard has lost.

        Args:
            pattern: A shard; a glob; braces ("train-{000000..000146}.tar", "{a,b}.tar"); a text file with one
                of these per line, relative to it; or a list of all these. Rows are in the order of the shards
                and, in a shard, of its members.
            cache, progress: See `from_folder`; if one shard has changed, all are looked through again.
            processes: Worker processes; 0 means threads in this process. By default threads below 1 GiB and
                one process per core from there on.

        Raises:
            FileNotFoundError: There is no such shard.
            IsADirectoryError: It is a folder, which is not looked through for shards.
            ValueError: They hold no usable image, or a label below -1.
        """
        return _index_of(cls, scan_shards(pattern, cache, processes, progress))

    @classmethod
    def from_table(
        cls,
        pattern: PathLike | Sequence[PathLike],
        image: str | None = None,
        label: str | None = None,
        cache: bool | PathLike = True,
        processes: int | None = None,
        progress: bool = True,
    ) -> SampleIndex:
        """Indexes the images in Parquet and Arrow tables, as Hugging Face's datasets have them.

        Images of uncompressed Arrow files are read where they lie, as those of shards are. An image in a
        Parquet or a compressed file is read with its whole group, which a warning tells where it is slow.
        A row is named table/path if the tables give paths, one to each image, else table/row 17. Left out
        are images without bytes, and what a damaged table has lost. Needs pyarrow (the extra `tables`).

        Args:
            pattern: As in `from_shards` (.parquet, .pq, .arrow, .feather); or a folder of such files, which
                may be one that `save_to_disk` wrote. All tables must have the columns of the first.
            image: Column with the encoded images: binary, or a struct with the binary field `bytes`.
                Without it, the only column that is.
            label: Column with whole numbers, -1 or null unknown, or words, numbered in sorted order. Without
                it, the first there is of label, labels, cls, class and fine_label; if there is none, all
                labels are -1. Names that a table gives to its numbers (ClassLabel) become the classes.
            cache, processes, progress: See `from_shards`.

        Raises:
            FileNotFoundError: There is no such table.
            ValueError: No column fits, or several do; the tables hold no usable image, or a label below -1;
                pyarrow is not installed.
        """
        with needs("pyarrow"):
            from .table_scan import scan_tables
        return _index_of(cls, scan_tables(pattern, image, label, cache, processes, progress))

    @classmethod
    def from_lmdb(cls, path: PathLike, cache: bool | PathLike = True, progress: bool = True) -> SampleIndex:
        """Indexes the images in an LMDB environment whose values are encoded images, as LSUN's are.

        The names are the keys, in their order; of a key that can be no name, "hex:" and its bytes in
        hexadecimal figures. If each has a folder, as n01440764/x.JPEG, the first folder is the class, and
        classes are numbered in sorted order; else all labels are -1. Keys like __len__ are passed over. Left
        out are values that are no encoded images (pickles, Caffe's Datum, pixels), and what a damaged
        environment has lost. While the index is in use, nobody may write to the environment.

        Args:
            path: Folder with a data.mdb, or file of an environment without one.
            cache, progress: See `from_shards`.

        Raises:
            FileNotFoundError: There is no such environment.
            ValueError: It is no LMDB environment, lies in a store, or holds no usable image.
        """
        return _index_of(cls, scan_lmdb(path, cache, progress))

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
            labels, classes: See `from_arrays`.
            sizes: (N, 2) stored height and width in pixels of each image. Without them every image is read
                once, and what cannot be used is left out.
            names: A name of each, for messages, lists of bad images and the fingerprint; by default "row 7".
            progress: Shows a bar on a terminal.

        Raises:
            TypeError: Labels or sizes are not whole numbers.
            ValueError: A number or shape does not fit, two names are equal, or no image is usable.
            SourceGoneError, ConnectionError: The whole source cannot be read.
        """
        given, kinds = check_labels(labels, len(source), classes)
        found = scan_source(source, sizes, names, progress)
        return _index_of(
            cls,
            {
                "root": "",
                "paths": pack_names([os.fsencode(name) for name in found.names]),
                "sizes": found.sizes,
                "labels": given[found.rows],
                "classes": kinds,
                "left_out": found.left_out,
                "source": picked(source, found.rows),
            },
        )


def _index_of(make: Any, found: Any) -> SampleIndex:
    """An index of the fields that it shares with a scan, or that are given by name."""
    told = found if isinstance(found, dict) else {f.name: getattr(found, f.name) for f in fields(found)}
    index: SampleIndex = make(**{f.name: told[f.name] for f in fields(make) if f.name in told})
    return index
