"""report.html in a run's folder: what the run is, how it went and what came out, on one page.

It is made of the files that the run leaves, while it goes on, when it has ended or when it was killed;
neither images nor a checkpoint are needed. The template is `report.html`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from dali_views import bad_list
from dali_views.maps.boxes import CELLS, WIDE
from dali_views.system.files import atomic_write
from dali_views.tools.page import render
from dali_views.tools.sample import BOX_COLOUR, CROP_COLOURS, TRUE_COLOUR, Outline

from ..config import file as config_file
from ..guides.guide import outlook
from . import CONFIG, EVALUATIONS, HISTORY, METRICS, PAGE, PICTURES, QUARANTINE, SCORES, history

# Steps (n,), ascending, and values (n,), NaN where a value is not a finite number.
Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
MOST_POINTS = 300  # drawn of a curve, more than a chart has pixels for
_COLOURS = ("#3b82f6", "#e8710a", "#16a34a", "#a855f7")
_MARKS = [
    Outline((), BOX_COLOUR, "dashed", "box that guides the crops"),
    Outline((), TRUE_COLOUR, "thin", "true boxes"),
    *(Outline((), colour, "strong", f"crop of view {n}") for n, colour in enumerate(CROP_COLOURS[:2])),
]
_ACROSS, _DOWN = (62, 308), (138, 7)  # of the axes, in a drawing of 324 x 173 pixels


def write(folder: Path) -> Path:
    """Write the page of the run in `folder`, in one step; its path. FileNotFoundError if there is no run."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no {CONFIG} in it; check the path")
    text = (folder / CONFIG).read_text(errors="replace")
    try:
        config = config_file.parse(text)
    except ValueError:  # of another version; all but the headline does without
        config = None
    curves = curves_of(folder / METRICS)
    page = render(
        Path(__file__).with_name("report.html"), guarded=_guarded, folder=folder, history=history,
        name=folder.resolve().name, text=text, config=config, outlook=outlook(config) if config else "",
        events=history.lines_of(folder / HISTORY / "events.jsonl"), when=datetime.fromtimestamp,
        state=state_of(folder), warning=_warning(curves), tiles=_tiles(curves), curves=curves, draw=draw,
        pictures=sorted((folder / PICTURES).glob("epoch-*.png")), opened=Image.open,
        evaluations=history.lines_of(folder / EVALUATIONS), shown=_shown, marks=_MARKS,
        quarantine=folder / QUARANTINE, left_out=folder / HISTORY / "left_out.txt",
        bad_files=lambda file: list(bad_list.load(file).items()) if file.is_file() else [],
    )  # fmt: skip
    with atomic_write(folder / PAGE) as file:
        file.write(page.encode())
    return folder / PAGE


def _guarded(section: Callable[[], Markup]) -> Markup:
    """A section of the page, or why it is missing. A damaged file may raise anything."""
    try:
        return section()
    except Exception as error:
        told = f"A part is missing here, because a file is damaged: {type(error).__name__}: {error}"
        return Markup('<p class="quiet">{}</p>').format(told)


def state_of(folder: Path) -> tuple[str, str]:
    """Where a run stands: "good", "bad" or "busy", and in words."""
    events, metrics = history.lines_of(folder / HISTORY / "events.jsonl"), folder / METRICS
    step = max((lines[-1]["step"] for lines in (events, history.lines_of(metrics)) if lines), default=0)
    total = next((event["steps"] for event in events[::-1] if "steps" in event), None)
    taken = f"{step:,}{f' of {total:,}' if total else ''} step{'s' * ((total or step) != 1)}"
    if events and events[-1].get("event") == "end":
        how = str(events[-1].get("how", ""))
        if how == "finished":
            return "good", f"finished after {step:,} step{'s' * (step != 1)}"
        return "bad" if how.startswith("failed") else "busy", f"{how} after {taken}"
    if metrics.is_file():
        taken += f" noted, the last at {datetime.fromtimestamp(metrics.stat().st_mtime):%F %T}"
    return "busy", f"no end noted: still going, or killed; {taken}"


def _tiles(curves: Mapping[str, Curve]) -> list[tuple[str, str, str]]:
    """Title, value and remark of each number on top of the page."""
    tiles = []
    for name in [name for name in SCORES if name in curves and name != "knn_top5"]:
        (title, unit), known = SCORES[name], curves[name][1][np.isfinite(curves[name][1])]
        value, remark = known[-1], f"at first {known[0]:{unit}}"
        if name in ("images_per_second", "wait_share", "gpu_wait_share"):  # these go up and down
            value, remark = np.median(known), "median"
        tiles.append((title, f"{value:{unit}}", remark))
    if {"guide_area_median", "guide_whole"} <= curves.keys():
        area, whole = (_last(curves[name]) for name in ("guide_area_median", "guide_whole"))
        tiles.append(("guide_area_median", f"{area:.1%}", f"of the image; guide_whole {whole:.1%}"))
    return tiles


