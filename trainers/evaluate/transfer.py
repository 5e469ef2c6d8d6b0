"""One encoder on several labelled sets: a table of kNN and of linear classifiers on frozen features."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .. import config as cfg
from ..compare_table import aligned
from ..encoders.backbones import Backbone
from ..engine.setting import Setting
from . import multilabel, precision
from .knn import knn_votes
from .labelled_sets import LabelledSet, open_set
from .logistic import fit_logistic

__all__ = ["Scored", "as_csv", "mean_of", "table", "transfer"]

_NAMES = {
    "top1": "top-1", "mean_per_class": "mean per class", "map": "mAP", "map_voc": "mAP (VOC 2010)",
    "map_voc07": "mAP (VOC 2007)",
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """One set: a line of the table. Shares are in [0, 1]; None is what was not measured."""

    set: str
    measure: str
    classes: int | None = None
    train: int | None = None  # images to learn from
    test: int | None = None
    knn: float | None = None
    linear: float | None = None
    decay: float | None = None  # of the linear classifier, as chosen
    missing: str = ""  # why the set was left out


def transfer(
    sets: Mapping[str, LabelledSet], setting: Setting, encoder: Backbone, views: cfg.Views
) -> Iterator[Scored]:
    """Score an encoder on each set, one after the other. A set that is not on disk is left out.

    Features are those of the plain central view, found once. kNN votes as `knn` does, the linear classifier
    is `fit_logistic`. Memory: 4 N D bytes for the features of N images, and twice that while L-BFGS runs.

    Raises:
        ValueError: a set is damaged or has no labels; the message begins with its name.
    """
    for name, each in sets.items():
        try:
            yield _scored(name, each, setting, encoder, views)
        except FileNotFoundError as error:
            yield Scored(name, each.measure, missing=str(error))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _scored(name: str, each: LabelledSet, setting: Setting, encoder: Backbone, views: cfg.Views) -> Scored:
    k, temperature = each.config.neighbours
    if each.several:
        config = each.config.model_copy(update={"views": views})
        sides = multilabel.sides_of(config, setting, encoder)
        logits, decay = multilabel.linear(sides, setting.seed)
        found = [multilabel.means(one, sides)[0] for one in (multilabel.knn(sides, k, temperature), logits)]
        knn, linear = (means[each.measure] for means in found)
        sizes = len(sides.classes), len(sides.labels), len(sides.test_labels)
        return Scored(name, each.measure, *sizes, knn, linear, decay)
    bank, labels, tests, answers = _labelled_features(each, setting, encoder, views)
    judge: Callable[..., float] = getattr(precision, each.measure)

    def measure(scores: Tensor, labels: Tensor) -> float:
        return judge(scores.cpu().numpy(), labels.cpu().numpy())

    classes = 1 + int(max(labels.max(), answers.max()))
    shown = torch.nn.functional.one_hot(labels, classes).bool()
    votes = knn_votes(bank, shown, tests, k, temperature)
    fitted = fit_logistic(bank, labels, classes, measure, setting.seed)
    scores = measure(votes, answers), measure(fitted(tests), answers)
    return Scored(name, each.measure, classes, len(labels), len(answers), *scores, fitted.decay)


def _labelled_features(
    each: LabelledSet, setting: Setting, encoder: Backbone, views: cfg.Views
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (N, D) and labels (N,) of both sides, without images that have no label or cannot be read."""
    parts = []
    for side, index in zip(("training", "test"), open_set(each, setting.seed), strict=True):
        found, rows = multilabel.features_of(setting, views, encoder, index)
        labels = index.labels[rows]
        if not (labels >= 0).any():
            raise ValueError(
                f"no {side} image has a label; name labelled folders by data.path and data.eval_val"
            )
        known = torch.from_numpy(np.flatnonzero(labels >= 0)).to(found.device)
        parts += [found[known], torch.from_numpy(labels).long().to(found.device)[known]]
    return parts[0], parts[1], parts[2], parts[3]


def mean_of(rows: Sequence[Scored]) -> Scored:
    """The means over the sets that were measured, each in its own measure."""
    found = [row for row in rows if not row.missing]
    if not found:
        told = "; ".join(f"{row.set}: {row.missing}" for row in rows)
        raise ValueError(f"none of {len(rows)} sets is on disk ({told}); correct their folders")
    kinds = ([getattr(row, name) for row in found] for name in ("knn", "linear"))
    knn, linear = (statistics.fmean(values) for values in kinds)
    return Scored(f"mean of {len(found)} of {len(rows)} sets", "", knn=knn, linear=linear)


def table(rows: Sequence[Scored]) -> str:
    """The rows and their mean as Markdown aligned for a terminal, in per cent, and why sets are missing."""
    found = [row for row in rows if not row.missing]
    grid = [["set", "classes", "train", "test", "measure", "kNN %", "linear %"]]
    for row in [*found, mean_of(rows)]:
        sizes = ["" if size is None else str(size) for size in (row.classes, row.train, row.test)]
        scores = [f"{100 * score:.2f}" for score in (row.knn, row.linear) if score is not None]
        grid.append([row.set, *sizes, _NAMES.get(row.measure, ""), *scores])
    gone = [f"{row.set} is left out: {row.missing}" for row in rows if row.missing]
    return "\n".join([*aligned(grid), *([""] if gone else []), *gone])


def as_csv(rows: Sequence[Scored]) -> str:
    """A line for each set, without the mean."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Scored)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
