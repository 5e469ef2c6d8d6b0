"""The interface of all guides, which write the region table; when boxes are due, and whether they guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dali_views import Batch, RegionTable, SampleIndex
from dali_views.system.stored import Form, entries, whole
from dali_views.tools.command_line import counted

from .. import config as cfg
from ..engine.setting import Setting
from ..methods import Method

__all__ = ["Guide", "Training", "boxes_due", "outlook"]


@dataclass(frozen=True)
class Training:
    """What a guide guides."""

    method: Method
    index: SampleIndex
    views: cfg.Views
    setting: Setting
    out: Path
    """The run folder."""
    section: str = "guide"
    """Where the guide's keys are in the configuration; "guide.boxes" within semantic pairs."""
    found: dict[str, float] = field(default_factory=dict)
    """What a pass found, for the log, beside `health`: `cell`, the share of the image that one cell of the
    network's map covers."""


class Guide:
    """Writes nothing: all crops stay random. Other guides override what they need.

    Every rank calls every method, so that guides may share work. What a guide writes takes effect after
    `regions.sync()`. `config` is the guide's section of the configuration.
    """

    passes: int = 0
    """Passes over the training images that the guide has made beside training."""

    def __init__(self, config: Any, training: Training) -> None:
        self.config = config
        self.training = training

    def begin(self, regions: RegionTable) -> None:
        """Called once, before the first epoch of a run; not after a resume, which restores the table."""

    def weights(self, batch: Batch) -> Tensor:
        """Weights (B,) of the losses, before the forward pass. By default those of the region table."""
        return batch.weights

    def losses(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Losses (B,) of a batch by the method, called as `network`; see `Method.forward`."""
        return network(batch.views, self.kin(batch))

    def kin(self, batch: Batch) -> Tensor | None:
        """Number and partner (B, 2) of every sample if partners are no negatives; see `Method.forward`."""
        return None

    def after_batch(self, batch: Batch) -> None:
        """Called after every backward pass, once per part of a step. Must not wait for the device."""

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        """Called after epoch number `epoch` (from 1) of `epochs`; returns whether it wrote boxes."""
        return False

    def sync(self) -> None:
        """Called on all ranks before the main one saves: makes equal what `state_dict` holds."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the region table."""
        return {"passes": self.passes}

    def form(self) -> Form:
        """What `load_state_dict` takes; see `dali_views.system.stored`."""
        return entries({"passes": whole(0)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that fits `form`."""
        self.passes = int(state["passes"])


def boxes_due(epoch: int, epochs: int, how: cfg.Localised) -> bool:
    """Whether boxes are rewritten after `epoch`, counted from 1, of `epochs` (ContrastiveCrop's code).

    From the end of the warm-up on, at multiples of the interval, but not after the last epoch. A guide whose
    warm-up is 0 also writes boxes before the first step, in `begin`.
    """
    return epoch >= how.warmup and epoch % how.interval == 0 and epoch != epochs


def outlook(config: cfg.Config) -> str:
    """When crops will follow boxes, as a line for the start of a run; empty if crops ignore boxes."""
    crop, guide = " and ".join(config.views.guided), config.box_guide
    if not crop:
        return ""
    key = "guide" if guide is config.guide else "guide.boxes"
    if isinstance(guide, cfg.NoGuide):
        return f"{crop} crops, but {key}.name none writes no boxes: all crops stay random"
    if not isinstance(guide, cfg.Localised) or guide.warmup == 0:
        return f"{crop} crops in the boxes of {guide.name} from the start"
    epochs = config.run.epochs
    if first := next((n for n in range(1, epochs + 1) if boxes_due(n, epochs, guide)), None):
        return f"{crop} crops in the boxes of {guide.name} after epoch {first} of {epochs}; random until then"
    return (
        f"{crop} crops, but with {key}.warmup {guide.warmup} and {key}.interval {guide.interval} "
        f"{guide.name} writes no boxes in {counted(epochs, 'epoch')}: all crops stay random"
    )
