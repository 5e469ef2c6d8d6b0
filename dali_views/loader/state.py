"""The state of a loader: what one takes from another, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plan import order
from ..regions.snapshot import snapshot_form
from ..system.stored import EPOCHS, MOST, Form, each, entries, maybe, text, whole

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
    return entries(parts, optional={} if table is None else {"table": maybe(table.form())})


def tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of a table as `torch.load` reads it by default."""
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
