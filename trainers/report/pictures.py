"""Pictures of a run's history for TensorBoard: the small pictures of its samples with boxes over them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .files import HISTORY
from .history import lines_of

__all__ = ["FOUND_COLOUR", "TRUE_COLOUR", "colour_of", "decoded", "followed", "localised", "pairs", "passes"]

TRUE_COLOUR = "#3ddc84"
FOUND_COLOUR = "#ffffff"
_PASSES = 8
_CELL, _GAP, _ROW = 200, 6, 6
_JPEG = "data:image/jpeg;base64,"


def followed(folder: Path) -> NDArray[np.uint8]:
    """(H, W, 3) the followed samples of the run in `folder`, with the boxes of its guide's passes."""
    cards = json.loads((folder / HISTORY / "followed.json").read_text())["cards"]
    shown = passes(folder)
    tiles = []
    for place, card in enumerate(cards):
        lines = [(box, TRUE_COLOUR) for box in card["true"]]
        lines += [
            (line["boxes"][place], colour_of(n, len(shown)))
            for n, line in enumerate(shown)
            if line["boxes"][place]
        ]
        tiles.append(_tile(card, lines))
    return _sheet(tiles, _ROW)


def localised(folder: Path) -> NDArray[np.uint8]:
    """(H, W, 3) the best and, in the second line, the worst boxes of the latest evaluation."""
    stored = json.loads((folder / HISTORY / "localised.json").read_text())
    rows = [
        [
            _tile(card, [*((box, TRUE_COLOUR) for box in card["true"]), (card["box"], FOUND_COLOUR)])
            for card in stored[end]
        ]
        for end in ("best", "worst")
    ]
    return _sheet([tile for row in rows for tile in row], max(1, len(rows[0])))


def pairs(folder: Path) -> NDArray[np.uint8]:
    """(H, W, 3) semantic pairs, one a line."""
    stored = json.loads((folder / HISTORY / "pairs.json").read_text())
    return _sheet([_tile(card, []) for pair in stored["pairs"] for card in pair], 2)


def passes(folder: Path) -> list[dict[str, Any]]:
    """Where the boxes of the followed samples were: at most 8 passes of the guide, evenly spread."""
    by_epoch = {line["epoch"]: line for line in lines_of(folder / HISTORY / "boxes.jsonl")}
    lines = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    places = np.unique(np.linspace(0, len(lines) - 1, min(_PASSES, len(lines))).astype(int))
    return [lines[place] for place in places]


def colour_of(number: int, count: int) -> str:
    """Colour of one of `count` passes in order, from dark to light."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return str(to_hex(colormaps["plasma"](0.3 + 0.65 * (number / (count - 1) if count > 1 else 1))))


def decoded(uri: str) -> Image.Image | None:
    """The small picture of a card, if it has one."""
    if not uri.startswith(_JPEG):
        return None
    return Image.open(io.BytesIO(base64.b64decode(uri[len(_JPEG) :]))).convert("RGB")


def _tile(card: dict[str, Any], lines: Sequence[tuple[Sequence[float], str]]) -> Image.Image:
    """A square with the picture of a card and boxes (y0, x0, y1, x1 as fractions) over it."""
    tile = Image.new("RGB", (_CELL, _CELL), "#202020")
    found = decoded(card["picture"])
    if found is None:
        return tile
    scale = _CELL / max(found.size)
    small = found.resize((max(1, round(found.width * scale)), max(1, round(found.height * scale))))
    draw = ImageDraw.Draw(small)
    for box, colour in lines:
        y0, x0, y1, x1 = (
            value * side for value, side in zip(box, (small.height, small.width) * 2, strict=True)
        )
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=2)
    tile.paste(small)
    return tile


def _sheet(tiles: Sequence[Image.Image], columns: int) -> NDArray[np.uint8]:
    lines = -(-len(tiles) // columns)
    step = _CELL + _GAP
    sheet = Image.new("RGB", (columns * step - _GAP, max(1, lines) * step - _GAP), "#ffffff")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * step, place // columns * step))
    return np.asarray(sheet)
