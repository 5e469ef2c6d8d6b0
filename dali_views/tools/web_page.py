"""Pages that stand alone: HTML with its pictures inside, read without a network and without scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Outline", "document", "escape", "fitted", "jpeg_uri", "legend", "picture"]

_QUALITIES = (92, 85, 75, 60, 45, 30)
_TINY = 96  # pixels; below it the browser shows them as they are, for smoothed they look like a blurred photo

# Nothing is loaded and nothing runs, whatever the names of files or classes hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1b1f24; --quiet: #57606a;
  --line: #d5dae0; --good: #16783c; --bad: #b3261e; --busy: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #191d23; --text: #e6e9ed;
  --quiet: #a0a8b2; --line: #333a43; --good: #5fd68b; --bad: #ff8a80; --busy: #f0b84a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 20px 16px 48px; max-width: 1320px; background: var(--page);
  color: var(--text); font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 24px; line-height: 1.2; margin: 0 0 4px }
h2 { font-size: 18px; margin: 32px 0 4px }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600 }
p { margin: 0 0 10px; max-width: 76ch }
small, figcaption, .quiet { color: var(--quiet); font-size: 13px; font-weight: 400 }
article, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  margin: 12px 0; min-width: 0 }
figure { margin: 0; min-width: 0 }
figcaption { margin-top: 4px }
.row { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start }
.large { width: 270px; max-width: 100% }
.views { flex: 1 1 300px; display: flex; flex-wrap: wrap; gap: 12px; min-width: 0 }
.view { width: calc((100% - 12px) / 2); max-width: 150px }
.small { width: calc((100% - 24px) / 3); max-width: 96px }
.view .picture { border: 3px solid var(--colour) }
@media (max-width: 640px) { .large { width: 100% } }
.grid { display: grid; gap: 12px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)) }
.grid > * { margin: 0 }
.picture { position: relative; max-width: 100% }
.picture img, .picture svg { position: absolute; width: 100%; height: 100%; display: block }
.picture svg { overflow: visible }
.picture rect { fill: none; vector-effect: non-scaling-stroke }
.picture .rim { stroke: #000; stroke-opacity: .6; stroke-width: 4.5px }
.picture .strong { stroke-width: 2.5px }
.picture .dashed { stroke-width: 2px; stroke-dasharray: 6 4 }
.picture .rim.dashed { stroke-width: 4px; stroke-dasharray: none }
.picture .thin { stroke-width: 1.25px }
.picture .faint { stroke-width: 1.25px; stroke-opacity: .65 }
.picture .rim.thin, .picture .rim.faint { stroke-width: 2.5px; stroke-opacity: .3 }
.tiny img { image-rendering: pixelated }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0 0 10px; padding: 0; list-style: none }
.legend li { display: flex; align-items: center; gap: 6px; font-size: 13px; color: var(--quiet) }
.legend i { width: 22px; height: 14px; border-radius: 3px; background: #40464e; display: grid;
  place-items: center; flex: none }
.legend i::after { content: ""; width: 16px; border-top: 3px solid var(--colour) }
.legend .dashed i::after { border-top-style: dashed; border-top-width: 2px }
.legend .thin i::after, .legend .faint i::after { border-top-width: 1.5px }
.legend .faint i::after { opacity: .65 }
table { border-collapse: collapse; font-size: 13px }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal }
th { color: var(--quiet); font-weight: 600 }
pre { font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; margin: 8px 0 0; white-space: pre-wrap }
summary { cursor: pointer }
.wide { overflow-x: auto }
"""


@dataclass(frozen=True)
class Outline:
    """A rectangle on a picture."""

    box: Sequence[float]
    """y0, x0, y1, x1 as fractions of the picture."""
    colour: str
    style: Literal["strong", "dashed", "thin", "faint"] = "strong"


def escape(text: object) -> str:
    """Text for a page. What cannot be printed (broken bytes of a file name, marks that turn the direction of
    writing) becomes the replacement character."""
    plain = str(text)
    if not plain.isprintable():
        plain = "".join(sign if sign.isprintable() else "\ufffd" for sign in plain)
    return html.escape(plain)


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """The whole page; `title` is plain text, `body` are pieces of HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def fitted(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(H, W, 3) pixels, shrunk so that the longer side is at most `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def jpeg_uri(pixels: NDArray[np.uint8], most: int) -> str:
    """(H, W, 3) pixels as the address of a JPEG that holds them, of at most `most` bytes (700 or more).

    The quality is lowered until it fits, and then the size.
    """
    while True:
        for quality in _QUALITIES:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality, optimize=True)
            if file.tell() <= most or (quality == _QUALITIES[-1] and max(pixels.shape[:2]) <= 8):
                return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        pixels = fitted(pixels, max(pixels.shape[:2]) * 3 // 4)


def picture(
    uri: str, size: tuple[int, int], says: str, outlines: Iterable[Outline] = (), tallest: int = 300
) -> str:
    """An image with rectangles over it.

    Args:
        size: height and width that it has or had in pixels: the shape it is shown in.
        says: what is on it, for those who do not see it.
        tallest: CSS pixels that it may be high.
    """
    height, width = max(size[0], 1), max(size[1], 1)
    kind = "picture tiny" if max(size) < _TINY else "picture"
    drawn = "".join(_rectangle(outline) for outline in outlines)
    over = (
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>' if drawn else ""
    )
    shape = f"aspect-ratio:{width}/{height};width:min(100%,{max(60, tallest * width // height)}px)"
    return f'<div class="{kind}" style="{shape}"><img src="{escape(uri)}" alt="{escape(says)}">{over}</div>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """What the lines mean: (text, colour, style of an `Outline`) each."""
    items = (
        f'<li class="{escape(style)}" style="--colour:{escape(colour)}"><i></i>{escape(text)}</li>'
        for text, colour, style in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _rectangle(outline: Outline) -> str:
    y0, x0, y1, x1 = (float(value) for value in outline.box)
    place = f'x="{x0:.4f}" y="{y0:.4f}" width="{max(x1 - x0, 0):.4f}" height="{max(y1 - y0, 0):.4f}"'
    rim = f'<rect class="rim {outline.style}" {place}/>'
    return f'{rim}<rect class="{outline.style}" stroke="{escape(outline.colour)}" {place}/>'
