"""What is put back (states of loaders and tables, checkpoints) is checked here before anything is changed.

A form takes a value and its place, and returns the value or raises `Unfit`. Forms are made of forms:

    form = entries({"epoch": whole(0, 9), "boxes": numbers((5, 4)), "guide": maybe(entries({...}))})
    check(state, form, "The loader's state", "pass what state_dict() of this loader returned.")

    The loader's state has epoch = 1.5, not an integer from 0 to 9; pass what state_dict() ...

Forms are functions and no classes of pydantic, because what fits depends on the object that takes the state:
the rows of its table, the tensors of its network.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

Form: TypeAlias = "Callable[[Any, str], Any]"

MOST = 2**63 - 1
EPOCHS = 2**31 - 1
"""The last epoch: tables hold epochs as int32."""


class Unfit(Exception):
    """A value that does not fit its form: a sentence without its beginning, the name of the state."""


class NotFinite(Unfit):
    """Numbers that are NaN or infinite where they must not be."""


def unfit(place: str, value: Any, expected: str) -> Unfit:
    """What to raise for a value at a place."""
    found = describe(value)
    return Unfit(f"has {place} = {found}, not {expected}" if place else f"is {found}, not {expected}")


def check(value: Any, form: Form, what: str, remedy: str) -> Any:
    """The value as its form returns it.

    Raises:
        ValueError: it does not fit: "`what` has PLACE = FOUND, not EXPECTED; `remedy`".
        FloatingPointError: weights are NaN or infinite.
    """
    try:
        return form(value, "")
    except NotFinite as error:
        raise FloatingPointError(f"{what} {error}; lower the learning rate, and begin again") from None
    except Unfit as error:
        raise ValueError(f"{what} {error}; {remedy}") from None


def describe(value: Any) -> str:
    """A value in a few words."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{_dtype(value)} of shape {_shape(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print the longest
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else text[:60] + "..."
    return f"a {type(value).__name__}"


def whole(low: int, high: int = MOST) -> Form:
    """An integer from `low` to `high`, also NumPy's; returns Python's."""

    def form(value: Any, place: str) -> int:
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None or not low <= number <= high:
            raise unfit(place, value, f"an integer from {low} to {high}")
        return number

    return form


def number(low: float = -math.inf) -> Form:
    """A finite number of at least `low`."""

    def form(value: Any, place: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise unfit(place, value, "a number")
        if not (math.isfinite(value) and value >= low):
            raise unfit(
                place, value, "a finite number" + (f" of at least {low:g}" if low > -math.inf else "")
            )
        return value

    return form


def text(value: Any, place: str) -> str:
    """Any text; a form."""
    if not isinstance(value, str):
        raise unfit(place, value, "text")
    return value


def switch(value: Any, place: str) -> bool | None:
    """True, False or None; a form."""
    if not (value is None or isinstance(value, bool)):
        raise unfit(place, value, "True, False or None")
    return value


def maybe(form: Form) -> Form:
    """None, or what fits `form`."""
    return lambda value, place: None if value is None else form(value, place)


def entries(
    forms: Mapping[Any, Form], optional: Mapping[Any, Form] | None = None, only: bool = False
) -> Form:
    """A dict with these entries, and with or without the optional ones; with `only`, no others.

    Returns a dict of the entries that were checked.
    """

    def form(value: Any, place: str) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise unfit(place, value, "a dict")
        for name in value if only else ():
            if name not in forms and name not in (optional or {}):
                raise Unfit(f"has an unknown {_below(place, name)!r}")
        found = {}
        for name, part in {**forms, **(optional or {})}.items():
            if name in value:
                found[name] = part(value[name], _below(place, name))
            elif name in forms:
                raise Unfit(f"has no {_below(place, name)!r}")
        return found

    return form


def each(key: Form, item: Form) -> Form:
    """A dict of any length."""

    def form(value: Any, place: str) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise unfit(place, value, "a dict")
        return {
            key(name, f"a key of {place}"): item(value[name], _below(place, name)) for name in list(value)
        }

    return form


def sequence(items: Form | Sequence[Form]) -> Form:
    """A list or tuple: of any length, or one item for each form. Returns a list."""

    def form(value: Any, place: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise unfit(place, value, "a list")
        if not callable(items) and len(items) != len(value):
            raise unfit(f"the length of {place}", len(value), str(len(items)))
        forms = [items] * len(value) if callable(items) else items
        return [part(item, f"{place}[{i}]") for i, (part, item) in enumerate(zip(forms, value, strict=True))]

    return form


def numbers(
    shape: Sequence[int | None], dtype: str | None = None, finite: bool = False,
    low: float | None = None, high: float | None = None,
) -> Form:  # fmt: skip
    """An array or tensor of this shape (None: any length) and dtype, which holds all its numbers.

    Args:
        dtype: a name, such as "float32"; finite: refuse NaN and infinity; low, high: the least and the most.
    """

    def form(value: Any, place: str) -> Any:
        expected = f"{dtype or 'numbers'} of shape {_shape(shape)}"
        if not hasattr(value, "dtype") or not hasattr(value, "shape") or dtype not in (None, _dtype(value)):
            raise unfit(place, value, expected)
        wanted = zip(shape, value.shape, strict=False)
        if len(shape) != len(value.shape) or any(one not in (None, other) for one, other in wanted):
            raise unfit(place, value, expected)
        if getattr(value, "is_meta", False) or not _strided(value):
            raise unfit(place, value, "a dense array (it is sparse, or without its numbers)")
        if repeats(value):
            raise unfit(place, value, "an array that holds all its numbers (it repeats a few of them)")
        if finite and not bool((abs(value) < math.inf).all()):  # also of NaN
            raise NotFinite(f"has {place} = {describe(value)} with NaN or infinity, not finite numbers")
        if low is not None and high is not None and bool(((value < low) | (value > high)).any()):
            raise unfit(place, value, f"of values from {low} to {high}")
        return value

    return form


def alike(tensors: Mapping[str, Any]) -> Form:
    """The dict of a network: the names, shapes and dtypes of `tensors`, and finite where those are."""
    forms = {
        name: numbers(
            tuple(tensor.shape),
            _dtype(tensor),
            finite=tensor.is_floating_point() and bool(tensor.isfinite().all()),
        )
        for name, tensor in tensors.items()
    }
    return entries(forms, only=True)


def repeats(value: Any) -> bool:
    """Whether an array or a tensor has more numbers than its memory, as `expand` makes it.

    It may have any number of them from a tiny file, and takes the memory of all when it is copied.
    """
    if isinstance(value, np.ndarray):
        return any(
            stride == 0 and length > 1 for stride, length in zip(value.strides, value.shape, strict=True)
        )
    return _strided(value) and bool(value.numel() * value.element_size() > value.untyped_storage().nbytes())


def _strided(value: Any) -> bool:
    return str(getattr(value, "layout", "torch.strided")) == "torch.strided"


def _below(place: str, name: Any) -> str:
    return f"{place}.{name}" if place else str(name)


def _shape(lengths: Sequence[int | None]) -> str:
    return f"({', '.join('any' if length is None else str(length) for length in lengths)})"


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")
