"""The folder of a packed copy: new or begun with the same settings, and of one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...data.index import SampleIndex
from ...data.remote import as_url, is_remote
from ...system.files import PathLike, atomic_write

SETTINGS = "pack.json"


def outside(source: SampleIndex, destination: PathLike) -> Path:
    """The destination without links in its path.

    Raises:
        ValueError: It lies among the files of the source, or in a store.
    """
    if is_remote(destination):
        raise ValueError(
            f"A copy is written to a local folder, not to {as_url(destination)}; name one, then upload it."
        )
    folder = Path(os.path.realpath(destination))
    if source.form == "names" and folder.is_relative_to(os.path.realpath(source.root)):
        raise ValueError(f"The copy {str(folder)!r} would lie in its source; choose a folder outside.")
    return folder


@contextmanager
def claimed(folder: Path, settings: Mapping[str, object]) -> Iterator[None]:
    """Holds the folder for this process, once it is known to be new or begun with the same settings.

    Raises:
        ValueError: It was begun with others, holds other things, or another process packs to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is packing to {str(folder)!r}; let it end first.") from None
        except OSError:
            pass  # a network file system without locks
        file = folder / SETTINGS
        if file.is_file():
            try:
                before = dict(json.loads(file.read_bytes()))
            except (TypeError, ValueError):
                raise ValueError(f"{str(file)!r} is damaged; choose a new folder or delete it.") from None
            keys = dict.fromkeys([*settings, *before])
            differ = [f"{key} {before.get(key)}" for key in keys if before.get(key) != settings.get(key)]
            if differ:
                told = ", ".join(differ)
                raise ValueError(f"{str(folder)!r} was packed with {told}; choose a new folder or delete it.")
        elif set(os.listdir(folder)) - {f".{SETTINGS}.tmp"}:
            raise ValueError(f"{str(folder)!r} holds other things than a packed copy; choose a new folder.")
        else:
            with atomic_write(file) as draft:
                draft.write(json.dumps(settings).encode())
        yield
    finally:
        os.close(handle)
