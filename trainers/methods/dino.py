"""DINO: a student matches a slow teacher's distribution over prototypes, across crops (arXiv 2104.14294)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from trainers import config as cfg
from trainers.encoders.backbones import Backbone
from trainers.engine.optim import Clock, cosine, linear
from trainers.methods.method import Method
from trainers.methods.networks import Centre, PrototypeHead, ema_update, momentum_copy

__all__ = ["DINO", "across_views", "cross_entropy"]

GLOBAL = 2  # views that the teacher sees


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """-sum over k of softmax(teacher)_k log softmax(student)_k, from logits (..., K) over temperatures."""
    return -(teacher.softmax(dim=-1) * student.log_softmax(dim=-1)).sum(dim=-1)


def per_view(logits: Tensor, samples: int) -> Tensor:
    """(views * B, K), view after view, as (views, B, K)."""
    return logits.view(-1, samples, logits.shape[1])


def across_views(teacher: Tensor, student: Tensor) -> Tensor:
    """(B,) mean cross entropy over the T * (V - 1) pairs of a teacher's view and another view of the student.

    Args:
        teacher: logits (T, B, K) over the temperature, of the first T views, already centred.
        student: logits (V, B, K) over the temperature, of all views.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        pairs = -torch.einsum("tbk,vbk->tvb", teacher.softmax(dim=-1), student.log_softmax(dim=-1))
        same = pairs.diagonal().sum(dim=1)
        return (pairs.sum(dim=(0, 1)) - same) / (len(teacher) * (len(student) - 1))


class DINO(Method):
    """Student, teacher, centre and sharpening, with two global and any number of local views.

    The teacher's temperature warms up epoch by epoch, its momentum follows half a cosine step by step, and
    the prototypes get no gradient in the first epoch (appendix A and the public code). The teacher is the
    encoder to evaluate.
    """

    temperature: Tensor

    def __init__(self, backbone: Backbone, config: cfg.DINO) -> None:
        super().__init__()
        self.backbone = backbone
        width, bottleneck, prototypes = config.hidden_dim, config.bottleneck_dim, config.output_dim
        self.head = PrototypeHead(backbone.dim, width, bottleneck, prototypes, config.bn)
        self.teacher_backbone = momentum_copy(self.backbone)
        self.teacher_head = momentum_copy(self.head)
        self.centre = Centre(prototypes, config.centre_momentum)
        self.config = config
        # A tensor, because a change of a number would recompile the forward pass.
        self.register_buffer("temperature", torch.tensor(config.teacher_temperature), persistent=False)

    def check_views(self, sizes: Sequence[int]) -> None:
        check_multi_crop(self, sizes)

    def before_step(self, clock: Clock) -> None:
        start, end = self.config.warmup_teacher_temperature, self.config.teacher_temperature
        self.temperature.fill_(linear(clock.epoch, self.config.warmup_teacher_epochs, start, end))

    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        first, *rest = global_and_local(self.checked(views))
        teacher = self.teacher_logits(self.teacher_backbone(first))
        # One pass per resolution, one pass of the head over all of them.
        student = self.student_logits(torch.cat([self.backbone(images) for images in (first, *rest)]))
        return self.config.loss_scale * self.final_loss(teacher, student, len(views[0]))

    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        teacher = self.teacher_logits(self.teacher_backbone(other)) - self.centre.value
        student = self.student_logits(self.backbone(images)) / self.config.student_temperature
        return -cross_entropy(teacher / self.temperature, student)

    def teacher_logits(self, features: Tensor) -> Tensor:
        """Pooled features -> logits (N, prototypes)."""
        with torch.no_grad():
            return cast(Tensor, self.teacher_head(features))

    def student_logits(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.head(features))

    def final_loss(self, teacher: Tensor, student: Tensor, samples: int) -> Tensor:
        """Losses (B,) of B samples from logits of the global views (2B, K) and of all views (V * B, K)."""
        targets = self.centre(teacher) / self.temperature
        # Not unit vectors: they do not show when all images belong to one prototype, or equally to all.
        self.embedding = targets[:samples].softmax(dim=1)
        logits = student / self.config.student_temperature
        return across_views(per_view(targets, samples), per_view(logits, samples))

    def after_backward(self, clock: Clock) -> None:
        if clock.step < self.config.freeze_last_layer * clock.steps_per_epoch:
            self.head.last_layer.weight.grad = None

    def after_step(self, clock: Clock) -> None:
        momentum = cosine(clock.share, self.config.momentum, self.config.final_momentum)
        ema_update(self.teacher_backbone, self.backbone, momentum)
        ema_update(self.teacher_head, self.head, momentum)
        self.centre.update()

    @property
    def encoder(self) -> Backbone:
        return self.teacher_backbone

    momentum_encoder = encoder


def check_multi_crop(method: Method, sizes: Sequence[int]) -> None:
    """Check that views of such sides are two global ones, and local ones of another size, if any.

    Raises:
        ValueError: they are not.
    """
    if len(sizes) < GLOBAL:
        raise ValueError(
            f"{type(method).__name__} needs {GLOBAL} global views per sample, not {len(sizes)}; "
            "choose views.name dino"
        )
    if len(set(sizes[:GLOBAL])) > 1 or len(set(sizes[GLOBAL:])) > 1:
        raise ValueError(
            f"the global views should have one size and the local ones another, not {list(sizes)} pixels"
        )


def global_and_local(views: list[Tensor]) -> list[Tensor]:
    """The global views as one batch (2B, ...), and local ones, if any, as another."""
    kinds = [views[:GLOBAL], views[GLOBAL:]] if len(views) > GLOBAL else [views]
    return [torch.cat(kind) for kind in kinds]
