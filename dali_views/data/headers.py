"""Header scan: many files, objects or images of a source, looked at by threads or processes."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from ..system.files import open_regular, pack_names
from .formats import MAX_PIXELS, Refused, size_of_image
from .source import GONE, Source, read_each, reason

Record: TypeAlias = tuple[int, int, int, int, str]
"""(height, width, bytes, mtime_ns, reason); reason is "" for a good file, bytes -1 where there is none."""

_THREADS, _IMAGES = 8, 64  # that read a source of one's own, and images that one requests at a time
_SMALL = 1 << 30  # bytes of files that threads scan before processes would have started
_SHARE = 64  # of a thread's chunks are a process's

J = TypeVar("J")
R = TypeVar("R")


def inspect_file(job: tuple[bytes, Record | None]) -> Record:
    """The record of a file (path, record of an earlier scan), which stays if size and mtime are the same."""
    (path, known), stamp = job, (-1, -1)
    try:
        status = os.stat(path)
        stamp = status.st_size, status.st_mtime_ns
        if known is not None and known[2:4] == stamp:
            return known
        handle, status = open_regular(path)
        with open(handle, "rb") as file:
            found = inspect(file, status.st_size)
    except OSError as error:
        found = 0, 0, reason(error)
    return *found[:2], *stamp, found[2]


def inspect(file: IO[bytes], size: int) -> tuple[int, int, str]:
    """(height, width, reason) of an image of `size` bytes in a seekable file; `GONE` is raised."""
    try:
        return *size_of_image(file, size), ""
    except Refused as refusal:
        return 0, 0, str(refusal)
    except GONE:
        raise
    except Exception as error:  # the system's, or whatever Pillow stumbles over in a damaged file
        if isinstance(error, OSError) and error.strerror:
            return 0, 0, reason(error)
        return 0, 0, f"truncated or damaged ({' '.join(str(error).split())})"


def look_through(
    look: Callable[[J], R],
    jobs: Sequence[J],
    size: int,
    processes: int | None,
    kind: str,
    progress: bool,
    threads: int = 4,
    chunk: int = 1,
) -> list[R]:
    """What `look` (of the top level of a module) returns for each job, in their order, several at a time.

    The bar counts jobs as `kind`; the files have `size` bytes in all; a thread does `chunk` jobs in turn.
    """
    if processes is None:
        processes = 0 if size < _SMALL else cores()
    if processes:
        chunk = max(1, min(_SHARE * chunk, -(-len(jobs) // processes)))
    work = partial(in_process if processes else _in_thread, look)
    parts = [jobs[start : start + chunk] for start in range(0, len(jobs), chunk)]
    found: list[R] = []
    with ThreadPoolExecutor(processes or threads) as pool, scan_bar(len(jobs), f" {kind}", progress) as bar:
        for part in pool.map(work, parts):
            found += part
            bar.update(len(part))
    return found


def _in_thread(look: Callable[[J], R], jobs: Sequence[J]) -> list[R]:
    return [look(job) for job in jobs]


def in_process(look: Callable[[J], R], jobs: Sequence[J]) -> list[R]:
    """What `look` returns for each job, in a process of its own; a RuntimeError if this dies."""
    # multiprocessing's fork is not safe after threads or CUDA have started, its spawn runs the user's script
    # again, and joblib imports modules from the current folder, which may be the data set.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve()"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, input=pickle.dumps((look, jobs)), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(
            f"A scan process died ({done.returncode}) at work on {f'{jobs[0]!r}':.200} or one of "
            f"{len(jobs) - 1} more; pass processes=0 to scan in this process."
        )
    found: list[R] = pickle.loads(done.stdout)
    return found


def _serve() -> None:
    answer, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no answer
    warnings.simplefilter("ignore")
    answer.write(pickle.dumps(_in_thread(*pickle.load(sys.stdin.buffer))))
    answer.flush()


def size_of(paths: Sequence[str]) -> int:
    """Bytes of those files that are there."""
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def scan_bar(total: int, unit: str, progress: bool) -> Iterator[Any]:
    """tqdm's bar; inside, Pillow does not warn about odd EXIF or large images: `inspect` judges these."""
    with (
        tqdm(total=total, desc="scan", unit=unit, delay=1, disable=None if progress else True) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield bar


def require_some(good: Sequence[int], left_out: Sequence[tuple[str, str]], what: str) -> None:
    """A ValueError with the first reasons if nothing is `good`."""
    if not good:
        first = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        raise ValueError(f"None of the {len(left_out)} {what} is usable ({first}); check the path.")


def scan_source(
    source: Source, sizes: ArrayLike | None, names: Sequence[str] | None, progress: bool
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int32], list[tuple[str, str]]]:
    """The usable images of a source of one's own: rows (n,), names (n, L), sizes (n, 2); and the others."""
    count = len(source)
    named = [f"row {row}" for row in range(count)] if names is None else list(names)
    if len(named) != count or len(set(named)) != count or any(not one or "\0" in one for one in named):
        raise ValueError(f"names must be {count} different texts without NULs, one for each image.")
    packed = pack_names([os.fsencode(name) for name in named])
    if sizes is not None and count:
        return np.arange(count), packed, _checked_sizes(sizes, count), []

    def look(start: int) -> list[tuple[int, int, str]]:
        found = read_each(source, np.arange(start, min(start + _IMAGES, count)))
        return [(0, 0, o) if isinstance(o, str) else inspect(io.BytesIO(o.data), len(o)) for o in found]

    blocks = look_through(look, range(0, count, _IMAGES), 0, 0, f"x {_IMAGES} images", progress, _THREADS)
    found = [one for block in blocks for one in block]
    left_out = [(name, refused) for name, (_, _, refused) in zip(named, found, strict=True) if refused]
    good = [i for i in range(count) if not found[i][2]]
    require_some(good, left_out, "images of the source")
    rows = np.array(good, np.int64)
    return rows, packed[rows], np.array([found[i][:2] for i in good], np.int32), left_out


def _checked_sizes(sizes: ArrayLike, count: int) -> NDArray[np.int32]:
    given = np.asarray(sizes)
    if given.dtype.kind not in "iu":
        raise TypeError(f"sizes must be whole numbers, not {given.dtype}; convert them first.")
    # As floats, for the product of large integers may overflow.
    if given.shape != (count, 2) or given.min() < 1 or np.prod(given, 1, np.float64).max() > MAX_PIXELS:
        raise ValueError(f"sizes must be ({count}, 2) heights and widths of 1 to {MAX_PIXELS} pixels in all.")
    return given.astype(np.int32)
