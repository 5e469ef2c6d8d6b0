"""One writer for a folder: the lock that a training holds as long as it lives."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import ranks
from .interrupt import launch

__all__ = ["LOCK", "held"]

LOCK = "run.lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_PATIENCE = 120.0  # seconds; torchrun may start ranks before those on another machine have ended


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other launches out of `folder` inside the block; it is made. A collective call: rank 0 holds it.

    The lock is a POSIX record lock on folder/run.lock. The system frees it when the process ends, however
    that ends, and although a child of it may live on. NFS and Lustre pass it on to other machines. Where a
    file system has no locks, a warning says so. The file stays: a second process could lock one that is
    being removed. No process may open the file elsewhere while it holds it: closing it would free the lock.

    Raises:
        BlockingIOError: on all ranks; another launch holds it.
        OSError: on all ranks; rank 0 cannot make the file.
    """
    handle, refusal = None, None
    if ranks.is_main():
        try:
            handle = _taken(folder)
        except OSError as error:
            refusal = error
    try:
        if ranks.any_rank(refusal is not None):
            raise refusal or BlockingIOError(f"rank 0 could not take the lock of {folder}; see its message")
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _taken(folder: Path) -> int:
    """The descriptor that holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + _PATIENCE
        while not _locked(handle, folder):
            who, _, theirs = os.pread(handle, 1000, 0).decode(errors="replace").partition("\n")
            if not theirs == launch() != "" or time.monotonic() > end:
                raise BlockingIOError(
                    f"{folder} is in use by {who or 'another process'}; wait for its end, stop it, or choose "
                    "another folder"
                )
            time.sleep(0.5)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n{launch()}".encode(), 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _locked(handle: int, folder: Path) -> bool:
    """Whether this process has the lock now; True with a warning if there are no locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        told = f"{folder} cannot be locked ({error.strerror}); let only one training write there at a time"
        warnings.warn(told, stacklevel=4)
    return True
