"""Weighted nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_views import SampleIndex

from .. import config as cfg
from ..data import evaluation_views, plain_loader
from ..encoders.backbones import Backbone
from ..engine import ranks
from ..engine.setting import Setting

__all__ = ["extract", "knn", "knn_accuracy"]


def knn(
    setting: Setting, views: cfg.Views, encoder: Backbone, bank: SampleIndex, queries: SampleIndex,
    k: Sequence[int] = (200,), temperature: float = 0.1,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Weighted kNN top-1 and top-5 of an encoder's pooled features, as shares, for each k.

    Raises:
        ValueError: a k is below 1, the nearest neighbour would not count most, or as `knn_accuracy`.
    """
    if min(k, default=0) < 1:
        raise ValueError(f"k should be at least 1, not {min(k, default=0)}")
    if not temperature > 0:  # so that nan is refused too
        raise ValueError(f"the temperature of kNN should be above 0, not {temperature}")
    plain = evaluation_views(views)
    voters, asked = (
        extract(encoder, plain_loader(setting, views, each, plain), setting.device, setting.autocast)
        for each in (bank, queries)
    )
    return {each: knn_accuracy(*voters[:2], *asked[:2], each, temperature) for each in k}


@torch.no_grad()
def extract(
    encoder: Callable[[Tensor], Tensor], loader: Iterable[Any], device: torch.device | str,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Features of the first view of every sample, gathered over ranks and in the order of the index.

    A module is in eval mode meanwhile. A sample that occurs more than once (padding of the last batch, ranks
    of unequal length) is kept once.

    Args:
        encoder: images (B, 3, S, S) -> features (B, D), called within `context`.
        loader: batches (`dali_views.Batch`) of this rank's share, at least one.
        device: of the encoder.

    Returns:
        features (N, D) float32, labels (N,) int64, index (N,) int64, on `device`, equal on all ranks.
    """
    module = encoder if isinstance(encoder, nn.Module) else nn.Identity()
    training = module.training
    module.eval()
    features, labels, index = [], [], []
    try:
        for batch in loader:
            with context():
                features.append(encoder(batch.views[0].to(device)).float())
            labels.append(batch.label.to(device))
            index.append(batch.index.to(device))
    finally:
        module.train(training)
    if not features:
        raise ValueError("the loader gave no batch; nothing to extract features from")
    all_index = ranks.gather_rows(torch.cat(index).long())
    all_features = ranks.gather_rows(torch.cat(features))
    all_labels = ranks.gather_rows(torch.cat(labels).long())
    order = torch.argsort(all_index, stable=True)
    sorted_index = all_index[order]
    first = torch.ones_like(sorted_index, dtype=torch.bool)
    first[1:] = sorted_index[1:] != sorted_index[:-1]
    rows = order[first]
    return all_features[rows], all_labels[rows], all_index[rows]


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
    k: int = 200, temperature: float = 0.1, chunk: int = 1024,
) -> dict[str, float]:  # fmt: skip
    """Share of test samples whose class wins the vote of their k nearest training samples.

    Each neighbour votes for its class with exp(cos / temperature). Samples with label -1 are left out.

    Args:
        train_features, test_features: (N, D) and (M, D), any scale; rows are normalised here.
        train_labels, test_labels: (N,) and (M,) int64.
        temperature: the paper has 0.07, MoCo's CIFAR demo 0.1.
        chunk: test samples compared at a time; memory is chunk * N * 4 bytes.

    Returns:
        {"top1": share, "top5": share} in [0, 1]; top5 uses the best min(5, classes).

    Raises:
        ValueError: no labelled sample on one of the sides.
    """
    known, asked = train_labels >= 0, test_labels >= 0
    bank, bank_labels = F.normalize(train_features[known], dim=1), train_labels[known]
    tests, answers = F.normalize(test_features[asked], dim=1), test_labels[asked]
    if not len(bank) or not len(tests):
        side = "training" if not len(bank) else "test"
        raise ValueError(
            f"no {side} sample has a label, and kNN needs labels on both sides; "
            "name labelled folders by data.eval_train and data.eval_val"
        )
    classes = int(bank_labels.max()) + 1
    k = min(k, len(bank))
    hits = torch.zeros(2, dtype=torch.long, device=bank.device)
    for queries, truth in zip(torch.split(tests, chunk), torch.split(answers, chunk), strict=True):
        cosines, neighbours = (queries @ bank.T).topk(k, dim=1)
        # Relative to the nearest: the same ranking, and no temperature overflows.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), classes, dtype=weights.dtype, device=bank.device)
        votes.scatter_add_(1, bank_labels[neighbours], weights)
        best = votes.topk(min(5, classes), dim=1)
        right = (best.indices == truth[:, None]) & (best.values > 0)  # a class nobody voted for is no answer
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (hits.double() / len(tests)).tolist()
    return {"top1": top1, "top5": top5}
