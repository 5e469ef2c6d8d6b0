"""What a comparison found: runs in rows, their statistics over seeds, and all of it in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "LOCALISED", "Row", "Run", "aligned", "difference", "mean_and_deviation", "paired", "score",
    "standard_error", "table",
]  # fmt: skip

_SCORES = {
    "knn_top1": "kNN top-1 %", "linear_top1": "linear top-1 %", "map": "mAP %", "transfer": "transfer %",
    "box_ap": "box AP %", "mask_ap": "mask AP %", "iou": "IoU", "corloc": "CorLoc %",
}  # fmt: skip
_COSTS = {"seconds": "seconds", "images_per_second": "images/s", "extra_passes": "extra passes"}
_GUIDE = {"guide_iou": "guide's IoU", "guide_area": "guide's area"}
_COLUMNS = {**_SCORES, "box_area": "box area", **_GUIDE, **_COSTS}
LOCALISED = ("iou", "corloc", "box_area")
"""Measures that depend on how boxes are read."""


@dataclass(frozen=True)
class Run:
    """One configuration with one seed: a line of compare.csv. None is what was not measured."""

    config: str  # its name in the table
    seed: int
    step: int | None = None  # optimiser steps taken
    # Shares in [0, 1] after the last step; boxes are the encoder's, at the threshold that suits it best.
    knn_top1: float | None = None
    knn_top5: float | None = None
    linear_top1: float | None = None
    linear_top5: float | None = None
    queries: int | None = None  # images that kNN and the probe classify
    map: float | None = None  # of the classes of all objects, by logistic regression
    transfer: float | None = None  # mean of linear classifiers over labelled sets
    box_ap: float | None = None  # of a detector trained on the encoder
    mask_ap: float | None = None
    iou: float | None = None
    corloc: float | None = None
    box_area: float | None = None  # median share of the image that the box covers
    # The boxes that the guide wrote last, which crops were drawn from.
    guide_iou: float | None = None
    guide_area: float | None = None
    seconds: float | None = None  # wall clock with evaluations, up to the last checkpoint
    images_per_second: float | None = None  # median of the log
    extra_passes: int | None = None  # over the training images, by the guide
    localisation: str = ""  # how boxes are read; only scores of equal reading are compared
    budget: str = ""
    device: str = ""
    threads: int | None = None  # per process, for decoding and augmentation
    processes: int | None = None
    machine: str = ""  # where the run was trained last
    stopped: bool = False  # by a signal; the same command continues it
    failure: str = ""  # why the run, or one of its numbers, is incomplete


@dataclass(frozen=True)
class Row:
    """One configuration over its seeds: a row of the table."""

    name: str
    runs: tuple[Run, ...]
    reference: bool = False
    """Whether this is the untrained encoder."""

    def values(self, measure: str) -> dict[int, float]:
        """A measure (a field of `Run`) by seed, of the runs that have it."""
        return {run.seed: v for run in self.runs if (v := getattr(run, measure)) is not None}


def mean_and_deviation(values: Collection[float]) -> tuple[float, float | None]:
    """Mean, and sample deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """`one` minus `other` for each seed that both have.

    A seed gives both the same held-out images and initial weights, so that this noise cancels.
    """
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def standard_error(values: Collection[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return None if deviation is None else deviation / math.sqrt(len(values))


def table(rows: Sequence[Row]) -> str:
    """Rows, differences from the first configuration, and the budget, as Markdown aligned for a terminal."""
    first, *others = trained = [row for row in rows if not row.reference]
    runs = [run for row in trained for run in row.runs]
    alike = len({run.localisation for run in runs}) == 1
    columns = [measure for measure in _COLUMNS if any(row.values(measure) for row in rows)]
    judged = [measure for measure in columns if measure in _SCORES and (alike or measure not in LOCALISED)]
    queries = {run.queries for run in runs if run.queries}
    best = {measure: _best(measure, trained, max(queries, default=0)) for measure in judged}
    grid = [["", "seeds", *(_COLUMNS[measure] for measure in columns)]]
    legend = [
        "±: deviation over seeds; of a difference its standard error, paired by seed. Of two: both values.",
        "*: the best, and all that are not below it by more than the standard error of their difference.",
    ]
    if len(queries) == 1 and {"knn_top1", "linear_top1"} & set(columns):
        (count,) = queries
        legend.append(f"{count} images are classified: one is {100 / count:.2g} points.")
    for row in rows:
        failed = [f"{row.name}, seed {run.seed}: {run.failure}" for run in row.runs if run.failure]
        seeds = f"{len(row.runs) - len(failed)} of {len(row.runs)}" if failed else f"{len(row.runs)}"
        grid.append([row.name, seeds, *(_cell(measure, row, best) for measure in columns)])
        legend += failed
    for row in others:
        pairs = {measure: paired(row.values(measure), first.values(measure)) for measure in judged}
        cells = [difference(measure, pair) if (pair := pairs.get(measure)) else "" for measure in columns]
        if any(cells):
            grid.append([f"{row.name} - {first.name}", f"{max(map(len, pairs.values()))}", *cells])
    if not alike and not set(columns).isdisjoint(LOCALISED):
        told = "; ".join(dict.fromkeys(f"{run.config} {run.localisation}" for run in runs))
        legend.append(f"Boxes are read off differently, so that their scores do not compare: {told}.")
    budgets = {run.budget for run in runs}
    legend.append(f"Budget: {budgets.pop()}." if len(budgets) == 1 else "Budgets differ, see compare.csv.")
    return "\n".join([*aligned(grid), "", *legend])


def aligned(grid: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned; the first line of cells is its head."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rest = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in grid]
    return [f"| {' | '.join(line)} |" for line in (rest[0], rule, *rest[1:])]


def _best(measure: str, rows: Sequence[Row], queries: int) -> set[str]:
    """The names of the best row and of those that are below it by at most the standard error of their
    difference, or by one of the images that are classified. Empty if there is nothing to compare."""
    known = {row.name: values for row in rows if (values := row.values(measure))}
    if len(known) < 2:
        return set()
    first = max(known, key=lambda name: statistics.fmean(known[name].values()))
    one = 1 / queries if queries and measure in ("knn_top1", "linear_top1") else 0.0
    best = {first}
    for name, values in known.items():
        behind = paired(known[first], values)
        if behind and statistics.fmean(behind) <= max(standard_error(behind) or 0.0, one) + 1e-12:
            best.add(name)
    return best


def _cell(measure: str, row: Row, best: Mapping[str, set[str]]) -> str:
    values = row.values(measure).values()
    if not values:
        return "-"
    if measure in _COSTS:
        return f"{statistics.fmean(values):.0f}"
    return score(measure, values) + "*" * (row.name in best.get(measure, ()))


def score(measure: str, values: Collection[float]) -> str:
    """The mean of a score over seeds with their deviation, or both of two; accuracies in percent."""
    return _told(measure, values, mean_and_deviation(values)[1], "")


def difference(measure: str, values: Collection[float]) -> str:
    """The mean of differences `paired` by seed with its standard error, or both of two, in points."""
    return _told(measure, values, standard_error(values), "+")


def _told(measure: str, values: Collection[float], spread: float | None, sign: str) -> str:
    factor, digits = (1, 3) if measure.endswith(("iou", "area")) else (100, 2)
    told = [f"{factor * value:{sign}.{digits}f}" for value in (statistics.fmean(values), *values)]
    if spread is None:
        return told[0]
    if len(values) == 2:  # two say little of an error: it may be 0 by chance
        return f"{told[0]} ({told[1]}, {told[2]})"
    least = 10.0**-digits
    return f"{told[0]} ± " + (
        f"{factor * spread:.{digits}f}" if factor * spread >= least / 2 else f"<{least:g}"
    )
