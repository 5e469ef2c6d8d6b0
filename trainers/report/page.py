"""report.html in a run's folder: what the run is, how it went and what came out, on one page.

Made of the files that the run leaves, while it goes on, when it has ended, or when it was killed; neither the
images nor the checkpoint are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from dali_views import bad_list
from dali_views.system.files import atomic_write
from dali_views.tools.web_page import document, escape, fitted, jpeg_uri

from .. import config as cfg
from ..config import file as config_file
from . import samples as run_samples
from .curves import CHARTS, MOST_POINTS, Curve, curves_of, draw
from .files import CONFIG, EVALUATIONS, HISTORY, METRICS, PAGE, PICTURES, QUARANTINE
from .history import lines_of

__all__ = ["PAGE", "State", "state_of", "write"]

_LISTED = 50  # bad images, evaluations, starts
_PICTURE = (1400, 400_000)  # pixels and bytes of the latest picture
_NAMES = {
    "simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "dino": "DINO", "scfs": "SCFS",
    "contrastive_crop": "ContrastiveCrop", "online_crop": "ContrastiveCrop without a pass",
    "simccrop": "SimCCrop", "saliency": "salient regions", "semantic_pairs": "semantic pairs",
    "true_boxes": "true boxes", "none": "no guide",
}  # fmt: skip
_TILES = {
    "loss": ("loss", ".3f"), "knn_top1": ("kNN top-1", ".1%"), "iou": ("IoU", ".1%"),
    "corloc": ("CorLoc", ".1%"), "images_per_second": ("images/s", ",.0f"), "wait_share": ("stall", ".1%"),
}  # fmt: skip
_STYLE = """
.tiles { --least: 150px; margin: 14px 0 } .tiles b { font-size: 22px; font-weight: 600; display: block }
.state { display: inline-block; padding: 1px 10px; border: 1px solid; border-radius: 99px; font-size: 13px }
.good { color: var(--good) } .bad { color: var(--bad) } .busy { color: var(--busy) }
.charts { --least: 340px; align-items: stretch }
.chart svg { width: 100%; height: auto; display: block; color: var(--quiet) }
.chart svg text { font-family: inherit }
.chart .legend i { background: none }
.small-multiples { --least: 190px }
.pairs { --least: 340px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px }
.files td:first-child { overflow-wrap: anywhere; min-width: 140px }
.wide img { display: block; max-width: none }
@media (max-width: 640px) { .small-multiples { --least: 160px } }
"""


@dataclass(frozen=True)
class State:
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
    parts: list[Callable[[], Iterator[str]]] = [
        lambda: _headline(folder, config, curves),
        lambda: _curves(curves, config),
        lambda: run_samples.followed(folder, config),
        lambda: run_samples.localised(folder),
        lambda: run_samples.pairs(folder, config),
        lambda: _latest_picture(folder),
        lambda: _evaluations(folder),
        lambda: _bad_files(folder / QUARANTINE, "Images that could not be read", leave_out=True),
        lambda: _bad_files(folder / HISTORY / "left_out.txt", "Files that the index left out"),
        lambda: _details(folder, text),
    ]
    body: list[str] = []
    for part in parts:
        try:
            body += part()
        except Exception as error:  # a damaged file raises whatever its content leads to
            told = f"A part is missing here, for a file of it is damaged: {type(error).__name__}: {error}"
            body.append(f'<p class="quiet">{escape(told)}</p>')
    with atomic_write(folder / PAGE) as file:
        file.write(document(f"{folder.resolve().name}: report", body, _STYLE).encode())
    return folder / PAGE


def state_of(folder: Path) -> State:
    """Whether a run has finished, was stopped, failed, or has left no word of its end."""
    events = lines_of(folder / HISTORY / "events.jsonl")
    metrics = folder / METRICS
    step = max(
        [event["step"] for event in events[-1:]] + [line["step"] for line in lines_of(metrics)[-1:]] + [0]
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
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(metrics.stat().st_mtime))
    return State("busy", f"no end noted: still going, or killed; {taken} noted, the last at {when}")


def _headline(folder: Path, config: cfg.Config | None, curves: dict[str, Curve]) -> Iterator[str]:
    state, start = state_of(folder), _start(folder)
    yield f"<h1>{escape(folder.resolve().name)}</h1>"
    told = []
    if config is not None:
        told = [_named(config.method.name), _guide(config), config.model.backbone, _views(config.views)]
        told.append(f"{config.data.kind} {config.data.path}")
    if start:
        told.append(f"{start.get('images', 0)} images")
        count = start.get("classes") or 0
        told += [f"{count} {'class' if count == 1 else 'classes'}"] if count else []
        told += [f"{start['true_boxes']} true boxes"] if start.get("true_boxes") else []
    yield f"<p>{escape(' · '.join(told))}</p>"
    yield f'<p><span class="state {state.kind}">{escape(state.told)}</span></p>'
    tiles = []
    for name, (title, unit) in _TILES.items():
        if name not in curves:
            continue
        known = curves[name][1][np.isfinite(curves[name][1])]
        value, small = known[-1], f"at first {known[0]:{unit}}"
        if name in ("images_per_second", "wait_share"):  # which go up and down
            value, small = np.median(known), "median"
        tiles.append(f'<div class="card">{title}<b>{value:{unit}}</b><small>{small}</small></div>')
    if tiles:
        yield f'<div class="grid tiles">{"".join(tiles)}</div>'


def _curves(curves: dict[str, Curve], config: cfg.Config | None) -> Iterator[str]:
    yield "<h2>Curves</h2>"
    drawn = [chart for chart in (draw(chart, curves) for chart in CHARTS) if chart]
    if not drawn:
        yield '<p class="quiet">Nothing has been noted yet: run.log_every says after how many steps.</p>'
        return
    longest = max(len(x) for x, _ in curves.values())
    if longest > MOST_POINTS:
        yield '<p class="quiet">Lines are means of stretches, bands their least and greatest values.</p>'
    missing = []
    if "knn_top1" not in curves and "iou" not in curves:
        never = config is not None and config.run.evaluate_every == 0
        missing.append(
            "no evaluations (run.evaluate_every is 0)"
            if never
            else "no evaluations yet, or no labels and boxes"
        )
    elif "knn_top1" not in curves:
        missing.append("no kNN (it needs labels: data.eval_train and data.eval_val)")
    elif "iou" not in curves:
        missing.append("no IoU and CorLoc (they need true boxes: data.boxes or data.instances)")
    if missing:
        yield f'<p class="quiet">There are {escape(", ".join(missing))}.</p>'
    yield f'<div class="grid charts">{"".join(drawn)}</div>'


def _latest_picture(folder: Path) -> Iterator[str]:
    pictures = sorted((folder / PICTURES).glob("epoch-*.png"))
    if not pictures:
        return
    try:
        pixels = np.asarray(Image.open(pictures[-1]).convert("RGB"))
    except (OSError, ValueError):
        return
    small = fitted(pixels, max(_PICTURE[0], 2 * min(pixels.shape[:2])))
    yield "<h2>Views of the latest evaluation</h2>"
    yield f'<p class="quiet">{escape(pictures[-1].name)}; earlier ones are in the folder {PICTURES}.</p>'
    uri = jpeg_uri(small, _PICTURE[1])
    yield f'<div class="card wide"><img src="{uri}" alt="images with boxes, heatmaps and views"></div>'


def _evaluations(folder: Path) -> Iterator[str]:
    lines = lines_of(folder / EVALUATIONS)[-_LISTED:]
    if not lines:
        return
    yield "<h2>Evaluations</h2>"
    rows = []
    for line in lines:
        rest = {k: v for k, v in line.items() if k not in ("evaluation", "encoder", "step", "overrides")}
        told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
        rows.append([line.get("evaluation", ""), line.get("encoder", ""), line["step"], told])
    yield _table(["evaluation", "encoder", "step", "found"], rows)


def _bad_files(file: Path, title: str, leave_out: bool = False) -> Iterator[str]:
    try:
        bad = bad_list.load(file)
    except OSError:
        return
    if not bad:
        return
    yield f"<h2>{title}: {len(bad)}</h2>"
    if leave_out:
        yield f'<p class="quiet">{escape(f"data.leave_out={file} leaves them out of the next run.")}</p>'
    yield _table(["file", "reason"], list(bad.items())[:_LISTED], "files")
    if len(bad) > _LISTED:
        yield f'<p class="quiet">and {len(bad) - _LISTED} more in {file.name}</p>'


def _details(folder: Path, text: str) -> Iterator[str]:
    yield "<h2>Machine and configuration</h2>"
    events = lines_of(folder / HISTORY / "events.jsonl")[-_LISTED:]
    noted = []
    for event in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
        processes = int(event.get("processes", 1))
        told = f"{processes} process{'es' if processes > 1 else ''} on {event.get('machine', '')}"
        head = f"<b>{escape(event.get('event', ''))}</b> at step {event['step']:,}, {when}"
        noted.append(f'<p>{head}<br><span class="quiet">{escape(event.get("how") or told)}</span></p>')
    if noted:
        yield f'<div class="card">{"".join(noted)}</div>'
    lines = "\n".join(escape(line) for line in text.splitlines())
    yield f'<details class="card"><summary>Resolved configuration</summary><pre>{lines}</pre></details>'


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card wide {kind}"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _start(folder: Path) -> dict[str, Any]:
    events = lines_of(folder / HISTORY / "events.jsonl")
    return next((event for event in events[::-1] if event.get("event") == "start"), {})


def _named(name: str) -> str:
    return _NAMES.get(name, name)


def _guide(config: cfg.Config) -> str:
    names = [config.guide.name]
    if isinstance(config.guide, cfg.SemanticPairs) and config.box_guide.name != "none":
        names.append(config.box_guide.name)
    return " and ".join(_named(name) for name in names)


def _views(views: cfg.Views) -> str:
    return f"{views.name} views of {views.size} px, {views.crop} crops"
