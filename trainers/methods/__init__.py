"""Methods: a loss together with the networks it trains, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from trainers import config as cfg
from trainers.backbones import Backbone, build_backbone, check_sizes
from trainers.data import training_views
from trainers.schedules import Clock

__all__ = ["Method", "build_method", "method_of"]


class Method(nn.Module, ABC):
    """A loss and its networks.

    Around every optimiser step the loop calls `before_step`, `forward`, whose losses it weighs, averages and
    differentiates, `after_backward`, the optimiser, and `after_step`.
    """

    backbone: Backbone
    """The encoder that learns by gradient."""
    embedding: Tensor
    """(B, D) what the loss compared last, of the first view, without gradient: to tell a collapse by.
    Projections; of DINO, the teacher's distributions over the prototypes."""
    sync_bn: bool = True
    """Whether batch norm is to be computed over all processes; false where that would leak the answer."""
    constant_lr: tuple[str, ...] = ()
    """Submodules whose learning rate ignores the schedule."""

    @abstractmethod
    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        """Losses per sample (B,), float32, of views (B, 3, S, S) of the same B samples.

        `kin` (B, 2), if given, holds every sample's own number and its semantic partner's: methods with
        negatives leave those out that are the same image or a partner. The others have no use for it.
        """

    @abstractmethod
    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        """How well (B,) images (B, 3, S, S) agree with another view of them, by what the method compares.

        Greater is better; gradients flow through `images` and the encoder that learns alone. Where the
        method has negatives, those are the other images of the batch (ContraCAM, arXiv 2108.00049).
        """

    def before_step(self, clock: Clock) -> None:
        """Called before the forward pass: temperatures, shuffles."""

    def after_backward(self, clock: Clock) -> None:
        """Called when the gradients are there: what must not learn yet."""

    def after_step(self, clock: Clock) -> None:
        """Called after the optimiser's step: momentum networks, queues, centres."""

    @property
    def encoder(self) -> Backbone:
        """The network to evaluate, to localise with and to export."""
        return self.backbone


def method_of(config: cfg.Config) -> Method:
    """Encoder and method of a run, with initial weights from torch's global generator.

    Raises:
        ValueError: as by `build_backbone`, or the encoder does not take the views.
    """
    backbone = build_backbone(config.model.backbone, config.model.stem, config.model.zero_init_residual)
    check_sizes(backbone, {view.size for view in training_views(config.views)})
    return build_method(config.method, backbone)


def build_method(config: cfg.Method, backbone: Backbone) -> Method:
    """The method of a configuration around a backbone."""
    # Imported here, for the method files import Method from this package.
    from trainers.methods.byol import BYOL
    from trainers.methods.dino import DINO
    from trainers.methods.moco import MoCo
    from trainers.methods.scfs import SCFS
    from trainers.methods.simclr import SimCLR
    from trainers.methods.simsiam import SimSiam

    match config:
        case cfg.SimCLR():
            return SimCLR(backbone, config)
        case cfg.MoCo():
            return MoCo(backbone, config)
        case cfg.BYOL():
            return BYOL(backbone, config)
        case cfg.SimSiam():
            return SimSiam(backbone, config)
        case cfg.SCFS():
            return SCFS(backbone, config)
        case cfg.DINO():
            return DINO(backbone, config)


def are_kin(mine: Tensor, others: Tensor) -> Tensor:
    """(B, N): whether samples (B, 2) and others (N, 2), both number and partner, are kin or the same."""
    number, partner = mine[:, :1], mine[:, 1:]
    return (number == others[:, 0]) | (partner == others[:, 0]) | (number == others[:, 1])


def log_ratio(query: Tensor, key: Tensor) -> Tensor:
    """ContraCAM's score (B,): q.k - log of the sum over the other rows m of exp(q.q_m), unit rows (B, D).

    As in arXiv 2108.00049, equation 2, without a temperature; the other rows give no gradient (our choice).
    """
    with torch.autocast(query.device.type, enabled=False):
        others = query @ query.detach().T
        itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
        return (query * key).sum(dim=1) - others.masked_fill(itself, -torch.inf).logsumexp(dim=1)


def two_views(views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The two views, or a ValueError that says how many there are."""
    if len(views) != 2:
        raise ValueError(f"this method compares 2 views per sample, not {len(views)}; choose another recipe")
    return views[0], views[1]
