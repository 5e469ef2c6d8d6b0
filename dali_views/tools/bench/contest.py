"""Contenders that take turns, and the figures that come out.

Turns go round after round, so that a machine whose speed drifts affects all contenders alike. A contender
exists during its own turn only: none works ahead while another is measured.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median

from ...data.index import SampleIndex
from ...data.remote import is_remote
from ...plan.views import View

WARM_UP = 4  # batches: as many as a DataLoader's two workers hold ready
IMAGES, OF_TIME = "images/s", "of time"

# Yields the size of each batch once its views are ready; endless. Closing it ends its threads and processes.
Batches = Generator[int, None, None]
Rates = dict[str, list[float]]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What every contender is given: images (repeated, so that epochs are long), views and resources.

    `device` ("gpu" or "cpu") is where our graph runs; `workers` are DataLoader processes or our threads.
    """

    index: SampleIndex
    views: list[View]
    batch_size: int
    device: str
    workers: int
    hw_decoder_load: float = 0.65
    seed: int = 0


@dataclass(frozen=True)
class Contender:
    """One row of the table; `kind` is "limit", "ours" or "peer", `device` where it decodes and crops.

    `views` are made per image (0 by some limits); `note` says how its task differs from that of the others.
    """

    name: str
    kind: str
    device: str
    start: Callable[[], Batches]
    views: int
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One figure: `value` in units of `measure`, a median over the `rounds`, which are separated by spaces.

    `ratio` and `of_limit` are medians over the rounds of the value over that of the baseline, and of decoding
    alone, in the same round. `setting` is what the whole run shares: recipe, sizes, threads, cache, machine.
    """

    part: str
    name: str
    measure: str
    value: float
    ratio: float | None = None
    of_limit: float | None = None
    rounds: str = ""
    kind: str = ""
    device: str = ""
    views: int = 0
    note: str = ""
    setting: Mapping[str, str | int | float] = field(default_factory=dict)


def take_turns(
    contenders: Sequence[Contender],
    rounds: int,
    seconds: float,
    *,
    cold: Sequence[SampleIndex] = (),
    report: Report = print,
) -> Rates:
    """Images per second of each contender in every round; a peer that fails leaves, and `report` gets a line.

    Args:
        rounds: turns of each contender; seconds: length of a turn after its warm-up.
        cold: indexes whose files leave the page cache before each turn. A turn then ends when it has read the
            smallest of them once, warm-up included, for a second read is not cold.
    """
    most = min(map(len, cold), default=math.inf)
    rates: Rates = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in [each for each in contenders if each.name in rates]:
            for index in cold:
                forget_files(index)
            try:
                rates[contender.name].append(rate(contender.start(), seconds, most))
            except Exception as error:
                if contender.kind != "peer":
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                report(f"left out: {contender.name} failed ({reason})")
                del rates[contender.name]
            gc.collect()
    return rates


def rate(batches: Batches, seconds: float, most: float = math.inf) -> float:
    """Images per second after the warm-up, for `seconds` or until no whole batch of `most` images is left."""
    try:
        warm_up = [next(batches) for _ in range(WARM_UP)]
        left, last = most - sum(warm_up), warm_up[-1]
        began, images, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < seconds and images + last <= left:
            last = next(batches)
            images += last
            elapsed = time.perf_counter() - began
    finally:
        batches.close()
    return images / elapsed


def forget_files(index: SampleIndex) -> None:
    """Ask the kernel to drop the images from the page cache, so that the next turn reads the disk."""
    files = [os.path.join(index.root, file) for file in index.files]
    for path in files or map(index.path, range(len(index))):
        if is_remote(path):
            raise ValueError(f"{index.root} is not on a disk whose cache can be emptied; leave --cold out.")
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speed_row(part: str, contender: Contender, rates: Rates, base: str, limit: str = "") -> Row:
    """The figure of a contender, beside those of a baseline and of a limit where these were measured."""
    one, values = contender, rates[contender.name]
    ratio, of_limit = (median_ratio(values, rates.get(other)) for other in (base, limit))
    row = Row(part, one.name, IMAGES, round(median(values), 1), ratio, of_limit, joined(values))
    return replace(row, kind=one.kind, device=one.device, views=one.views, note=one.note)


def median_ratio(values: Sequence[float], base: Sequence[float] | None) -> float | None:
    """Median over the rounds of one's value over the other's."""
    return round(median(a / b for a, b in zip(values, base, strict=True)), 3) if base else None


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
            ratio, of_limit = ("" if v is None else f"{v:.2f}" for v in (row.ratio, row.of_limit))
            views = f"{row.value * row.views:.0f}" if row.views and row.measure == IMAGES else ""
            line = f"{row.name:{width}s}{row.value:12.4g} {row.measure:9s} {ratio:>7s} {of_limit:>10s}"
            lines.append(f"{line}  {views:>9s}  {row.note}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Save the figures, each with its setting."""
    own = [f.name for f in fields(Row) if f.name != "setting"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*own, *rows[0].setting])
        writer.writeheader()
        for row in rows:
            cells = asdict(row)
            writer.writerow(cells | cells.pop("setting"))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a file that `write_csv` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
