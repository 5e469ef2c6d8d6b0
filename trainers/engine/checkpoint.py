"""Checkpoints that survive kill -9: written whole or not at all, with the one before kept as a spare."""

from __future__ import annotations

import os
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import torch_file

__all__ = ["LAST", "PREVIOUS", "load", "load_run", "restore", "save"]

LAST = "last.pt"
PREVIOUS = "previous.pt"


def save(folder: str | Path, state: Mapping[str, Any]) -> Path:
    """Write `state` to folder/last.pt; the checkpoint that stood there becomes previous.pt.

    At every moment one of the two files is whole. One process writes (the main one). The file needs no
    code to be read: tensors, dicts, lists, tuples, text and numbers; NumPy arrays are stored as tensors.

    Raises:
        TypeError: `state` holds something else; the message says where.
        OSError: the disk is full or fails; both files are as they were.
    """
    folder, plain = Path(folder), _plain(state, "")
    folder.mkdir(parents=True, exist_ok=True)
    last, fresh, old = folder / LAST, folder / f".{LAST}.tmp", folder / f".{PREVIOUS}.tmp"
    try:
        with open(fresh, "wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        old.unlink(missing_ok=True)
        if _ended(last):  # a truncated last must not push out a good previous
            try:
                os.link(last, old)
            except OSError:  # no hard links on this file system
                shutil.copyfile(last, old)
    except (OSError, RuntimeError) as error:
        for draft in (fresh, old):
            draft.unlink(missing_ok=True)
        # PyTorch raises an error of its own about an archive that the system did not let it end.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        told = f"{last} cannot be written ({cause.strerror}); a checkpoint that stood there stands as it was"
        raise OSError(cause.errno, told) from error
    os.replace(fresh, last)
    if old.exists():
        os.replace(old, folder / PREVIOUS)
    _sync_folder(folder)
    return last


def load(folder: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read the newest sound checkpoint of a folder; a warning says when that is the previous one.

    Nothing in the file is executed, and every byte is held against its checksum first, which takes about as
    long as loading: some 0.45 s per GB.

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
            state = _read(path, map_location)
        except ValueError as error:
            reasons.append(f"{path.name}: {error}")
            continue
        if path.name != LAST:
            why = reasons[0] if reasons else f"{LAST} is missing"
            warnings.warn(f"resuming from {path}, for {why}", stacklevel=2)
        return state
    raise ValueError(f"no checkpoint in {folder} can be read; remove them to restart ({'; '.join(reasons)})")


def load_run(folder: str | Path) -> dict[str, Any]:
    """`load` of a training run's folder; those of a linear probe and of fine-tuning lie below it.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: it holds none that can be read, or one of something else.
    """
    saved = load(folder)
    if not {"config", "step", "method"} <= saved.keys():
        raise ValueError(
            f"{folder} holds a checkpoint of something else than a training run; name another folder"
        )
    return saved


def restore(saved: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Put the state of each part back into it.

    Left alone is a part whose state is empty: the scaler of gradients, if the precision had no need of one.
    """
    for name, part in parts.items():
        if saved[name] != {}:
            part.load_state_dict(saved[name])


def _ended(path: Path) -> bool:
    """Whether a file is there and has the end of an archive."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _read(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    state = torch_file.read(path, map_location)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    seen: set[int] = set()  # a few lists of each other may hold more values than can be counted
    waiting: list[Any] = [state]
    for value in waiting:
        if id(value) not in seen and isinstance(value, (dict, list, tuple)):
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor) and _expanded(value):
            raise ValueError("a tensor claims more numbers than the file has")
    return state


def _expanded(tensor: torch.Tensor) -> bool:
    """Whether a tensor shows numbers of its storage more than once, as `expand` makes it.

    It takes no memory until it is copied, and then any amount.
    """
    if tensor.layout is not torch.strided:
        return False
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _plain(value: Any, place: str) -> Any:
    """`value` with NumPy and mapping types replaced by what weights_only loading accepts."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if _expanded(value) else value.detach()
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
