"""Drawings as SVG text, for a light and for a dark page: words, lines and boxes in few colours.

Letters are 19 units of a drawing 640 wide, so that they have 11 pixels on a telephone's page of 370.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
WIDTH, LETTER = 640, 19
_SANS = "-apple-system,BlinkMacSystemFont,'Segoe UI','Noto Sans',Helvetica,Arial,sans-serif"
_MONO = "ui-monospace,SFMono-Regular,'SF Mono',Menlo,Consolas,'Liberation Mono',monospace"


class Theme(NamedTuple):
    """Colours for a page of GitHub's; the ground is the page's own."""

    name: str
    page: str
    ink: str
    quiet: str
    line: str
    fill: str
    bar: str
    ours: str
    more: tuple[str, ...]
    """Further colours for curves."""


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#f6f8fa", "#afb8c1", "#0969da",
    ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#0b7285"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#151b23", "#59636e", "#4493f8",
    ("#4493f8", "#f0883e", "#3fb950", "#ab7df8", "#3bc9db"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


class Bar(NamedTuple):
    """A line of a chart: a name, a value, what stands behind it, and whether it is ours."""

    name: str
    value: float
    told: str
    ours: bool = False
    error: float = 0.0


class Curve(NamedTuple):
    """A line of a panel: steps and values, both ascending in time."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str


def words(
    x: float, y: float, text: str, colour: str, size: float = LETTER, *, anchor: str = "start",
    bold: bool = False, mono: bool = False,
) -> str:  # fmt: skip
    """Text whose baseline begins (or ends, or has its middle) at x, y."""
    weight = ' font-weight="600"' if bold else ""
    family = f' font-family="{_MONO}"' if mono else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"'
        f"{weight}{family}>{escape(text)}</text>"
    )


def document(height: float, told: str, parts: Sequence[str], width: float = WIDTH) -> str:
    """A whole drawing; `told` is read out to those who do not see it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="{_SANS}">'
    )
    return "\n".join([head, f"<title>{escape(told)}</title>", *parts, "</svg>", ""])


def stroke(path: str, colour: str, width: float = 2.5, more: str = "") -> str:
    """A line along a path."""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" {more}/>'


def box(x: float, y: float, wide: float, high: float, fill: str, radius: float, more: str = "") -> str:
    """A filled rectangle with round corners."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:g}"'
    return f'<rect {place} rx="{radius:g}" fill="{fill}" {more}/>'


def bars(theme: Theme, title: str, remark: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars under a title, the longest to the right edge; a thin line shows the error."""
    names = 1 + max(len(row.name) for row in rows) * 0.52 * LETTER
    step, top, scale = 33, 74, (WIDTH - names - 82) / max(row.value + row.error for row in rows)
    parts = [words(0, 24, title, theme.ink, 22, bold=True), words(0, 50, remark, theme.quiet, 17)]
    for number, row in enumerate(rows):
        y, length, error = top + number * step, scale * row.value, scale * row.error
        parts.append(words(names - 10, y + 19, row.name, theme.ink, anchor="end", bold=row.ours))
        parts.append(box(names, y, length, 25, theme.ours if row.ours else theme.bar, 3))
        if row.error:
            parts.append(stroke(f"M{names + length - error:.1f} {y + 12.5}h{2 * error:.1f}", theme.ink, 2))
        parts.append(words(names + length + error + 8, y + 19, row.told, theme.ink, bold=row.ours))
    told = f"{title}. {remark}. " + "; ".join(f"{row.name}: {row.told}" for row in rows)
    return document(top + step * len(rows), told, parts)


def panels(theme: Theme, plots: Sequence[tuple[str, Sequence[Curve]]], told: str) -> str:
    """Small charts, two in a row, under the legend of the first one's curves."""
    wide, high, gap, left, top = 296.0, 150.0, 48.0, 0.0, 22.0
    parts = []
    for curve in plots[0][1]:
        length = 44 + 0.53 * 18 * len(curve.name)
        if left and left + length > WIDTH:
            left, top = 0.0, top + 28
        parts.append(stroke(f"M{left:.1f} {top - 6:.1f}h18", curve.colour, 4))
        parts.append(words(left + 25, top, curve.name, theme.ink, 18))
        left += length
    top += 48
    for number, (title, curves) in enumerate(plots):
        place = (number % 2) * (wide + gap), top + (number // 2) * (high + 72)
        parts += _panel(theme, title, curves, *place, wide, high)
    return document(top + (len(plots) + 1) // 2 * (high + 72) - 44, told, parts)


def _panel(
    theme: Theme, title: str, curves: Sequence[Curve], x0: float, y0: float, wide: float, high: float
) -> list[str]:
    """Curves over an axis that begins at 0 unless a value is below."""
    values = [value for curve in curves for value in curve.values]
    ticks, last, span = nice(min(0.0, *values), max(values)), max(curve.steps[-1] for curve in curves), 38.0
    low, reach = min(*values, ticks[0]), max(*values, ticks[-1])

    def x(step: float) -> float:
        return x0 + span + (wide - span) * step / last

    def y(value: float) -> float:
        return y0 + high * (1 - (value - low) / (reach - low))

    parts = [words(x0, y0 - 12, title, theme.ink, 18, bold=True)]
    for tick in ticks:
        parts.append(stroke(f"M{x0 + span} {y(tick):.1f}H{x0 + wide}", theme.line, 1))
        parts.append(words(x0 + span - 6, y(tick) + 6, f"{tick:g}", theme.quiet, 17, anchor="end"))
    for step, anchor in ((0, "middle"), (last / 2, "middle"), (last, "end")):
        parts.append(words(x(step), y0 + high + 20, f"{step:g}", theme.quiet, 17, anchor=anchor))
    for curve in curves:
        points = zip(map(x, curve.steps), map(y, curve.values), strict=True)
        path = "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
        parts.append(stroke(f"M{path}", curve.colour, 2.5, 'stroke-linejoin="round"'))
    return parts


def nice(low: float, high: float) -> list[float]:
    """Two to six round numbers from `low` to `high`, or a little beyond."""
    sizes = (size * 10.0**power for power in range(-3, 6) for size in (1, 2, 5))
    step = next(size for size in sizes if (high - low) / size <= 4)
    first, last = math.ceil(low / step - 0.3), math.floor(high / step + 0.3)
    return [round(number * step, 6) for number in range(first, last + 1)]


def stale(drawn: Iterator[tuple[str, str]], check: bool) -> list[str]:
    """The names of drawings (name, text) that are not in docs/pictures as they should be; they are written
    there unless `check`."""
    found = []
    for name, text in drawn:
        file = PICTURES / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            found.append(name)
            if not check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    return found


def both(stem: str, draw: Callable[[Theme], str]) -> Iterator[tuple[str, str]]:
    """A drawing's two files: name and text."""
    for theme in THEMES:
        yield f"{stem}-{theme.name}.svg", draw(theme)
