"""Checkpoints that survive kill -9: written whole or not at all, with the one before kept as a spare."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dali_views.system.files import atomic_write, remove_drafts
from dali_views.system.stored import check, entries, repeats, text, whole

__all__ = ["LAST", "PREVIOUS", "load", "load_run", "read", "save"]

LAST = "last.pt"
PREVIOUS = "previous.pt"


def save(folder: str | Path, state: Mapping[str, Any]) -> Path:
    """Write `state` to folder/last.pt; the older checkpoint there becomes previous.pt.

    At every moment one of the two files is whole. One process writes: the main one, which holds the `lock` of
    the folder. The file holds tensors, dicts, lists, tuples, text and numbers; NumPy arrays are stored as
    tensors.

    Raises:
        TypeError: `state` holds something else; the message says where.
        OSError: the disk is full or fails; both files are as they were.
    """
    plain, last = _plain(state, ""), Path(folder) / LAST
    spare = last.with_name(f".{PREVIOUS}.tmp")
    try:
        remove_drafts(last)  # of a killed process; each is as large as a checkpoint
        with atomic_write(last) as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())  # the disk may be full, and the spare is replaced next
            spare.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError, zipfile.BadZipFile):
                zipfile.ZipFile(last).close()  # a truncated last must not push out a good previous
                try:
                    os.link(last, spare)
                except OSError:  # no hard links on this file system
                    shutil.copyfile(last, spare)
                os.replace(spare, last.with_name(PREVIOUS))
                spare.unlink(missing_ok=True)  # it stays where both are the same file already
    except (OSError, RuntimeError) as error:
        spare.unlink(missing_ok=True)
        # PyTorch raises an error of its own about an archive that it could not end.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        why = f"{last} cannot be written ({cause.strerror}); an older checkpoint there is unchanged"
        raise OSError(cause.errno, why) from error
    return last


def load(folder: str | Path) -> dict[str, Any]:
    """Read the newest sound checkpoint of a folder into main memory; warns if that is the previous one.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: it holds some, but none can be read.
    """
    present = [path for name in (LAST, PREVIOUS) if (path := Path(folder) / name).is_file()]
    if not present:
        raise FileNotFoundError(f"there is no checkpoint in {folder}; expected {LAST}")
    reasons = []
    for path in present:
        try:
            state = read(path)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
        except ValueError as error:
            reasons.append(f"{path.name}: {error}")
            continue
        if path.name != LAST:
            why = reasons[0] if reasons else f"{LAST} is missing"
            warnings.warn(f"resuming from {path}: {why}", stacklevel=2)
        return state
    raise ValueError(f"no checkpoint in {folder} can be read; remove them to restart ({'; '.join(reasons)})")


def load_run(folder: str | Path) -> dict[str, Any]:
    """`load` of a training run's folder (linear probes and fine-tuning have folders below it)."""
    saved, part = load(folder), entries({})
    form = entries({"config": text, "step": whole(0), "method": part, "guide": part}, {"launch": text})
    check(saved, form, f"the checkpoint in {folder}", "it is not of a training run; name another folder")
    return saved


def read(path: Path, legacy: bool = False) -> Any:
    """Tensors, dicts, lists, tuples, text and numbers of a file that torch.save wrote.

    Nothing in it is executed. Checksums are verified first (0.45 s per GB): PyTorch does not look at them.

    Args:
        legacy: also read what PyTorch wrote before version 1.6, without checksums.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds something else.
    """
    with open(path, "rb") as file:  # outside the try: a file that cannot be opened is not a damaged one
        size = os.fstat(file.fileno()).st_size
    try:
        if not legacy or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if (
                    any(member.compress_type for member in members)
                    or sum(m.file_size for m in members) > size
                ):
                    raise ValueError("a member is compressed or claims more bytes than the file has")
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {broken} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own words advise to execute what is in the file
        raise ValueError("it is damaged or holds more than tensors, lists, dicts, text and numbers") from None
    except Exception as error:  # PyTorch raises errors of any kind about what it cannot make sense of
        raise ValueError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
    seen: set[int] = set()  # a few lists of each other may hold more values than can be counted
    waiting: list[Any] = [state]
    for value in waiting:
        if id(value) not in seen and isinstance(value, (dict, list, tuple)):
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor) and repeats(value):
            raise ValueError("a tensor claims more numbers than the file has")
    return state


def _plain(value: Any, place: str) -> Any:
    """`value` with NumPy and mapping types replaced by what weights_only loading accepts."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if repeats(value) else value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, order="C", dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, np.generic):
        return _plain(value.item(), place)
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"checkpoint key {key!r} in {place or 'state'} should be text or an integer")
        return {key: _plain(item, f"{place}.{key}" if place else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(
        f"checkpoint entry {place or 'state'} is a {type(value).__name__}, which cannot be stored; "
        "give tensors, arrays, text, numbers, or lists and dicts of them"
    )
