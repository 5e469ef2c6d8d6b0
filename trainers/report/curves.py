"""Curves of a run as drawings for its page, whatever their length and whatever is missing in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_views.tools.sample import Outline

from .history import lines_of

__all__ = ["CHARTS", "MOST_POINTS", "Chart", "Curve", "curves_of", "draw", "thinned"]

Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps (n,), ascending, and values (n,), NaN where a value is not a finite number."""

MOST_POINTS = 300  # drawn of a curve, more than a chart has pixels for
_COLOURS = ("#3b82f6", "#e8710a", "#16a34a", "#a855f7")
LEFT, TOP, RIGHT, BOTTOM = 58, 7, 308, 138  # of the axes, in a drawing of 324 x 173 pixels


class Chart(NamedTuple):
    """One chart of curves that share a unit."""

    title: str
    lines: dict[str, str]
    """Key of metrics.jsonl: name in the legend."""
    share: bool = False
    """Whether values are shares, shown in per cent."""
    unless_zero: bool = False
    """Whether curves that are zero throughout are left out."""


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
    for line in lines_of(metrics):
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                found.setdefault(name, []).append((line["step"], value))
    curves = {}
    for name, points in found.items():
        x, y = np.array(sorted(points, key=lambda point: point[0]), np.float64).T
        if np.isfinite(y).any():
            curves[name] = (x, np.where(np.isfinite(y), y, np.nan))
    return curves


def thinned(curve: Curve, most: int = MOST_POINTS) -> tuple[NDArray[np.float64], ...]:
    """Mean steps and mean, least and greatest values (m,) of at most `most` equal parts of a curve.

    Values that are missing do not count; a part without any is NaN.
    """
    x, y = curve
    if len(x) <= most:
        return x, y, y, y
    starts = np.linspace(0, len(x), most, endpoint=False).astype(int)
    known = np.isfinite(y)
    counts = np.add.reduceat(known, starts)
    empty = np.where(counts > 0, 0.0, np.nan)
    means = np.add.reduceat(np.where(known, y, 0.0), starts) / np.maximum(counts, 1) + empty
    low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)
    return np.add.reduceat(x, starts) / np.diff([*starts, len(x)]), means, low, high


def draw(chart: Chart, curves: dict[str, Curve]) -> dict[str, Any] | None:
    """The chart for the template: title, legend with the last values, how many values are missing, ticks
    (place, text) and paths of SVG (kind, colour, path). None if there is nothing to draw."""
    shown = {key: curves[key] for key in chart.lines if key in curves}
    if chart.unless_zero:
        shown = {key: curve for key, curve in shown.items() if np.nanmax(np.abs(curve[1])) > 0}
    if not shown:
        return None
    steps, values = (np.concatenate([curve[part] for curve in shown.values()]) for part in (0, 1))
    left, right, low, high = steps.min(), steps.max(), np.nanmin(values), np.nanmax(values)
    low = low if "loss" in shown else min(0.0, low)  # a loss is not compared to zero
    right, high = right + 0.03 * (right - left or 1), high + 0.04 * (high - low or 1)

    def across(x: Any) -> Any:
        return LEFT + (RIGHT - LEFT) * (x - left) / (right - left)

    def down(y: Any) -> Any:
        return BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low)

    def path(x: NDArray[np.float64], y: NDArray[np.float64], between: str = "L") -> str:
        points = zip(across(x), down(y), strict=True)
        return f"M{between.join(f'{a:.1f} {b:.1f}' for a, b in points)}"

    legend, paths = [], []
    for (key, name), colour in zip(chart.lines.items(), _COLOURS, strict=False):
        if key not in shown:
            continue
        last = shown[key][1][np.isfinite(shown[key][1])][-1]
        told = f"{last:.1%}" if chart.share else f"{last:.4g}"
        legend.append(Outline((), colour, "strong", f"{name}: {told}"))
        x, mean, least, most = thinned(shown[key])
        known = np.flatnonzero(np.isfinite(mean))
        for piece in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):  # between gaps
            if len(x) < len(shown[key][0]):
                there_and_back = np.concatenate([x[piece], x[piece][::-1]])
                edge = np.concatenate([least[piece], most[piece][::-1]])
                paths.append(("band", colour, path(there_and_back, edge)))
            paths.append(("line", colour, path(x[piece], mean[piece])))
            if len(x) <= 40 or len(piece) == 1:  # a single value has no line
                paths.append(("dots", colour, path(x[piece], mean[piece], "h0M") + "h0"))
    return {
        "title": chart.title, "legend": legend, "missing": int(np.isnan(values).sum()), "paths": paths,
        "thinned": any(kind == "band" for kind, _, _ in paths),
        "x": [(across(tick), _short(tick)) for tick in _ticks(left, right, 5, whole=True)],
        "y": [(down(y), f"{100 * y:.4g}%" if chart.share else _short(y)) for y in _ticks(low, high, 4)],
    }  # fmt: skip


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` round numbers, evenly spaced: steps of 1, 2 or 5 times a power of ten."""
    step: float = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if high - low <= most * step * factor)
    step = max(step, 1.0) if whole else step
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    size, letter = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1, "")
    return f"{value / size:.4g}{letter}"
