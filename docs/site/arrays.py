"""Lets types of arrays be told as they are written: NDArray[float32]. Imported before what is documented."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy.typing

Kind = TypeVar("Kind")


class NDArray(Generic[Kind]):
    """NumPy's own is an alias, which would be told as ndarray[tuple[Any, ...], dtype[float32]]."""


NDArray.__module__ = "numpy.typing"
numpy.typing.NDArray = NDArray  # type: ignore[misc, assignment]
