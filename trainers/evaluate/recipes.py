"""How published linear probes and fine-tunings were trained.

Rates are per 256 images here, so that a recipe stays sensible when the batch is changed or does not fit.
All have momentum 0.9, random crops of 8 to 100 % of the image and flips while training, the central 224
of 256 pixels while testing (small images whole), and, but for FEW_LABELS, no weight decay.

Linear probes, `PROBES`:

- moco: rate 30, batch 256, 100 epochs, a tenth after 60 and 80 (arXiv 1911.05722, section 4.1, and code).
- small: rate 10 at batch 512 (5 per 256), else as moco; ContrastiveCrop's code (arXiv 2202.03278) has it
  for CIFAR, STL-10 and Tiny-ImageNet, whatever the method.
- simclr: rate 0.1, batch 4096, 90 epochs, Nesterov, cosine (arXiv 2002.05709, appendix B.6, and the
  authors' issue 5). Their ImageNet command has weight decay 1e-6, the paper none; none here.
- byol: batch 1024, 80 epochs, Nesterov, cosine (arXiv 2006.07733, appendix C.1). The paper takes the best
  rate of 0.4, 0.3, 0.2, 0.1 and 0.05 on held-out images; 0.2 and its scaling per 256 images are our choice.
- simsiam: LARS, rate 0.1, batch 4096, 90 epochs, cosine; the authors' PyTorch code. Their paper
  (arXiv 2011.10566, appendix A) has rate 0.02, on TPUs.
- dino: rate 0.01, batch 2048, 100 epochs, cosine; SCFS's command for ResNet-50 (arXiv 2212.06486).
  DINO (arXiv 2104.14294) picks a rate per model: its code's default, for ViTs, is 0.001 at batch 1024, and
  its log of ResNet-50 shows 0.3 after scaling, at a batch that is not told.

Fine-tuning, `FEW_LABELS` and `MORE_LABELS`: 20 epochs, batch 256, a fifth after 12 and 16.

- up to 5 % of the labels: rate 0.01, the classifier's 100 times that, weight decay 5e-4; ORL
  (arXiv 2106.11952) at 1 %.
- more: rate 0.01, the classifier's 0.2, no weight decay; SwAV (arXiv 2006.09882) at 10 %. ORL's
  released setting at 10 % differs in the classifier's rate only, 1.

The border of 5 % is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..engine.schedules import lr_at

__all__ = ["FEW_LABELS", "MORE_LABELS", "PROBES", "Settings", "rate"]


@dataclass(frozen=True)
class Settings:
    """How a classifier is trained."""

    epochs: int
    """Passes over the labelled images."""
    batch: int
    """Images per step over all processes."""
    head_lr: float
    """Peak rate of the classifier per 256 images: it is multiplied by batch / 256."""
    encoder_lr: float | None = None
    """The same for the encoder; None: the encoder is frozen."""
    weight_decay: float = 0.0
    """Decay rate of everything that learns, biases and norms included, as in all published recipes."""
    drops: tuple[float, ...] = ()
    """Shares of the epochs after each of which the rate is multiplied by `gamma`; none: half a cosine."""
    gamma: float = 0.1
    """Factor of each drop."""
    optimizer: Literal["sgd", "nesterov", "lars"] = "sgd"
    """SGD with plain or Nesterov's momentum, or LARS (trust 0.001; it adapts the bias as well)."""
    momentum: float = 0.9
    """Share of the last step's velocity that is kept."""
    augment: bool = True
    """Random crops and flips. False (frozen encoder only): features of the plain central view, found once."""


def rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """Learning rate of one optimiser step, counted from 0, as a share of its peak.

    The cosine falls at every step (in the authors' code at every epoch), the drops come between epochs.
    """
    if not settings.drops:
        return lr_at(step, settings.epochs * steps_per_epoch, 0, 1.0)
    epoch = step // steps_per_epoch
    return settings.gamma ** sum(epoch >= round(share * settings.epochs) for share in settings.drops)


_MOCO = Settings(epochs=100, batch=256, head_lr=30.0, drops=(0.6, 0.8))
_SIMCLR = Settings(epochs=90, batch=4096, head_lr=0.1, optimizer="nesterov")

PROBES: dict[str, Settings] = {
    "moco": _MOCO,
    "small": replace(_MOCO, batch=512, head_lr=5.0),
    "simclr": _SIMCLR,
    "byol": replace(_SIMCLR, epochs=80, batch=1024, head_lr=0.2),
    "simsiam": replace(_SIMCLR, optimizer="lars"),
    "dino": Settings(epochs=100, batch=2048, head_lr=0.01),
}

MORE_LABELS = Settings(epochs=20, batch=256, head_lr=0.2, encoder_lr=0.01, drops=(0.6, 0.8), gamma=0.2)
FEW_LABELS = replace(MORE_LABELS, head_lr=1.0, weight_decay=5e-4)
