"""Checkpoints that survive kill -9: written whole or not at all, with the one before kept as a spare."""

from __future__ import annotations

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

__all__ = ["LAST", "PREVIOUS", "load", "save"]

LAST = "last.pt"
PREVIOUS = "previous.pt"


def save(folder: str | Path, state: Mapping[str, Any]) -> Path:
    """Write `state` to folder/last.pt; the checkpoint that stood there becomes previous.pt.

    At every moment one of the two files is whole. One process writes (the main one). The file needs no
    code to be read: tensors, dicts, lists, tuples, text and numbers; NumPy arrays are stored as tensors.

    Raises:
        TypeError: `state` holds something else; the message says where.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    last, fresh, old = folder / LAST, folder / f".{LAST}.tmp", folder / f".{PREVIOUS}.tmp"
    with open(fresh, "wb") as file:
        torch.save(_plain(state, ""), file)
        file.flush()
        os.fsync(file.fileno())
    old.unlink(missing_ok=True)
    # is_zipfile: a truncated last must not push out a good previous.
    if last.is_file() and zipfile.is_zipfile(last):
        try:
            os.link(last, old)
        except OSError:  # no hard links on this file system
            shutil.copyfile(last, old)
    os.replace(fresh, last)
    if old.exists():
        os.replace(old, folder / PREVIOUS)
    _sync_folder(folder)
    return last


def load(folder: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read the newest readable checkpoint of a folder; a warning says when that is the previous one.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: it holds some, but none can be read.
    """
    folder = Path(folder)
    present = [folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(f"there is no checkpoint in {folder}; expected {LAST}")
    reasons = []
    for path in present:
        try:
            state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            text = str(error).strip() or type(error).__name__
            reasons.append(f"{path.name}: {text.splitlines()[0]}")
            continue
        if path.name != LAST:
            why = reasons[0] if reasons else f"{LAST} is missing"
            warnings.warn(f"resuming from {path}, for {why}", stacklevel=2)
        return state
    raise ValueError(f"no checkpoint in {folder} can be read; remove them to restart ({'; '.join(reasons)})")


def _plain(value: Any, place: str) -> Any:
    """`value` with NumPy and mapping types replaced by what weights_only loading accepts."""
    if isinstance(value, torch.Tensor):
        return value.detach()
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


def _sync_folder(folder: Path) -> None:
    """Make the renames durable; systems that cannot open a folder (Windows) are left as they are."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
