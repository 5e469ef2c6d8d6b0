"""RUN/history: what the page and TensorBoard show of a run beside its metrics, in small files.

Their size does not depend on the data set, except for its bad files; only .jsonl files grow with time.
docs/report.md lists them.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_views import RegionTable, SampleIndex, bad_list
from dali_views.system.files import append_line, atomic_write
from dali_views.tools import sample
from dali_views.tools.page import jpeg
from dali_views.tools.sample import Outline, Picture

from ..evaluate.box_scores import Localised, heaviest
from . import HISTORY

Lines: TypeAlias = list[tuple[str, list[Picture]]]  # of pictures, under their titles

_FOLLOWED, _PAIRS, _ENDS, _PASSES = 12, 6, 6, 8  # samples, pairs, samples of each end, passes of the guide
_SIDE, _BYTES, _TRUE = 320, 16_000, 20  # of a small picture; true boxes kept of a sample
_STREAM = 0x666F  # sets these draws apart from others of the seed
_PLASMA = ("#8f0da4", "#c23c81", "#e66c5c", "#fba238", "#f7e425")  # passes, from first to last


class History:
    """Writes the files; on the main rank only, a few times an epoch at most.

    Args:
        folder: the run's.
        seed: of the choice of samples.
        step: steps taken by earlier processes; later entries of theirs are dropped.
    """

    def __init__(self, folder: Path, index: SampleIndex, seed: int, step: int) -> None:
        self.folder, self.index, self.seed = folder / HISTORY, index, seed
        if step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_until(self.folder / "boxes.jsonl", step)
        keep_until(self.folder / "events.jsonl", math.inf)
        for file in self.folder.glob("*.json"):
            if _stored(file).get("step", math.inf) > step:
                file.unlink()
        bad_list.save(self.folder / "left_out.txt", dict(index.left_out))
        if not (self.folder / "followed.json").exists():
            boxed = np.flatnonzero(np.diff(index.box_start))  # samples with true boxes, if there are any
            rows = self._drawn(boxed if len(boxed) else np.arange(len(index)), _FOLLOWED)
            self._put("followed", 0, [("", [_sample(index, row) for row in rows])], rows=rows)
        self.rows = np.array(_stored(self.folder / "followed.json")["rows"], np.int64)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Record that the run started or ended."""
        self._add("events.jsonl", {"event": name, "step": step, "time": round(time.time()), **facts})

    def boxes(self, regions: RegionTable, epoch: int, step: int) -> Lines:
        """Record the heaviest boxes of the followed samples, and draw them unless the guide wrote none."""
        written, found = regions.written[self.rows], _short(heaviest(regions, self.rows))
        boxes = [box if known else None for box, known in zip(found, written, strict=True)]
        if any(boxes):
            self._add("boxes.jsonl", {"step": step, "epoch": epoch, "boxes": boxes})
        return followed(self.folder.parent) if any(boxes) else []

    def pairs(self, regions: RegionTable, step: int) -> Lines:
        """Record some semantic pairs, once, and draw them then."""
        partner = regions.partner
        paired = np.flatnonzero(partner != np.arange(len(regions)))
        if not len(paired) or (self.folder / "pairs.json").exists():
            return []
        pairs = [(row, int(partner[row])) for row in self._drawn(paired, _PAIRS)]
        return self._put("pairs", step, [("", [_sample(self.index, row) for row in pair]) for pair in pairs])

    def localised(self, found: Localised, epoch: int, step: int) -> Lines:
        """Record the samples whose boxes match a true box best, and worst, and draw them."""
        scored = np.flatnonzero(np.isfinite(found.overlap))
        order = scored[np.argsort(-found.overlap[scored], kind="stable")].tolist()
        half = min(_ENDS, len(order) // 2)
        boxes = [Outline(box, sample.BOX_COLOUR, "strong", "box of the map") for box in _short(found.boxes)]
        lines = [
            (
                title,
                [_sample(found.index, row, f"IoU {found.overlap[row]:.0%}, ", boxes[row]) for row in rows],
            )
            for title, rows in (("Best", order[: max(half, 1)]), ("Worst", order[::-1][:half]))
            if rows
        ]
        told = f"Boxes of the encoder's maps after epoch {epoch}, at {found.threshold:.0%} of the maximum"
        return self._put("localised", step, lines, told=f"{told}: the threshold of greatest mean IoU.")

    def _drawn(self, rows: NDArray[np.int64], most: int) -> list[int]:
        draw = np.random.default_rng([self.seed, _STREAM])
        return sorted(draw.choice(rows, min(most, len(rows)), replace=False).tolist())

    def _put(self, name: str, step: int, lines: Sequence[tuple[str, Any]], **more: Any) -> Lines:
        with atomic_write(self.folder / f"{name}.json") as file:
            file.write(json.dumps({"step": step, **more, "lines": lines}).encode())
        return recorded(self.folder.parent, name)[1]

    def _add(self, name: str, line: Mapping[str, Any]) -> None:
        append_line(self.folder / name, json.dumps(line))


def _sample(index: SampleIndex, row: int, told: str = "", *outlines: Outline) -> dict[str, Any]:
    """What `_picture` needs to show a sample when its image may be gone."""
    caption = f"{told}{sample.name_of(index, row)}{sample.class_of(index, row)}"
    try:
        jpg = jpeg(sample.read_image(index, row), _SIDE, _BYTES)
    except Exception as error:  # a user's own source may raise anything
        jpg, caption = "", f"{caption} (not readable: {error})"
    true = [
        Outline(box, sample.TRUE_COLOUR, "thin", "true boxes") for box in _short(index.truth(row)[:_TRUE])
    ]
    return {"caption": caption, "outlines": [*true, *outlines], "jpg": jpg}


def _picture(caption: str, outlines: Sequence[Any], jpg: str) -> Picture:
    """A recorded sample; grey if its image could not be read then, or if there is no JPEG now."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(jpg.partition(",")[2])), formats=["JPEG"])
        image.load()
    except (OSError, ValueError):
        image = Image.new("RGB", (_SIDE, _SIDE), "#808080")
    return Picture(image, caption, [Outline(*outline) for outline in outlines])


def _short(boxes: NDArray[Any]) -> list[Any]:
    return list(boxes.astype(np.float64).round(4).tolist())


def _stored(file: Path) -> dict[str, Any]:
    """The content of a .json file; empty if there is no such file, or something else in it."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def recorded(folder: Path, name: str) -> tuple[str, Lines]:
    """A remark and the recorded pictures of a run; empty if there are none."""
    stored = _stored(folder / HISTORY / f"{name}.json")
    lines = stored.get("lines", [])
    return stored.get("told", ""), [(title, [_picture(**each) for each in line]) for title, line in lines]


def followed(folder: Path) -> Lines:
    """The followed samples with their boxes after at most 8 passes of the guide, evenly spread."""
    by_epoch = {line["epoch"]: line for line in lines_of(folder / HISTORY / "boxes.jsonl")}
    notes = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    shown = [notes[n] for n in np.linspace(0, len(notes) - 1, min(_PASSES, len(notes))).astype(int)]
    lines = recorded(folder, "followed")[1]
    for line, colour in zip(shown, sample.ramp(np.linspace(1, 0, len(shown))[::-1], _PLASMA), strict=True):
        for picture, box in zip(lines[0][1], line["boxes"], strict=True):
            if box:
                told = f"epoch {line['epoch']}"
                picture.outlines.append(Outline(box, f"#{bytes(colour).hex()}", "strong", told))
    return lines if shown else []


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that have a step; none if there is no file.

    A process killed in the middle of a line leaves a piece of one, which is skipped.
    """
    found = []
    for line in file.read_text(errors="replace").split("\n") if file.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def keep_until(file: Path, step: float) -> None:
    """Drop the lines of later steps, which a resumed run takes again, and the piece that a kill has left."""
    if file.exists():
        kept = [json.dumps(line) + "\n" for line in lines_of(file) if line["step"] <= step]
        with atomic_write(file) as draft:
            draft.write("".join(kept).encode())
