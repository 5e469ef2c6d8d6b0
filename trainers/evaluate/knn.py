"""Weighted nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_views import SampleIndex, ViewLoader

from .. import config as cfg
from ..data import evaluation_views, plain_loader
from ..encoders.backbones import Backbone
from ..engine import ranks
from ..engine.setting import Setting

__all__ = ["extract", "knn", "knn_accuracy", "knn_votes", "plain_share", "share"]

_TILE = 2**24  # the most numbers of the bank that are compared at a time, and cosines; 64 MiB in float32


def knn(
    setting: Setting, views: cfg.Views, encoder: Backbone, bank: SampleIndex, queries: SampleIndex,
    k: Sequence[int] = (200,), temperature: float = 0.1,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Weighted kNN top-1 and top-5 of an encoder's pooled features, as shares, for each k.

    The W ranks share the bank of N images, see `share`. Peak memory on each device, beside the network and a
    batch of at most 256 images, is 2 (N / W + M) D bytes and 0.3 GB for M queries, which count three times if
    there are several ranks: for ImageNet (N = 1,281,167, M = 50,000, D = 2048) at most 5.8 GB on one GPU, and
    1.6 GB on eight.

    Raises:
        ValueError: a k is below 1, the nearest neighbour would not count most, or as `knn_accuracy`.
    """
    if min(k, default=0) < 1:
        raise ValueError(f"k should be at least 1, not {min(k, default=0)}")
    if not temperature > 0:  # so that nan is refused too
        raise ValueError(f"the temperature of kNN should be above 0, not {temperature}")
    voters, asked = (plain_share(setting, views, encoder, each) for each in (bank, queries))
    return {each: knn_accuracy(*voters, *asked, each, temperature) for each in k}


def plain_share(
    setting: Setting, views: cfg.Views, encoder: Backbone, index: SampleIndex
) -> tuple[Tensor, Tensor]:
    """`share` of the plain central views of an index."""
    plain = plain_loader(setting, views, index, evaluation_views(views))
    return share(encoder, plain, setting.device, setting.autocast)


