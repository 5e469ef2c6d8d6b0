"""What the loader hands out: a Batch, and the Stats of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from ..plan.draw import Plan

_FROM_PLAN = ("index", "crops", "flipped", "boxes", "weights", "partner")


@dataclass(frozen=True)
class Batch:
    """B samples in V views, and what was done to them. All tensors are on the loader's device."""

    views: list[torch.Tensor]
    """V tensors (B, 3, S, S), channels-last, normalised; S may differ between views."""
    index: torch.Tensor
    """(B,) int64, row in the SampleIndex."""
    label: torch.Tensor
    """(B,) int64, -1 where unknown."""
    crops: torch.Tensor
    """(B, V, 4) float32, y0 x0 y1 x1 as fractions of the image the view was cut from."""
    flipped: torch.Tensor
    """(B, V) bool, True where the view is mirrored left to right."""
    boxes: torch.Tensor
    """(B, 4) float32, the semantic box the crops were drawn from."""
    weights: torch.Tensor
    """(B,) float32, the saliency weight of that box."""
    partner: torch.Tensor
    """(B,) int64, sample that partner views were cut from (itself if none)."""

    @classmethod
    def of(
        cls, drawn: Plan, views: list[torch.Tensor], labels: NDArray[np.int32], device: torch.device
    ) -> Batch:
        """The batch of a plan, with V views that are already on the device and labels (B,)."""
        arrays = {name: getattr(drawn, name) for name in _FROM_PLAN} | {"label": labels.astype(np.int64)}
        return cls(views, **{name: _tensor(array, device) for name, array in arrays.items()})

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device, without copies if it is there. Lightning and Fabric call this."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        views = [view.to(device) for view in parts.pop("views")]
        return Batch(views, **{name: tensor.to(device) for name, tensor in parts.items()})


def _tensor(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    own = torch.from_numpy(np.array(array))  # a copy: plans share read-only memory with the region table
    # A copy from pageable memory would wait for all work of the stream.
    return own if device.type == "cpu" else own.pin_memory().to(device, non_blocking=True)


@dataclass
class Stats:
    """What the current (or last) epoch cost this rank."""

    images: int = 0
    batches: int = 0
    seconds: float = 0.0
    """From the first request for a batch until the latest one was handed out."""
    waited: float = 0.0
    """Seconds of these that the consumer waited for a batch."""
    bad_images: int = 0
    """Images known to be unreadable, found in this or earlier epochs."""

    @property
    def images_per_second(self) -> float:
        """Images per second of the epoch so far; 0 before the first batch."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that the consumer waited for the loader, in [0, 1]."""
        return self.waited / self.seconds if self.seconds else 0.0
