"""Files that are whole or not there: writing in one step, and .npz archives that are refused when damaged."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

PathLike: TypeAlias = "str | os.PathLike[str]"

# All that NumPy and zipfile were seen to raise when bytes of a file were flipped or cut off.
_DAMAGE = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,
    BadZipFile,
    zlib.error,
)


@contextmanager
def atomic_write(path: PathLike, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """Opens a draft beside `path`, which takes its place when the block has ended without an error.

    Killed at any moment, the old file stays whole. The draft is `.NAME.tmp`; what a killed writer left of
    it, the next one overwrites. So the rule is: one writer per file.

    Args:
        path: The file; folders above it are made.
        shared: For files that several processes may write at once, as all ranks do with the cache of an
            index: every write has a draft of its own name, which a killed writer leaves behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex}" if shared else ""
    draft = target.with_name(f".{target.name}{own}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    # The rename itself must survive a power cut too.
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def open_npz(path: PathLike, what: str) -> Iterator[dict[str, NDArray[Any]]]:
    """Gives the arrays of an .npz file to a block that makes `what` of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or the block could not make anything of its arrays.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {what} at {path}; save one there first or mend the path.")
    with open(path, "rb") as raw:  # outside the try: a file one may not read is not a damaged file
        try:
            with np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            yield arrays
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is not a readable {what} but damaged or something else ({error}); "
                "delete it or restore it from a copy."
            ) from error
