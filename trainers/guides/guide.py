"""What every guide is: the one who writes the region table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dali_views import Batch, RegionTable

__all__ = ["Guide"]


class Guide:
    """Nobody writes: all crops stay random. Guides proper override what they need.

    Every rank calls every method, so that a guide may share work. What it writes is seen after
    `regions.sync()`.
    """

    passes: int = 0
    """Passes over the training images that the guide has made beside training."""

    def begin(self, regions: RegionTable) -> None:
        """Called once, before the first epoch of a run; not after a resume, whose table is restored."""

    def weights(self, batch: Batch) -> Tensor:
        """Weights (B,) of the losses, before the forward pass. By default those of the region table."""
        return batch.weights

    def kin(self, batch: Batch) -> Tensor | None:
        """Number and partner (B, 2) of every sample, if partners are to be no negatives; see `Method`."""
        return None

    def after_step(self, batch: Batch) -> None:
        """Called after every optimiser step. May not wait for the device."""

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        """Called after epoch number `epoch` (from 1) of `epochs`; says whether it wrote boxes."""
        return False

    def sync(self) -> None:
        """Called on all ranks before the main one saves: make equal what `state_dict` holds."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the region table."""
        return {"passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict()`."""
        self.passes = int(state["passes"])
