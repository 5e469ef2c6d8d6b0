"""The interface of all methods: a loss together with the networks that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainers.encoders.backbones import Backbone, freeze
from trainers.encoders.weights import load_weights
from trainers.engine.optim import Clock

__all__ = ["Method", "are_kin", "log_ratio"]


class Method(nn.Module, ABC):
    """A loss and its networks.

    Around every optimiser step the loop calls `before_step`, `forward` (the loop weights the losses, averages
    and differentiates them), `after_backward`, the optimiser, and `after_step`. `forward` is called for every
    part of the step (`optim.accumulate`), and twice if pairs are added: what it leaves for `after_step` must
    add up.
    """

    backbone: Backbone
    """The encoder that learns by gradient."""
    embedding: Tensor
    """(B, D) what the last call compared, of the first view, without gradient; shows a collapse. Projections,
    or for DINO the teacher's distributions over the prototypes."""
    sync_bn: bool = True
    """Whether batch norm is computed over all processes; False where that would reveal the answer."""
    split_bn: int = 0
    """Groups of batch norm into which the batch of each process must divide; 0: none."""
    in_batch: str = ""
    """What the loss of a sample takes from others of its batch, such as "negatives"; empty: nothing."""
    constant_lr: tuple[str, ...] = ()
    """Submodules whose learning rate ignores the schedule."""

    @abstractmethod
    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        """Losses per sample (B,), float32, from views (B, 3, S, S) of the same B samples.

        `kin` (B, 2), if given, holds the number of each sample and of its semantic partner: methods with
        negatives leave out those that show the same image or a partner. Other methods ignore it.
        """

    @abstractmethod
    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        """How well (B,) images (B, 3, S, S) agree with another view of them, by what the method compares.

        Greater is better; gradients flow only through `images` and the encoder that learns. If the method
        has negatives, they are the other images of the batch (ContraCAM, arXiv 2108.00049).
        """

    def check_views(self, sizes: Sequence[int]) -> None:
        """Check the number of views and their sides in pixels; called before any image is read.

        Raises:
            ValueError: the method does not compare such views; by default it compares two.
        """
        if len(sizes) != 2:
            name = type(self).__name__
            raise ValueError(
                f"{name} compares 2 views per sample, not {len(sizes)}; choose another views.name"
            )

    def checked(self, views: list[Tensor]) -> list[Tensor]:
        """The views (B, 3, S, S) unchanged, after `check_views`."""
        self.check_views([view.shape[-1] for view in views])
        return views

    def before_step(self, clock: Clock) -> None:
        """Called before the forward pass: temperatures, shuffles."""

    def after_backward(self, clock: Clock) -> None:
        """Called when gradients are computed: removes those of what must not learn yet."""

    def after_step(self, clock: Clock) -> None:
        """Called after the optimiser's step: momentum networks, queues, centres."""

    def start_from(self, weights: str) -> None:
        """Give the encoder weights from elsewhere, and the momentum encoder the same; see `load_weights`."""
        load_weights(self.backbone, weights)
        if self.momentum_encoder is not None:
            self.momentum_encoder.load_state_dict(self.backbone.state_dict())

    def freeze(self, stages: int) -> None:
        """Keep the first stages of the encoder and of the momentum encoder as they are; see `freeze`."""
        for net in (self.backbone, self.momentum_encoder):
            if net is not None:
                freeze(net, stages)

    @property
    def encoder(self) -> Backbone:
        """The network to evaluate, to localise with and to export."""
        return self.backbone

    @property
    def momentum_encoder(self) -> Backbone | None:
        """The slow average of the encoder that learns, if the method has one."""
        return None


def are_kin(mine: Tensor, others: Tensor) -> Tensor:
    """(B, N): whether samples (B, 2) and others (N, 2), both number and partner, show the same image.

    Two samples with one partner are kin, because the second views of both show it.
    """
    number, partner = mine[:, :1], mine[:, 1:]
    either = (number == others[:, 0]) | (partner == others[:, 0])
    return either | (number == others[:, 1]) | (partner == others[:, 1])


def log_ratio(query: Tensor, key: Tensor) -> Tensor:
    """ContraCAM's score (B,): q.k - log of the sum over the other rows m of exp(q.q_m), unit rows (B, D).

    Equation 2 of arXiv 2108.00049, without a temperature; the other rows give no gradient (our choice).
    """
    with torch.autocast(query.device.type, enabled=False):
        others = query @ query.detach().T
        itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
        return (query * key).sum(dim=1) - others.masked_fill(itself, -torch.inf).logsumexp(dim=1)
