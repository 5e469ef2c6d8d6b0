"""Images that show several classes: frozen features, and the mean average precision of what reads them."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_views import SampleIndex

from .. import config as cfg
from ..data import evaluation_views, plain_loader
from ..detect.sides import open_truths
from ..detect.truth import Truth
from ..encoders.backbones import Backbone
from ..engine.setting import Setting
from .knn import extract, knn_votes
from .logistic import fit_logistic
from .precision import PRECISIONS, precisions

__all__ = ["Sides", "features_of", "knn", "label_matrix", "linear", "means", "sides_of"]


class Sides(NamedTuple):
    """Features and labels of C classes, of N images to learn from and M to be tested on."""

    features: Tensor  # (N, D) float32 on the device
    labels: NDArray[np.int8]  # (N, C) as of `label_matrix`
    test_features: Tensor  # (M, D)
    test_labels: NDArray[np.int8]  # (M, C)
    classes: list[str]


def label_matrix(truth: Truth) -> NDArray[np.int8]:
    """(N, C) 1: the image shows the class, 0: it does not, -1: neither.

    Neither is VOC's rule for an image whose only objects of a class are difficult ones. COCO's crowds show
    their class.
    """
    labels = np.zeros((len(truth.objects), len(truth.classes)), np.int8)
    for row, each in enumerate(truth.objects):
        unsure = each.ignored & truth.voc
        labels[row, each.labels[unsure] - 1] = -1
        labels[row, each.labels[~unsure] - 1] = 1
    return labels


def sides_of(config: cfg.Config, setting: Setting, encoder: Backbone) -> Sides:
    """Features of the images that `detect` would learn from and test on, and the classes of their objects.

    Classes that no training image or no test image shows, or all training images, are left out with a
    warning.

    Raises:
        ValueError: as by `detect`, or no class remains.
    """
    train, tests = open_truths(config, setting.seed)
    labels, test_labels = label_matrix(train), label_matrix(tests)
    some = ((labels == 1).any(0)) & ((labels == 0).any(0)) & ((test_labels == 1).any(0))
    absent = [name for name, kept in zip(train.classes, some, strict=True) if not kept]
    if not some.any():
        raise ValueError(
            f"none of {len(absent)} classes has an image that shows it both in training and in test, and one "
            "in training that does not; name more images, or hold out another data.val_share"
        )
    if absent:
        warnings.warn(
            f"{len(absent)} of {len(some)} classes lack images that show them, in training or in test, or "
            f"training images that do not, and do not count; the first is {absent[0]}",
            stacklevel=2,
        )
    found, rows = features_of(setting, config.views, encoder, train.index)
    tested, test_rows = features_of(setting, config.views, encoder, tests.index)
    names = [name for name, kept in zip(train.classes, some, strict=True) if kept]
    return Sides(found, labels[rows][:, some], tested, test_labels[test_rows][:, some], names)


def features_of(
    setting: Setting, views: cfg.Views, encoder: Backbone, index: SampleIndex
) -> tuple[Tensor, NDArray[np.int64]]:
    """Features (n, D) float32 of the plain central views, equal on all ranks, and their rows (n,).

    An image that cannot be read has none.
    """
    plain = plain_loader(setting, views, index, evaluation_views(views))
    found, _, rows = extract(encoder, plain, setting.device, setting.autocast)
    return found, rows.cpu().numpy()


def means(scores: Tensor | NDArray[np.float64], sides: Sides) -> tuple[dict[str, float], dict[str, float]]:
    """The three mean average precisions of scores (M, C), by name, and VOC's of each class, by class."""
    each = precisions(np.asarray(scores.cpu() if isinstance(scores, Tensor) else scores), sides.test_labels)
    means = dict(zip(PRECISIONS, np.nanmean(each, axis=0).tolist(), strict=True))
    return means, dict(zip(sides.classes, each[:, 1].tolist(), strict=True))


def linear(sides: Sides, seed: int) -> tuple[Tensor, float]:
    """Scores (M, C) of a logistic regression of each class, and its decay, chosen by mean AP."""

    def measure(logits: Tensor, labels: Tensor) -> float:
        found = precisions(logits.cpu().numpy(), labels.cpu().numpy())[:, 0]
        return float("nan") if np.isnan(found).all() else float(np.nanmean(found))

    labels = torch.from_numpy(sides.labels).to(sides.features.device)
    fitted = fit_logistic(sides.features, labels, len(sides.classes), measure, seed)
    return fitted(sides.test_features), fitted.decay


def knn(sides: Sides, k: int, temperature: float) -> Tensor:
    """Scores (M, C): the share of the k nearest images' votes that show the class."""
    shown = torch.from_numpy(sides.labels == 1).to(sides.features.device)
    return knn_votes(sides.features, shown, sides.test_features, k, temperature)
