"""report.html in a run's folder: what the run is, how it went and what came out, on one page.

It is made of the files that the run leaves, while it goes on, when it has ended or when it was killed;
neither images nor a checkpoint are needed. The template is `report.html`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from dali_views import bad_list
from dali_views.system.files import atomic_write
from dali_views.tools.page import render

from ..config import file as config_file
from ..guides.guide import outlook
from . import CONFIG, EVALUATIONS, HISTORY, METRICS, PAGE, PICTURES, QUARANTINE, history
from .curves import CHARTS, Curve, curves_of, draw

__all__ = ["State", "state_of", "write"]

_TILES = {
    "loss": ("loss", ".3f"), "knn_top1": ("kNN top-1", ".1%"), "iou": ("IoU", ".1%"),
    "corloc": ("CorLoc", ".1%"), "images_per_second": ("images/s", ",.0f"), "wait_share": ("stall", ".1%"),
}  # fmt: skip


class State(NamedTuple):
    """Where a run stands."""

    kind: Literal["good", "bad", "busy"]
    told: str


def write(folder: Path) -> Path:
    """Write the page of the run in `folder`, in one step; its path.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
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
        name=folder.resolve().name, text=text, config=config, state=state_of(folder), when=_when,
        events=history.lines_of(folder / HISTORY / "events.jsonl"), tiles=_tiles(curves), curves=curves,
        outlook="" if config is None else outlook(config),
        charts=lambda: [drawn for chart in CHARTS if (drawn := draw(chart, curves))],
        pictures=sorted((folder / PICTURES).glob("epoch-*.png")), opened=Image.open,
        evaluations=history.lines_of(folder / EVALUATIONS), quarantine=folder / QUARANTINE,
        left_out=folder / HISTORY / "left_out.txt",
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


def state_of(folder: Path) -> State:
    """Whether a run has finished, was stopped, failed, or left no record of its end."""
    events, metrics = history.lines_of(folder / HISTORY / "events.jsonl"), folder / METRICS
    step = max(
        [line["step"] for lines in (events, history.lines_of(metrics)) for line in lines[-1:]], default=0
    )
    total = next((event["steps"] for event in events[::-1] if "steps" in event), None)
    taken = f"{step:,}{f' of {total:,}' if total else ''} steps"
    if events and events[-1].get("event") == "end":
        how = str(events[-1].get("how", ""))
        if how == "finished":
            return State("good", f"finished after {step:,} steps")
        return State("bad" if how.startswith("failed") else "busy", f"{how} after {taken}")
    if not metrics.is_file():
        return State("busy", f"no steps noted yet ({taken})")
    last = _when(metrics.stat().st_mtime)
    return State("busy", f"no end noted: still going, or killed; {taken} noted, the last at {last}")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _tiles(curves: Mapping[str, Curve]) -> list[tuple[str, str, str]]:
    """Title, value and remark of each number on top of the page."""
    tiles = []
    for name, (title, unit) in _TILES.items():
        if name in curves:
            known = curves[name][1][np.isfinite(curves[name][1])]
            value, remark = known[-1], f"at first {known[0]:{unit}}"
            if name in ("images_per_second", "wait_share"):  # these go up and down
                value, remark = np.median(known), "median"
            tiles.append((title, f"{value:{unit}}", remark))
    return tiles
