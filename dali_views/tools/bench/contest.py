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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ...data.remote import is_remote
from ...plan.views import View

if TYPE_CHECKING:
    from ...data.index import SampleIndex

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
    hw_decoder_load: float = 1.0
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
    until: float = math.inf,
) -> Rates:
    """Images per second of each contender in every round, told to `report`; a peer that fails leaves.

    After the time `until` (of the clock `time.monotonic`) no further peer is tried. Another round begins only
    if it ends before, should it take as long as the last one.

    A turn lasts `seconds` after its warm-up. The files of the indexes in `cold` leave the page cache before
    each turn, which then ends when it has read the smallest index once: a second read is not cold.
    """
    most = min(map(len, cold), default=math.inf)
    least = len(contenders) * rounds * seconds / 60
    told = f"{len(contenders)} loaders x {rounds} rounds x {seconds:g} s: about {least:.1f} minutes"
    report(f"{told}, and as long as each takes to start")
    rates: Rates = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        began = time.monotonic()
        for contender in [each for each in contenders if each.name in rates]:
            if number == 0 and contender.kind == "peer" and time.monotonic() > until:
                report(f"left out: {contender.name} (no time left)")
                del rates[contender.name]
                continue
            for index in cold:
                _forget_files(index)
            try:
                found = rate(contender.start(), seconds, most)
                rates[contender.name].append(found)
                report(f"{contender.name}: {found:.0f} images/s")
            except Exception as error:
                if contender.kind != "peer":
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                report(f"left out: {contender.name} failed ({reason})")
                del rates[contender.name]
            gc.collect()
        if 2 * time.monotonic() - began > until:
            break
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


def _forget_files(index: SampleIndex) -> None:
    """Ask the kernel to drop the images from the page cache, so that the next turn reads the disk."""
    files = [os.path.join(index.root, file) for file in index.files]
    for path in files or map(index.path, range(len(index))):
        if is_remote(path):
            raise ValueError(f"{index.root} is not on a disk whose cache can be emptied; leave --cold out.")
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def figure(part: str, name: str, measure: str, values: Sequence[float], **about: Any) -> Row:
    """A row of the values of all rounds."""
    middle = round(median(values), 1 if measure == IMAGES else 5)
    rounds = " ".join(f"{value:.4g}" for value in values)
    return Row(part, name, measure, middle, rounds=rounds, **about)


def speed_row(part: str, one: Contender, rates: Rates, base: str, limit: str = "") -> Row:
    """The row of a contender, with ratios to a baseline and to a limit, given by name, if measured."""
    values, about = rates[one.name], {"kind": one.kind, "device": one.device, "note": one.note}
    ratio, of_limit = (
        round(median(a / b for a, b in zip(values, rates[other], strict=True)), 3) if other in rates else None
        for other in (base, limit)
    )
    return figure(part, one.name, IMAGES, values, ratio=ratio, of_limit=of_limit, views=one.views, **about)


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
