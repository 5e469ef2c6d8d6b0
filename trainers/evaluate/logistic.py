"""Logistic regression on frozen features, whose weight decay is chosen on held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DECAYS", "Fitted", "fit_logistic", "standard"]

DECAYS = tuple(10.0**power for power in range(1, -9, -1))
"""Weight decays that are tried, in falling order, so that each starts from the solution before it."""
_HELD = 0.2  # share of the images on which the decay is chosen
_STEPS = 300  # of L-BFGS, at most


class Fitted(NamedTuple):
    """A linear classifier of D features into C classes."""

    weights: Tensor  # (D + 1, C) of standardised features; the last row is the bias
    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    decay: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, D)."""
        return (features - self.mean) * self.scale @ self.weights[:-1] + self.weights[-1]


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, measure: Callable[[Tensor, Tensor], float], seed: int
) -> Fitted:
    """Minimise the loss and half the decay times the squared weights by L-BFGS, without augmentation.

    This is the classifier of Kornblith et al. (arXiv 1805.08974, section 3.1), but for the grid of decays,
    which is coarser here, and the features, which are standardised (`standard`). The decay is the
    one of the greatest `measure` on a fifth of the images, of equal ones that of the least loss there. The
    classifier is then fitted to all images.

    Args:
        features: (N, D) float32.
        labels: (N,) int64 for one class an image (softmax); or (N, C) of 1, 0 and -1 for a logistic
            regression of each class, to which images with -1 do not count.
        measure: of logits (n, C) and their labels; NaN where it is not defined.
        seed: of the held-out fifth, and nothing else.
    """
    mean, scale = standard(features)
    inputs = (features - mean) * scale
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs))).to(inputs.device)
    count = max(1, round(_HELD * len(inputs)))
    held, rest = shuffled[:count], shuffled[count:]
    weights = features.new_zeros(features.shape[1] + 1, classes)
    tried: list[tuple[float, float, int]] = []
    starts = []
    for number, decay in enumerate(DECAYS):
        weights = _minimised(inputs[rest], labels[rest], decay, weights)
        logits = inputs[held] @ weights[:-1] + weights[-1]
        found = measure(logits, labels[held])
        tried.append((-np.inf if np.isnan(found) else found, -float(_loss(logits, labels[held])), -number))
        starts.append(weights)
    best = -max(tried)[2]
    return Fitted(_minimised(inputs, labels, DECAYS[best], starts[best]), mean, scale, DECAYS[best])


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the images; of several classes an image, which share no weights, the sum of these means."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    counted = (labels >= 0).to(logits.dtype)
    wanted = labels.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, wanted, counted, reduction="sum") / len(logits)


def _minimised(inputs: Tensor, labels: Tensor, decay: float, start: Tensor) -> Tensor:
    """Weights of the least loss, found from `start`, which stays as it is."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=_STEPS, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(inputs @ weights[:-1] + weights[-1], labels)
        loss = loss + decay / 2 * weights[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (D,) that give features (N, D) mean 0 and variance 1 / D in every dimension.

    Then a row's mean squared length is 1, and one learning rate suits encoders of any width and scale (ours;
    MAE, arXiv 2111.06377, appendix A, has a batch norm in front of the classifier). A dimension that hardly
    varies becomes 0.
    """
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    varies = deviation > 1e-6 * features.abs().amax(dim=0)
    return mean, torch.where(varies, 1 / deviation, 0) / features.shape[1] ** 0.5
