"""The folder of an evaluation that trains: what it was begun with, and whether to continue it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dali_views.system.stored import check, entries, text

from ..engine import checkpoint, interrupt

__all__ = ["digest", "open_evaluation"]

DIGEST = 64  # characters of a `digest`


def digest(arrays: Mapping[str, np.ndarray[Any, Any]], more: str = "") -> str:
    """Hex SHA-256 of text and named arrays."""
    found = hashlib.sha256(more.encode())
    for name, array in arrays.items():
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def open_evaluation(folder: Path, description: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """The checkpoint to continue, None if there is none; errors as by `train_classifier`."""
    try:
        saved = checkpoint.load(folder)
    except FileNotFoundError:
        return None
    form = entries({"description": entries({})}, {"launch": text})
    check(saved, form, f"the checkpoint in {folder}", "it is not of an evaluation; remove the folder")
    if not (resume or interrupt.began(saved.get("launch", ""))):
        raise FileExistsError(
            f"{folder} holds an evaluation already; --resume continues it, --name OTHER keeps both"
        )
    changed = [name for name, value in description.items() if saved["description"].get(name) != value]
    if changed:
        before = saved["description"]
        # A digest says nothing to a reader.
        told = ", ".join(
            name if len(str(value)) == DIGEST else f"{name} {before.get(name)}, now {value}"
            for name, value in description.items()
            if name in changed
        )
        raise ValueError(
            f"the evaluation in {folder} was begun with other values ({told}); "
            "remove the folder to start again"
        )
    return saved
