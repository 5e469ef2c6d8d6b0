"""Curves of a run, as drawings that a page holds: whatever their length, whatever is missing in them."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_views.tools.web_page import escape, legend

from .history import lines_of

__all__ = ["CHARTS", "MOST_POINTS", "Chart", "Curve", "curves_of", "draw", "thinned"]

Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps (n,), ascending, and values (n,), NaN where a value is no finite number."""

MOST_POINTS = 300  # drawn of a curve, which is more than a chart has pixels for
_BLUE, _ORANGE, _GREEN, _PURPLE = "#3b82f6", "#e8710a", "#16a34a", "#a855f7"
# Two colours that the page's own take the place of, so that a drawing suits light and dark pages.
_INK, _LINE = "#010203", "#040506"
_FRAME = (0.19, 0.2, 0.78, 0.76)  # left, bottom, width, height: laying it out would take half of the time
_INCHES = (4.5, 2.4)  # at 72 pixels to the inch about the width of a card, so that letters keep their size


@dataclass(frozen=True)
class Chart:
    """One chart of curves that share a unit."""

    title: str
    lines: dict[str, str]
    """What each key of metrics.jsonl is called."""
    share: bool = False
    """Whether values are shares, told in per cent."""
    low: float | None = 0.0
    """Where the axis begins at most; None: wherever the values do."""
    unless_zero: bool = False
    """Whether curves that are zero throughout are left out."""


CHARTS = (
    Chart("Loss", {"loss": "loss"}, low=None),
    Chart("Spread of the embeddings (1: all directions alike, 0: collapsed)", {"embedding_std": "spread"}),
    Chart("Effective rank of the embeddings", {"embedding_rank": "rank"}),
    Chart("kNN accuracy", {"knn_top1": "top-1", "knn_top5": "top-5"}, share=True),
    Chart(
        "IoU with true boxes",
        {"iou": "evaluation, best threshold", "guide_iou": "boxes that guide"},
        share=True,
    ),
    Chart(
        "CorLoc (IoU at least 0.5)",
        {"corloc": "evaluation, best threshold", "guide_corloc": "boxes that guide"},
        share=True,
    ),
    Chart(
        "Box area, share of the image",
        {
            "guide_area_median": "median",
            "guide_area_low": "10 % are below",
            "guide_area_high": "10 % are above",
            "box_area": "evaluation",
        },
        share=True,
    ),
    Chart(
        "What the guide changes",
        {
            "guide_moved": "boxes moved (1 - IoU)",
            "guide_whole": "boxes of the whole image",
            "guide_paired": "samples paired",
            "guide_weight_entropy": "entropy of weights",
        },
        share=True,
        unless_zero=True,
    ),
    Chart("Epochs since boxes were written", {"guide_stale": "mean"}, unless_zero=True),
    Chart("Stall: share of time spent waiting for images", {"wait_share": "waited"}, share=True),
    Chart("Images per second, all processes", {"images_per_second": "images/s"}),
    Chart("Learning rate", {"lr": "lr"}),
    Chart("Images that could not be read", {"bad_images": "images"}, unless_zero=True),
    Chart("Seconds spent on exchanging boxes", {"sync_seconds": "since the last pass"}, unless_zero=True),
)


