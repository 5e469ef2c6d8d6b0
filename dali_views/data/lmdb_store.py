"""Which images an LMDB environment holds: where each lies in its file, how large it is, of which class.

LMDB maps the file and trusts it: damage may kill the process. So a process of its own scans, and images are
then read by their offsets in the file, as those of tar shards are.
"""

from __future__ import annotations

import os
import re
from itertools import islice

import numpy as np

from ..system.files import PathLike, pack_names
from .headers import in_process, inspect, scan_bar
from .remote import as_url, is_remote
from .scan import Cache, LeftOut, Scan, ScanCache, may_be_name, stamp_of
from .source import needs, window

_META_KEY = re.compile(rb"__\w+__")


def names_lmdb(path: PathLike) -> bool:
    """Whether the name is one of an environment, rather than of images."""
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, "data.mdb"))
    return os.path.splitext(path)[1] in (".lmdb", ".mdb")


def scan_lmdb(path: PathLike, cache: Cache, progress: bool) -> Scan:
    """The images of an environment; if it has not changed, it is not opened. See `SampleIndex.from_lmdb`."""
    if is_remote(path):
        raise ValueError(f"LMDB is read from local files alone; copy {as_url(path)} or pack it as shards.")
    file = os.path.abspath(os.fspath(path))
    file = os.path.join(file, "data.mdb") if os.path.isdir(file) else file
    if not os.path.isfile(file):
        raise FileNotFoundError(f"There is no LMDB environment {os.fspath(path)!r}; check the path.")
    place = ScanCache(os.path.dirname(file), ["lmdb", os.path.basename(file)], Scan, {"cache": cache})
    if place.kept is not None and place.kept.holds():
        return place.kept
    with needs("lmdb"):
        import lmdb  # noqa: F401
    try:
        (scanned,) = in_process(_scan, [(file, progress)])
    except RuntimeError:
        scanned = "it is damaged, so that LMDB's library failed"
    if isinstance(scanned, str):
        raise ValueError(f"{file!r} cannot be read: {scanned}.")
    return place.keep(scanned)


def name_of(key: bytes) -> bytes:
    """The key, or for one that cannot be a name "hex:" and its hexadecimal digits; all names differ."""
    return key if may_be_name(key) and not key.startswith(b"hex:") else b"hex:" + key.hex().encode()


def _scan(job: tuple[str, bool]) -> Scan | str:
    """The images in an environment, or why there are none."""
    import lmdb

    file, progress = job
    found: list[tuple[bytes, tuple[int, int, int], tuple[int, int]]] = []
    left_out: list[LeftOut] = []
    count, entries, stamp = 0, -1, stamp_of(file)
    try:
        with (
            open(file, "rb") as plain,
            lmdb.open(file, subdir=False, readonly=True, lock=False, create=False) as environment,
            environment.begin(buffers=True) as transaction,
            scan_bar(transaction.stat()["entries"], " images", progress) as bar,
            open("/proc/self/maps") as maps,
        ):
            entries = bar.total
            path = os.path.realpath(file)
            mapped = next(int(line.split("-")[0], 16) for line in maps if line.endswith(f" {path}\n"))
            if stamp[0] < environment.info()["last_pgno"] * environment.stat()["psize"]:
                return "it is truncated"
            # A damaged tree may lead back to itself, but an entry takes more than 8 bytes.
            for key, value in islice(transaction.cursor(), min(entries, stamp[0] // 8) + 1):
                bar.update()
                count += 1
                if _META_KEY.fullmatch(key):
                    continue
                name, size = name_of(bytes(key)), len(value)
                offset = np.frombuffer(value, np.uint8).ctypes.data - mapped if size else 0
                size = max(0, min(size, stamp[0] - offset))
                image = window(plain, offset, size)
                height, width, refused = inspect(image, size)
                if refused:
                    left_out.append(LeftOut(os.fsdecode(name), refused))
                else:
                    found.append((name, (0, offset, size), (height, width)))
    except lmdb.Error as error:
        if entries < 0:
            return f"no LMDB environment, or a damaged one ({error})"
        count = -1
    if count != entries:
        told = f"damaged; of its {entries} entries {len(found)} are used"
        left_out.append(LeftOut(os.path.basename(file), told))
    if not found:
        first = "; ".join(f"{key}: {refused}" for key, refused in left_out[:3]) or "it is empty"
        return f"it holds no encoded image such as a JPEG, one to a key ({first})"
    names, places, sizes = zip(*found, strict=True)
    folders = [name.partition(b"/")[0] if b"/" in name else b"" for name in names]
    classes = sorted(set(folders)) if all(folders) else []
    number = {kind: i for i, kind in enumerate(classes)}
    return Scan(
        root=os.path.dirname(file),
        paths=pack_names(names),
        sizes=np.array(sizes, np.int32),
        labels=np.array([number.get(folder, -1) for folder in folders], np.int32),
        classes=[os.fsdecode(kind) for kind in classes],
        left_out=left_out,
        holder="ranges",
        files=[os.path.basename(file)],
        file_stamps=np.array([stamp], np.int64),
        places=np.array(places, np.int64),
    )