def _shown(name: str, value: Any) -> str:
    """A value of an evaluation; shares and accuracies in percent."""
    if not isinstance(value, float):
        return str(value)
    share = re.search(r"top\d|iou|corloc|area|agreement|_ap", name)
    return f"{value:.1%}" if share else f"{value:.4g}"


def _warning(curves: Mapping[str, Curve]) -> str:
    """What makes the guide useless, as it wrote the region table last; empty if nothing does."""
    area, whole, cell = (
        _last(curves[f"guide_{name}"]) if f"guide_{name}" in curves else 0.0
        for name in ("area_median", "whole", "cell")
    )
    if area > WIDE:
        return (
            f"Boxes are mostly the whole image ({whole:.0%} of them are all of it; median {area:.0%}), "
            "so crops are hardly guided. Set the guide's layer to an earlier one, its size to more pixels or "
            "its threshold to auto; docs/guides.md has the reasons."
        )
    if area < CELLS * cell:
        return (
            f"Boxes are tiny (the median is {area:.1%} of the image, {area / cell:.1f} cells of the map), so "
            "they may mark noise rather than objects. Lower the guide's threshold or set its size to more "
            "pixels; docs/guides.md has the reasons."
        )
    return ""


def _last(curve: Curve) -> float:
    return float(curve[1][np.isfinite(curve[1])][-1])


def curves_of(metrics: Path) -> dict[str, Curve]:
    """The curves in a run's metrics.jsonl by name, without those that never have a finite value."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in sorted(history.lines_of(metrics), key=lambda line: line["step"]):
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                found.setdefault(name, []).append((line["step"], value))
    arrays = {name: np.array(points, np.float64).T for name, points in found.items()}
    finite = {name: (x, np.where(np.isfinite(y), y, np.nan)) for name, (x, y) in arrays.items()}
    return {name: curve for name, curve in finite.items() if not np.isnan(curve[1]).all()}


def thinned(curve: Curve, most: int = MOST_POINTS) -> tuple[NDArray[np.float64], ...]:
    """Mean steps and mean, least and greatest values (m,) of at most `most` equal parts of a curve. Missing
    values do not count; a part without any is NaN."""
    x, y = curve
    if len(x) <= most:
        return x, y, y, y
    parts = np.array_split(y, most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of parts without a value
        found = [np.array([measure(p) for p in parts]) for measure in (np.nanmean, np.nanmin, np.nanmax)]
    return np.array([part.mean() for part in np.array_split(x, most)]), *found


def draw(
    curves: Mapping[str, Curve], title: str, names: Mapping[str, str], share: bool = False, zero: bool = True
) -> dict[str, Any] | None:
    """A chart in pixels, for the template; None if there is nothing to draw.

    `names` are the legend's texts by key of metrics.jsonl; `share`: in per cent; `zero`: zero curves, too.
    """
    shown = {
        key: curves[key] for key in names if key in curves and (zero or np.nanmax(np.abs(curves[key][1])))
    }
    if not shown:
        return None
    steps, values = (np.concatenate([curve[part] for curve in shown.values()]) for part in (0, 1))
    left, right, low, high = steps.min(), steps.max(), np.nanmin(values), np.nanmax(values)
    low = low if "loss" in shown else min(0.0, low)  # a loss is not compared to zero
    xs, ys = (left, right + 0.03 * (right - left or 1)), (low, high + 0.04 * (high - low or 1))

    def path(x: NDArray[np.float64], y: NDArray[np.float64], between: str = "L") -> str:
        points = zip(np.interp(x, xs, _ACROSS), np.interp(y, ys, _DOWN), strict=True)
        return f"M{between.join(f'{a:.1f} {b:.1f}' for a, b in points)}"

    legend, paths, colours = [], [], dict(zip(names, _COLOURS, strict=False))
    for key, curve in shown.items():
        last, colour = _last(curve), colours[key]
        legend.append(Outline((), colour, "strong", f"{names[key]}: {last:{'.1%' if share else '.4g'}}"))
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
        "title": title, "legend": legend, "missing": int(np.isnan(values).sum()), "paths": paths,
        "thinned": any(kind == "band" for kind, _, _ in paths),
        "x": [(np.interp(x, xs, _ACROSS), _label(x, False)) for x in _ticks(*xs, 6, least=1)],
        "y": [(np.interp(y, ys, _DOWN), _label(y, share)) for y in _ticks(*ys, 5)],
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
