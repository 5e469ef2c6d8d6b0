"""Linear SVMs on frozen features, as VOC 2007's classification is measured (arXiv 1905.01235, section 4.1).

As in the authors' code (facebookresearch/fair_self_supervision_benchmark): an SVM for each class on features
of length 1, with squared hinge loss and twice the weight for images that show the class, whose cost is chosen
by the average precision of a 3-fold cross-validation; average precision as `map_voc`. Training takes images
of difficult objects alone as not showing the class; tests, and training with few images, leave them out.

Training with few images takes k that show the class and (C - 1) k that do not. Here its costs are those of
the whole training set. The authors take one cost for all classes, the best on the test images, so that their
figures are optimistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .precision import precisions

if TYPE_CHECKING:  # so that the processes that train SVMs load neither torch nor DALI
    from .multilabel import Sides

__all__ = ["COSTS", "Scores", "support_vectors"]

COSTS = (*(10.0**power for power in range(-7, -1)), *(2.0**power for power in range(-19, -3)))
_FOLDS = 3
_STREAM = 0x5A07  # sets the draws of few images apart from others of the seed


class Scores(NamedTuple):
    """What the SVMs of C classes found."""

    whole: NDArray[np.float64]  # (C, 3) average precisions, see `precision`, of training with all images
    few: NDArray[np.float64]  # (K, draws, C, 3) of training with few
    costs: NDArray[np.float64]  # (C,) as chosen


def support_vectors(sides: Sides, shots: Sequence[int], draws: int, seed: int, jobs: int) -> Scores:
    """Train and test the SVMs.

    Args:
        shots: K numbers of images that show a class.
        draws: how often each number is drawn; a larger number includes a smaller one's images.
        jobs: processes.

    Raises:
        ValueError: scikit-learn is not installed, or a class has too few images for 3 folds or for `shots`.
    """
    try:
        from joblib import Parallel, delayed
    except ImportError:
        raise ValueError("SVMs need scikit-learn; pip install 'dali-views[transfer]'") from None
    shown = sides.labels == 1
    for count, most, what in (
        (shown.sum(0), max(_FOLDS, *shots, 0), ""),
        ((~shown).sum(0), _FOLDS, "do not "),
    ):
        if count.min() < most:
            raise ValueError(
                f"only {count.min()} training images {what}show {sides.classes[count.argmin()]}, and {most} "
                f"are needed, {_FOLDS} for cross-validation and as many as --shots; name more or lower it"
            )
    classes = shown.shape[1]
    features, tests = (_unit(part.cpu().numpy()) for part in (sides.features, sides.test_features))
    work = (
        delayed(_one_class)(
            features, sides.labels[:, place], tests, sides.test_labels[:, place], shots,
            [np.random.default_rng([seed, _STREAM, draw, place]) for draw in range(draws)], classes,
        )
        for place in range(classes)
    )  # fmt: skip
    found: list[tuple[Any, Any, float]] = Parallel(n_jobs=min(jobs, classes))(work)
    whole, few, costs = zip(*found, strict=True)
    return Scores(np.stack(whole), np.stack(few, axis=2), np.array(costs))


def _unit(features: NDArray[np.float32]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: NDArray[np.float64] = np.asarray(features, np.float64) / (lengths + 1e-5)
    return unit


def _one_class(
    features: NDArray[np.float64], labels: NDArray[np.int8], tests: NDArray[np.float64],
    test_labels: NDArray[np.int8], shots: Sequence[int], draws: Iterable[np.random.Generator], classes: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:  # fmt: skip
    """(3,) of all images, (K, draws, 3) of few, and the cost."""
    from sklearn.model_selection import cross_val_score

    target = np.where(labels == 1, 1, -1)
    folds = [
        cross_val_score(_svm(c), features, target, cv=_FOLDS, scoring="average_precision") for c in COSTS
    ]
    cost = COSTS[int(np.mean(folds, axis=1).argmax())]

    def tested(rows: NDArray[Any]) -> NDArray[np.float64]:
        scores = _svm(cost).fit(features[rows], target[rows]).decision_function(tests)
        return np.asarray(precisions(scores[:, None], test_labels[:, None])[0])

    few = np.zeros((len(shots), 0, 3))
    for draw in draws:
        shown, others = (draw.permutation(np.flatnonzero(labels == value)) for value in (1, 0))
        each = [tested(np.concatenate([shown[:k], others[: max(1, classes - 1) * k]])) for k in shots]
        few = np.concatenate([few, np.array(each).reshape(-1, 1, 3)], axis=1)
    return tested(np.arange(len(target))), few, cost


def _svm(cost: float) -> Any:
    from sklearn.svm import LinearSVC

    # Primal or dual, whichever is smaller: both have the same solution, and the authors' code the dual.
    weights = {1: 2, -1: 1}
    return LinearSVC(C=cost, class_weight=weights, dual="auto", tol=1e-4, max_iter=2000, random_state=0)
