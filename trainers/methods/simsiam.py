"""SimSiam: a predictor guesses the other view's projection, which gets no gradient (arXiv 2011.10566)."""

from __future__ import annotations

from torch import Tensor

from trainers import config as cfg
from trainers.encoders.backbones import Backbone
from trainers.methods.method import Method
from trainers.methods.networks import normalise, projector, simsiam_projector

__all__ = ["SimSiam", "negative_cosine"]


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(p, z) per row of vectors (B, D), which are normalised here."""
    return -(normalise(prediction) * normalise(target)).sum(dim=1)


class SimSiam(Method):
    """Backbone, projector of three layers and predictor; the mean of both directions.

    The predictor's learning rate stays at its peak (section 4, "fix lr"). Batch norm sees each view as its
    own batch, as published.
    """

    constant_lr = ("predictor",)

    def __init__(self, backbone: Backbone, config: cfg.SimSiam) -> None:
        super().__init__()
        self.backbone = backbone
        hidden = config.hidden_dim or config.output_dim
        self.projector = simsiam_projector(backbone.dim, hidden, config.output_dim)
        self.predictor = projector(config.output_dim, config.predictor_dim, config.output_dim, bn=True)
        self.loss_scale = config.loss_scale

    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        z1, z2 = (self.projector(self.backbone(view)) for view in self.checked(views))
        self.embedding = z1.detach()
        p1, p2 = self.predictor(z1), self.predictor(z2)
        there, back = negative_cosine(p1, self.target(z2)), negative_cosine(p2, self.target(z1))
        return self.loss_scale * (there + back) / 2

    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        target, z = (self.projector(self.backbone(view)) for view in (other, images))
        return -negative_cosine(self.predictor(z), target.detach())

    def target(self, z: Tensor) -> Tensor:
        """The target of a prediction: the projection without gradient, which prevents a collapse."""
        return z.detach()