def curves_of(metrics: Path) -> dict[str, Curve]:
    """The curves in a run's metrics.jsonl by name, without those that never have a finite value."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines_of(metrics):
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    curves = {}
    for name, (steps, values) in found.items():
        x, y = np.array(steps, np.float64), np.array(values, np.float64)
        order = np.argsort(x, kind="stable")
        if np.isfinite(y).any():
            curves[name] = (x[order], np.where(np.isfinite(y), y, np.nan)[order])
    return curves


def thinned(curve: Curve, most: int = MOST_POINTS) -> tuple[NDArray[np.float64], ...]:
    """Steps, means, least and greatest values (m,) of at most `most` stretches of a curve, each of as many
    lines; of what is no number the rest of its stretch stands, or NaN."""
    x, y = curve
    if len(x) <= most:
        return x, y, y, y
    starts = np.linspace(0, len(x), most, endpoint=False).astype(int)
    known = np.isfinite(y)
    counts = np.add.reduceat(known, starts)
    empty = np.where(counts > 0, 0.0, np.nan)
    means = np.add.reduceat(np.where(known, y, 0.0), starts) / np.maximum(counts, 1) + empty
    low = np.minimum.reduceat(np.where(known, y, np.inf), starts) + empty
    high = np.maximum.reduceat(np.where(known, y, -np.inf), starts) + empty
    return np.add.reduceat(x, starts) / np.diff([*starts, len(x)]), means, low, high


def draw(chart: Chart, curves: dict[str, Curve]) -> str:
    """The chart as HTML, with its title, legend and last values; "" if there is nothing to draw."""
    shown = {key: curves[key] for key in chart.lines if key in curves}
    if chart.unless_zero:
        shown = {key: curve for key, curve in shown.items() if np.nanmax(np.abs(curve[1])) > 0}
    if not shown:
        return ""
    colours = dict(zip(chart.lines, (_BLUE, _ORANGE, _GREEN, _PURPLE), strict=False))
    last = {key: y[np.isfinite(y)][-1] for key, (_, y) in shown.items()}
    entries = [
        (f"{chart.lines[key]}: {_told(chart, value)}", colours[key], "strong") for key, value in last.items()
    ]
    broken = sum(int(np.isnan(y).sum()) for _, y in shown.values())
    note = f'<p class="quiet">{broken} values are no finite numbers and missing here.</p>' if broken else ""
    return (
        f'<figure class="card chart"><h3>{escape(chart.title)}</h3>{legend(entries)}'
        f"{_svg(chart, shown, colours)}{note}</figure>"
    )


def _told(chart: Chart, value: float) -> str:
    return f"{value:.1%}" if chart.share else f"{value:.4g}"


def _svg(chart: Chart, shown: dict[str, Curve], colours: dict[str, str]) -> str:
    """The drawing alone."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

    style = {
        "svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 12, "text.color": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _LINE, "axes.labelcolor": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "xtick.major.size": 0, "ytick.major.size": 0,
        "axes.grid": True, "grid.color": _LINE, "grid.linewidth": 0.8, "lines.linewidth": 1.8,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_INCHES, dpi=72)
        axes = figure.add_axes(_FRAME)
        for key, curve in shown.items():
            x, mean, low, high = thinned(curve)
            if len(x) < len(curve[0]):
                axes.fill_between(x, low, high, color=colours[key], alpha=0.25, linewidth=0)
            # A value between two gaps, and a single one, is a point without a line.
            axes.plot(x, mean, color=colours[key], marker="o", markersize=4 if len(x) <= 40 else 0)
            alone = _alone(mean)
            axes.plot(x[alone], mean[alone], "o", color=colours[key], markersize=4)
        if chart.low is not None:
            axes.set_ylim(bottom=min(chart.low, axes.get_ylim()[0]) if _negative(shown) else chart.low)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        eng = EngFormatter(sep="")
        axes.xaxis.set_major_formatter(eng)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if chart.share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        else:
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda y, _: f"{y:.4g}" if abs(y) < 10_000 else eng(y))
            )
        axes.set_xlabel("step")
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    return _inline(file.getvalue(), chart.title)


def _inline(svg: str, title: str) -> str:
    """A drawing as part of a page: no header, no names of other documents, the page's own colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")])
        + svg[svg.index(">") :]
    )
    prefix = re.sub(r"\W+", "-", title)  # names within a drawing would be those of the others, too
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"""font: ([\d.]+px) [^;"]*""", r"font-size: \1", svg)
    svg = svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _alone(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) which values have no neighbour that is a number."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return np.asarray(known[1:-1] & ~known[:-2] & ~known[2:])


def _negative(shown: dict[str, Curve]) -> bool:
    return any(np.nanmin(y) < 0 for _, y in shown.values())
