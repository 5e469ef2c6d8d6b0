"""Curves of a run as drawings for its page, whatever their length and whatever is missing in them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_views.tools.sample import Outline

from .history import lines_of

Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps (n,), ascending, and values (n,), NaN where a value is not a finite number."""

MOST_POINTS = 300  # drawn of a curve, more than a chart has pixels for
_COLOURS = ("#3b82f6", "#e8710a", "#16a34a", "#a855f7")
LEFT, TOP, RIGHT, BOTTOM = 58, 7, 308, 138  # of the axes, in a drawing of 324 x 173 pixels


class Chart(NamedTuple):
    """Curves that share a unit: key of metrics.jsonl, name in the legend."""

    title: str
    lines: dict[str, str]
    share: bool = False  # shown in per cent
    unless_zero: bool = False  # leave out curves that are zero throughout


CHARTS = (
    Chart("Loss", {"loss": "loss"}),
    Chart("Spread of the embeddings (1: all directions alike, 0: collapsed)", {"embedding_std": "spread"}),
    Chart("Effective rank of the embeddings", {"embedding_rank": "rank"}),
    Chart("kNN accuracy", {"knn_top1": "top-1", "knn_top5": "top-5"}, share=True),
    Chart("IoU with true boxes",
          {"iou": "evaluation, best threshold", "guide_iou": "boxes that guide"}, share=True),
    Chart("CorLoc (IoU at least 0.5)",
          {"corloc": "evaluation, best threshold", "guide_corloc": "boxes that guide"}, share=True),
    Chart("Box area, share of the image",
          {"guide_area_median": "median", "guide_area_low": "10 % are below",
           "guide_area_high": "10 % are above", "box_area": "evaluation"}, share=True),
    Chart("What the guide changes",
          {"guide_moved": "boxes moved (1 - IoU)", "guide_whole": "boxes of the whole image",
           "guide_paired": "samples paired", "guide_weight_entropy": "entropy of weights"}, True, True),
    Chart("Epochs since boxes were written", {"guide_stale": "mean"}, unless_zero=True),
    Chart("Stall: share of time spent waiting for images", {"wait_share": "waited"}, share=True),
    Chart("Images per second, all processes", {"images_per_second": "images/s"}),
    Chart("Learning rate", {"lr": "lr"}),
    Chart("Images that could not be read", {"bad_images": "images"}, unless_zero=True),
    Chart("Seconds spent on exchanging boxes", {"sync_seconds": "since the last pass"}, unless_zero=True),
)  # fmt: skip


def curves_of(metrics: Path) -> dict[str, Curve]:
    """The curves in a run's metrics.jsonl by name, without those that never have a finite value."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in sorted(lines_of(metrics), key=lambda line: line["step"]):
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                found.setdefault(name, []).append((line["step"], value))
    arrays = {name: np.array(points, np.float64).T for name, points in found.items()}
    finite = {name: (x, np.where(np.isfinite(y), y, np.nan)) for name, (x, y) in arrays.items()}
    return {name: curve for name, curve in finite.items() if not np.isnan(curve[1]).all()}


def thinned(curve: Curve, most: int = MOST_POINTS) -> tuple[NDArray[np.float64], ...]:
    """Mean steps and mean, least and greatest values (m,) of at most `most` equal parts of a curve.

    Missing values do not count; a part without any value is NaN.
    """
    x, y = curve
    if len(x) <= most:
        return x, y, y, y
    steps, parts = np.array_split(x, most), np.array_split(y, most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of parts without a value
        rows = [
            (s.mean(), np.nanmean(p), np.nanmin(p), np.nanmax(p)) for s, p in zip(steps, parts, strict=True)
        ]
    return tuple(np.array(rows).T)


def draw(chart: Chart, curves: dict[str, Curve]) -> dict[str, Any] | None:
    """The chart for the template, in pixels, with the last values in its legend; None if it is empty."""
    shown = {key: curves[key] for key in chart.lines if key in curves}
    if chart.unless_zero:
        shown = {key: curve for key, curve in shown.items() if np.nanmax(np.abs(curve[1])) > 0}
    if not shown:
        return None
    steps, values = (np.concatenate([curve[part] for curve in shown.values()]) for part in (0, 1))
    left, right, low, high = steps.min(), steps.max(), np.nanmin(values), np.nanmax(values)
    low = low if "loss" in shown else min(0.0, low)  # a loss is not compared to zero
    xs, ys = (left, right + 0.03 * (right - left or 1)), (low, high + 0.04 * (high - low or 1))

    def path(x: NDArray[np.float64], y: NDArray[np.float64], between: str = "L") -> str:
        points = zip(np.interp(x, xs, (LEFT, RIGHT)), np.interp(y, ys, (BOTTOM, TOP)), strict=True)
        return f"M{between.join(f'{a:.1f} {b:.1f}' for a, b in points)}"

    legend, paths, colours = [], [], dict(zip(chart.lines, _COLOURS, strict=False))
    for key, curve in shown.items():
        last, colour = curve[1][np.isfinite(curve[1])][-1], colours[key]
        told = f"{chart.lines[key]}: {last:.1%}" if chart.share else f"{chart.lines[key]}: {last:.4g}"
        legend.append(Outline((), colour, "strong", told))
        x, mean, least, most = thinned(curve)
        known = np.flatnonzero(np.isfinite(mean))
        for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):  # between gaps
            if len(x) < len(curve[0]):
                edge = np.concatenate([least[part], most[part][::-1]])
                paths.append(("band", colour, path(np.concatenate([x[part], x[part][::-1]]), edge)))
            paths.append(("line", colour, path(x[part], mean[part])))
            if len(x) <= 40 or len(part) == 1:  # a single value has no line
                paths.append(("dots", colour, path(x[part], mean[part], "h0M") + "h0"))
    return {
        "title": chart.title, "legend": legend, "missing": int(np.isnan(values).sum()), "paths": paths,
        "x": [(np.interp(x, xs, (LEFT, RIGHT)), _label(x, False)) for x in _ticks(*xs, 5, least=1)],
        "y": [(np.interp(y, ys, (BOTTOM, TOP)), _label(y, chart.share)) for y in _ticks(*ys, 4)],
    }  # fmt: skip


def _ticks(low: float, high: float, most: int, least: float = 0) -> list[float]:
    """At most `most` round numbers, evenly spaced: steps of 1, 2 or 5 times a power of ten."""
    step: float = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if high - low <= most * step * factor)
    step = max(step, least)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _label(value: float, share: bool) -> str:
    if share:
        return f"{100 * value:.4g}%"
    size, unit = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1, "")
    return f"{value / size:.4g}{unit}"
