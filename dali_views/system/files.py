"""Files that are whole or not there: writing in one step."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

PathLike: TypeAlias = "str | os.PathLike[str]"


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
