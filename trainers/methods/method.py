"""What every method is: a loss together with the networks it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from trainers.encoders.backbones import Backbone
from trainers.engine.schedules import Clock

__all__ = ["Method"]


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

    def check_views(self, sizes: Sequence[int]) -> None:
        """See that views of so many pixels along each side are what the method compares; by default, two.

        The trainer asks before it looks at any image.

        Raises:
            ValueError: they are not.
        """
        if len(sizes) != 2:
            name = type(self).__name__
            raise ValueError(
                f"{name} compares 2 views per sample, not {len(sizes)}; choose another views.name"
            )

    def checked(self, views: list[Tensor]) -> list[Tensor]:
        """The views (B, 3, S, S) as they are, once `check_views` has found nothing."""
        self.check_views([view.shape[-1] for view in views])
        return views

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
