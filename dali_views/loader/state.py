"""The state of a loader: what one takes from another, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plan import order
from ..plan.views import View
from ..regions.snapshot import snapshot_form
from ..system.stored import EPOCHS, MOST, Form, describe, each, entries, maybe, sequence, text, whole

if TYPE_CHECKING:
    from .loader import ViewLoader

REMEDY = "pass what state_dict() of a loader of the same images and number of regions returned."


def state_form(loader: ViewLoader) -> Form:
    """What `loader` takes; a frozen table is returned as a `Snapshot`. Without a table it takes none."""

    def same_data(value: Any, place: str) -> None:
        if text(value, place) != loader.index.fingerprint:
            raise ValueError(
                "The loader's state is of another data set: the files or their sizes differ; use the index "
                "that it was made with."
            )

    def same_seed(value: Any, place: str) -> None:
        if whole(-MOST - 1)(value, place) != loader.seed:
            raise ValueError(
                f"The loader's state has seed {value}, this loader has {loader.seed}; use that seed."
            )

    def same_views(value: Any, place: str) -> None:
        other = _difference(sequence(each(text, text))(value, place), described(loader.views))
        if other:
            raise ValueError(
                f"The loader's state has {other}; give it the same views, or delete the state's 'views' to "
                "continue with these."
            )

    rows, table = len(loader.index), loader.regions
    # A state may be of a loader with other batches, the last of which ended beyond the rows.
    end = max(2 * rows, order.steps(rows, loader.global_batch, False) * loader.global_batch)
    parts = {
        "fingerprint": same_data,
        "seed": same_seed,
        "unreadable": each(whole(0, rows - 1), text),
        "epoch": whole(0, EPOCHS),
        "position": whole(0, end),
        "regions": maybe(snapshot_form(rows, None if table is None else table.regions)),
    }
    optional = {"views": same_views} | ({} if table is None else {"table": maybe(table.form())})
    return entries(parts, optional=optional)


def described(views: Sequence[View]) -> list[dict[str, str]]:
    """The settings of each view that are not defaults, as text. A new setting leaves old states valid."""
    texts = [{name: _text(value) for name, value in vars(view).items()} for view in views]
    return [{name: text for name, text in each.items() if text != _DEFAULTS.get(name)} for each in texts]


def _text(value: Any) -> str:
    """The same for 1 and 1.0, for lists and tuples, and for NumPy's numbers."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))})"
    return str(value) if value is None or isinstance(value, (bool, str)) else f"{float(value):.12g}"


_DEFAULTS = {one.name: _text(one.default) for one in fields(View) if one.default is not MISSING}


def _difference(theirs: Sequence[Mapping[str, str]], ours: Sequence[Mapping[str, str]]) -> str:
    """The first difference between the views of a state and of a loader, or nothing."""
    if len(theirs) != len(ours):
        return f"{len(theirs)} views, this loader has {len(ours)}"
    for number, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        for name in (*one, *other):
            default = _DEFAULTS.get(name, "")
            found, wanted = one.get(name, default), other.get(name, default)
            if found != wanted:
                name, found = (describe(text).strip("'") for text in (name, found))
                return f"{name} = {found} in view {number}, this loader has {wanted}"
    return ""


def tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of a table as `torch.load` reads it by default."""
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
