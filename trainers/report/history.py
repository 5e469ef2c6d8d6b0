"""What a page about a run needs beside its metrics, kept in small files as the run goes: RUN/history/.

    left_out.txt     files that the index has left out, with reasons
    events.jsonl     each start and each end, with the machine
    followed.json    a dozen samples, chosen by the seed, with small pictures
    boxes.jsonl      where the region table had their boxes, a line for every pass of the guide
    localised.json   the best and the worst boxes of the latest evaluation
    pairs.json       some semantic pairs

None grows with the data set, but for its bad files, and only boxes.jsonl and events.jsonl grow with time.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_views import RegionTable, SampleIndex, bad_list
from dali_views.system.files import atomic_write
from dali_views.tools.show import read_image
from dali_views.tools.show_page import name_of
from dali_views.tools.web_page import fitted, jpeg_uri

from ..evaluate.box_scores import Localised, heaviest
from .files import HISTORY

__all__ = ["RunHistory", "keep_until", "lines_of", "stored_in"]

_FOLLOWED = 12
_PAIRS = 6
_ENDS = 6  # samples of each end in localised.json
_SIDE, _BYTES = 320, 16_000  # of a small picture
_TRUE = 20  # true boxes kept of a sample
_STREAM = 0x666F  # sets these draws apart from others of the seed


class RunHistory:
    """Writes the files; on the main rank only, a few times an epoch at most.

    Args:
        folder: the run's; step: steps taken by earlier processes, whose entries from there on are taken back.
        seed: of the choice of samples.
    """

    def __init__(self, folder: Path, index: SampleIndex, seed: int, step: int) -> None:
        self.folder = folder / HISTORY
        self.index = index
        self.seed = seed
        if step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        keep_until(self.folder / "boxes.jsonl", step)
        keep_until(
            self.folder / "events.jsonl", sys.maxsize
        )  # of which a kill may have left a piece of a line
        for name in ("localised.json", "pairs.json"):
            stored = stored_in(self.folder / name)
            if stored and stored["step"] > step:
                (self.folder / name).unlink()
        bad_list.save(self.folder / "left_out.txt", dict(index.left_out))
        followed = stored_in(self.folder / "followed.json")
        if not followed:
            followed = {"rows": self._followed(), "cards": []}
            followed["cards"] = [self._card(index, row) for row in followed["rows"]]
            self._put("followed.json", followed)
        self.rows = np.array(followed["rows"], np.int64)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Note that the run started or ended."""
        self._add("events.jsonl", {"event": name, "step": step, "time": round(time.time()), **facts})

    def boxes(self, regions: RegionTable, epoch: int, step: int) -> None:
        """Note where the guide has put the boxes of the followed samples; of several the heaviest."""
        written = regions.written[self.rows]
        if not written.any():
            return
        found = heaviest(regions, self.rows)
        boxes = [_short(box) if known else None for box, known in zip(found, written, strict=True)]
        self._add("boxes.jsonl", {"step": step, "epoch": epoch, "boxes": boxes})

    def pairs(self, regions: RegionTable, step: int) -> bool:
        """Note some semantic pairs, once; whether it was now."""
        if (self.folder / "pairs.json").exists():
            return False
        paired = np.flatnonzero(regions.partner != np.arange(len(regions)))
        if not len(paired):
            return False
        rows = self._drawn(paired, _PAIRS).tolist()
        pairs = [
            [self._card(self.index, row), self._card(self.index, int(regions.partner[row]))] for row in rows
        ]
        self._put("pairs.json", {"step": step, "pairs": pairs})
        return True

    def localised(self, found: Localised, epoch: int, step: int) -> None:
        """Note the samples whose boxes found a true box best, and worst."""
        scored = np.flatnonzero(np.isfinite(found.overlap))
        order = scored[np.argsort(-found.overlap[scored], kind="stable")]
        half = min(_ENDS, len(order) // 2)
        ends = {"best": order[: max(half, 1)], "worst": order[::-1][:half]}
        cards = {
            name: [
                {
                    **self._card(found.index, row),
                    "box": _short(found.boxes[row]),
                    "iou": float(found.overlap[row]),
                }
                for row in rows.tolist()
            ]
            for name, rows in ends.items()
        }
        self._put("localised.json", {"step": step, "epoch": epoch, "threshold": found.threshold, **cards})

    def _followed(self) -> list[int]:
        """Rows to follow; where some have true boxes, of these."""
        boxed = np.flatnonzero(np.diff(self.index.box_start))
        rows = self._drawn(boxed if len(boxed) else np.arange(len(self.index)), _FOLLOWED)
        return [int(row) for row in rows]

    def _drawn(self, rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
        draw = np.random.default_rng([self.seed, _STREAM])
        return np.sort(draw.choice(rows, min(most, len(rows)), replace=False))

    def _card(self, index: SampleIndex, row: int) -> dict[str, Any]:
        """What is shown of a sample; its image may be gone when that is looked at."""
        label = int(index.labels[row])
        named = index.classes[label] if 0 <= label < len(index.classes) else str(label) if label >= 0 else ""
        try:
            picture = jpeg_uri(fitted(read_image(index, row), _SIDE), _BYTES)
        except Exception as error:  # a source of one's own raises what it likes
            picture = ""
            named += f" (not readable: {error})"
        return {
            "name": name_of(index, row),
            "class": named,
            "size": index.sizes[row].tolist(),
            "true": [_short(box) for box in index.truth(row)[:_TRUE]],
            "picture": picture,
        }

    def _put(self, name: str, content: Mapping[str, Any]) -> None:
        with atomic_write(self.folder / name) as file:
            file.write(json.dumps(content).encode())

    def _add(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that tell their step; none if there is no file.

    A process killed in the middle of a line leaves a piece of one, which is passed over.
    """
    if not file.is_file():
        return []
    found = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
    return found


def keep_until(file: Path, step: int) -> None:
    """Take back the lines of steps that a resumed run is about to take again."""
    if not file.exists():
        return
    kept = "".join(json.dumps(line) + "\n" for line in lines_of(file) if line["step"] <= step)
    if kept != file.read_text(errors="replace"):
        with atomic_write(file) as draft:
            draft.write(kept.encode())


def stored_in(file: Path) -> dict[str, Any] | None:
    """What a .json file holds by name; None if there is no such file, or no such thing in it."""
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def _short(box: Sequence[float] | npt.NDArray[np.floating[Any]]) -> list[float]:
    return [round(float(value), 4) for value in box]
