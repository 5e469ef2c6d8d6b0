"""Methods: a loss together with the networks it trains, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from trainers import config as cfg
from trainers.backbones import Backbone

__all__ = ["Method", "build_method"]


class Method(nn.Module, ABC):
    """A loss and its networks.

    The loop calls `forward` on the views, weighs and averages the losses, takes the optimiser's step over
    the parameters that require gradients, and calls `after_step`.
    """

    backbone: Backbone
    """The encoder that learns by gradient."""
    sync_bn: bool = True
    """Whether batch norm is to be computed over all processes; false where that would leak the answer."""
    constant_lr: tuple[str, ...] = ()
    """Submodules whose learning rate ignores the schedule."""

    @abstractmethod
    def forward(self, views: list[Tensor]) -> Tensor:
        """Losses per sample (B,), float32, of two views (B, 3, S, S) of the same B samples."""

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step number `step` (from 0) of `total`: momentum nets, queues."""

    @property
    def encoder(self) -> Backbone:
        """The network to evaluate, to localise with and to export."""
        return self.backbone


def build_method(config: cfg.Method, backbone: Backbone) -> Method:
    """The method of a configuration around a backbone."""
    # Imported here, for the method files import Method from this package.
    from trainers.methods.moco import MoCo
    from trainers.methods.simclr import SimCLR

    match config:
        case cfg.SimCLR():
            return SimCLR(backbone, config)
        case cfg.MoCo():
            return MoCo(backbone, config)


def two_views(views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The two views, or a ValueError that says how many there are."""
    if len(views) != 2:
        raise ValueError(f"this method compares 2 views per sample, not {len(views)}; choose another recipe")
    return views[0], views[1]
