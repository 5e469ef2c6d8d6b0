"""The figures of a run: as a table on the screen and as a CSV file, each with its configuration."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

IMAGES = "images/s"


@dataclass(frozen=True)
class Row:
    """One figure."""

    part: str
    """``"loaders"``, ``"training"``, ``"memory"``, ``"decoder"`` or ``"sources"``."""
    name: str
    """What was measured."""
    measure: str
    """In which unit, for instance ``"images/s"``."""
    value: float
    """Median over the rounds."""
    ratio: float | None = None
    """Median over the rounds of the value over the baseline's of the same round."""
    of_limit: float | None = None
    """The same over decoding alone."""
    rounds: str = ""
    """The value in every round, separated by spaces."""
    kind: str = ""
    device: str = ""
    views: int = 0
    """Views per image; views/s are images/s times this."""
    note: str = ""
    setting: Mapping[str, str | int | float] = field(default_factory=dict)
    """What the whole run shares: recipe, sizes, threads, cache, machine."""


def median_ratio(values: Sequence[float], base: Sequence[float] | None) -> float | None:
    """Median over the rounds of one's value over the other's."""
    if not base:
        return None
    return round(statistics.median(a / b for a, b in zip(values, base, strict=True)), 3)


def joined(values: Sequence[float]) -> str:
    """All rounds in one cell."""
    return " ".join(f"{value:.4g}" for value in values)


def table(rows: Sequence[Row]) -> str:
    """The figures as text for a terminal, one block per part."""
    blocks = []
    for part in dict.fromkeys(row.part for row in rows):
        chosen = [row for row in rows if row.part == part]
        width = max(len(row.name) for row in chosen) + 2
        lines = [f"{part:{width}s}{'':>12s} {'':9s} {'ratio':>7s} {'of decode':>10s}  {'views/s':>9s}"]
        for row in chosen:
            cells = [
                f"{row.name:{width}s}{row.value:12.4g} {row.measure:9s}",
                f"{_number(row.ratio):>7s} {_number(row.of_limit):>10s} ",
                f"{row.value * row.views:9.0f}" if row.views and row.measure == IMAGES else f"{'':9s}",
                f" {row.note}",
            ]
            lines.append(" ".join(cells).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Save the figures; one without its file is not quoted."""
    own = [f.name for f in fields(Row) if f.name != "setting"]
    shared = list(dict.fromkeys(key for row in rows for key in row.setting))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=own + shared)
        writer.writeheader()
        for row in rows:
            cells = asdict(row)
            cells.update(cells.pop("setting"))
            writer.writerow(cells)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a file that `write_csv` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
