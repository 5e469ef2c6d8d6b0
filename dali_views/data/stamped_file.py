"""Files that must still be what they were when they were indexed."""

from __future__ import annotations

import os
import stat

__all__ = ["open_stamped"]


def open_stamped(path: str, stamp: tuple[int, int] | None = None) -> int:
    """Opens a regular file; its descriptor, which is the caller's to close.

    Args:
        stamp: The bytes and mtime_ns that it must have, if any.

    Raises:
        OSError: There is none, or it has changed.
    """
    # A pipe of that name would keep an open that blocks waiting.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(handle)
    told = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    if stamp is not None and (told or (status.st_size, status.st_mtime_ns) != stamp):
        told = (
            f"{os.path.basename(path)} has changed since it was indexed (its size or its time); "
            "index it again, or bring the old file back with its time"
        )
    if told:
        os.close(handle)
        raise OSError(told)
    return handle
