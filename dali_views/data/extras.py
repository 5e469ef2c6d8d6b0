"""Packages that only some data sets need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_EXTRAS = {"pyarrow": "tables", "lmdb": "tables", "obstore": "cloud"}


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Imports in this block are of a package that only an extra of this project brings.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        told = f"These images are read with {package}, which is not installed; pip install {package}"
        raise ValueError(f"{told}, or the extra {_EXTRAS[package]!r} of dali-views.") from error
