"""Files that are whole or not there: writing in one step."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

PathLike: TypeAlias = "str | os.PathLike[str]"


def cache_folder() -> Path:
    """Where scans are kept: $DALI_VIEWS_CACHE, else dali_views in $XDG_CACHE_HOME, else in ~/.cache."""
    own, shared = os.environ.get("DALI_VIEWS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dali_views"


@contextmanager
def atomic_write(path: PathLike, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """Opens a draft beside `path` that takes its place when the block has ended without an error.

    Killed at any moment, the old file stays whole. The draft is `.NAME.tmp`, so a file has one writer, who
    overwrites what a killed one left. With `shared` there may be several: each draft has a name of its own.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}{'.' + uuid.uuid4().hex if shared else ''}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    # The rename must survive a power cut, too.
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