def _features(
    encoder: Callable[[Tensor], Tensor], loader: Iterable[Any], device: torch.device | str,
    context: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Features (B, ...) float32 of the first view, labels and rows (B,), batch by batch, on the device."""
    module = encoder if isinstance(encoder, nn.Module) else nn.Identity()
    training = module.training
    module.eval()
    batch = None
    try:
        for batch in loader:
            with context():
                found = encoder(batch.views[0].to(device)).float()
            yield found, batch.label.to(device).long(), batch.index.to(device).long()
    finally:
        module.train(training)
    if batch is None:
        raise ValueError("the loader gave no batch; nothing to extract features from")


def _once(index: Tensor) -> Tensor:
    """Places of the first of equal numbers in index (N,), by ascending number."""
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


@torch.no_grad()
def extract(
    encoder: Callable[[Tensor], Tensor], loader: Iterable[Any], device: torch.device | str,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Features of the first view of every sample, gathered over ranks and in the order of the index.

    A module is in eval mode meanwhile. A sample that occurs more than once (padding of the last batch, ranks
    of unequal length) is kept once.

    Args:
        encoder: images (B, 3, S, S) -> features (B, D), called within `context`.
        loader: batches (`dali_views.Batch`) of this rank's share, at least one.
        device: of the encoder.
        dtype: of the features; twice their bytes are needed meanwhile, with several ranks three times.

    Returns:
        features (N, D), labels (N,) int64, index (N,) int64, on `device`, equal on all ranks.
    """
    parts = [(found.to(dtype), *rest) for found, *rest in _features(encoder, loader, device, context)]
    columns = [torch.cat(each) for each in zip(*parts, strict=True)]
    del parts
    features, labels, index = (ranks.gather_rows(columns.pop(0)) for _ in range(3))
    rows = _once(index)
    return features[rows], labels[rows], index[rows]


@torch.no_grad()
def share(
    encoder: Callable[[Tensor], Tensor], loader: ViewLoader, device: torch.device | str,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's share of what `extract` gathers, in a quarter of its memory or less.

    Returns:
        features (n, D) float16, rows of length 1, written in place batch by batch; labels (n,) int64, where a
        sample that occurs more than once, on whatever rank, has -1 but for once.
    """
    most, count = len(loader) * loader.batch_size, 0
    for found, label, row in _features(encoder, loader, device, context):
        if not count:
            features = found.new_empty(most, found.shape[1], dtype=torch.float16)
            labels, index = label.new_empty(most), row.new_empty(most)
        part = slice(count, count + len(found))
        features[part], labels[part], index[part] = F.normalize(found, dim=1), label, row
        count = part.stop
    mine = index[:count]
    everyone = ranks.gather_rows(torch.stack([mine, torch.full_like(mine, ranks.rank())], dim=1))
    kept = torch.zeros(len(everyone), dtype=torch.bool, device=mine.device)
    kept[_once(everyone[:, 0])] = True
    return features[:count], labels[:count].masked_fill(~kept[everyone[:, 1] == ranks.rank()], -1)


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
    k: int = 200, temperature: float = 0.1, chunk: int = 1024,
) -> dict[str, float]:  # fmt: skip
    """Share of test samples whose class wins the vote of their k nearest training samples.

    Each neighbour votes for its class with exp(cos / temperature). Samples with label -1 are left out.

    Args:
        train_features, test_features: (N, D) and (M, D), float of any width and scale; rows are normalised
            and compared in float32. With several ranks these are shares: all ranks' rows count, once each.
        train_labels, test_labels: (N,) and (M,) int64.
        temperature: the paper has 0.07, MoCo's CIFAR demo 0.1.
        chunk: test samples compared at a time, with a tile of the training samples: their numbers and the
            cosines are at most 2^24 each.

    Returns:
        {"top1": share, "top5": share} in [0, 1], equal on all ranks; top5 uses the best min(5, classes).

    Raises:
        ValueError: no labelled sample on one of the sides.
    """
    tests, answers = ranks.gather_rows(test_features), ranks.gather_rows(test_labels)
    named = F.pad(train_labels, (0, 1), value=-1)  # a share may be empty
    facts = ranks.gather(torch.stack([(named >= 0).sum(), named.max()])[None])
    voters, classes, asked = int(facts[:, 0].sum()), int(facts[:, 1].max()) + 1, int((answers >= 0).sum())
    if not voters or not asked:
        side = "training" if not voters else "test"
        raise ValueError(
            f"no {side} sample has a label, and kNN needs labels on both sides; "
            "name labelled folders by data.eval_train and data.eval_val"
        )
    k = min(k, voters)
    hits = torch.zeros(2, dtype=torch.long, device=tests.device)
    for queries, truth in zip(torch.split(tests, chunk), torch.split(answers, chunk), strict=True):
        nearest = _nearest(F.normalize(queries.float(), dim=1), train_features, train_labels, k)
        cosines, neighbours = (ranks.gather(each[None]).transpose(0, 1).flatten(1) for each in nearest)
        cosines, neighbours = _greatest(cosines, neighbours, k)
        # Relative to the nearest: the same ranking, and no temperature overflows.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), classes, dtype=weights.dtype, device=tests.device)
        votes.scatter_add_(1, neighbours, weights)
        best = votes.topk(min(5, classes), dim=1)
        # A class nobody voted for is no answer, and -1 is no class.
        right = (best.indices == truth[:, None]) & (best.values > 0)
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (hits.double() / asked).tolist()
    return {"top1": top1, "top5": top5}


@torch.no_grad()
def knn_votes(features: Tensor, shown: Tensor, queries: Tensor, k: int, temperature: float) -> Tensor:
    """Votes (M, C) for every class, as by `knn_accuracy`, as shares; each rank has all rows, and all votes.

    Args:
        features, queries: (N, D) and (M, D) float32.
        shown: (N, C) bool, the classes that each of the N votes for, of which there may be several.
    """
    k = min(k, len(features))
    rows, votes = torch.arange(len(features), device=features.device), []
    weight = shown.to(features.dtype)
    for part in torch.split(queries, max(1, _TILE // (k * shown.shape[1]))):
        cosines, nearest = _nearest(F.normalize(part, dim=1), features, rows, k)
        shares = (cosines / temperature).softmax(1)
        votes.append((shares[:, None] @ weight[nearest]).squeeze(1))
    return torch.cat(votes)


def _nearest(queries: Tensor, features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and labels (Q, k) of the k nearest rows with a label; cosine -inf where there are fewer.

    Args:
        queries: (Q, D) float32, rows of length 1.
        features, labels: (N, D) and (N,).
    """
    best = queries.new_full((len(queries), k), -torch.inf), labels.new_zeros((len(queries), k))
    rows = max(1, _TILE // max(features.shape[1], len(queries)))
    for part, named in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
        cosines = (queries @ F.normalize(part.float(), dim=1).T).masked_fill_(named < 0, -torch.inf)
        cosines, places = cosines.topk(min(k, len(named)), dim=1)
        best = _greatest(torch.cat([best[0], cosines], 1), torch.cat([best[1], named[places]], 1), k)
    return best


def _greatest(cosines: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest cosines of each row, with their labels."""
    values, places = cosines.topk(k, dim=1)
    return values, labels.gather(1, places)
