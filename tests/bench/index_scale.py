"""What a loader costs to start and to run by the number of images, with an index of made-up rows.

python tests/bench/index_scale.py OUT.csv [--rows 50000 1281167 100000000] [--rounds 3]

Every row has a name, size, label and place in a shard as a set of tar shards has; what is read is one JPEG in
memory, the same for all rows, so that all else is the loader's own. Two processes are on it, as two ranks of
a machine are: of what they map, each has its share. 100 million rows take 7 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dali_views import SampleIndex, View, ViewLoader
from dali_views.system.machine import machine

BATCH, BATCHES, PER_SHARD = 256, 30, 10_000
COLUMNS = [
    "rows", "file_mb", "s_to_load", "s_to_first_batch", "ms_per_batch", "ms_to_plan",
    "own_mb", "mapped_mb", "share_mb", "machine",
]  # fmt: skip
MAKE = "import sys, index_scale, pathlib; index_scale.make(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"


class OneImage:
    """The same JPEG for every row."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        out = io.BytesIO()
        Image.new("RGB", (32, 32), "teal").save(out, "JPEG")
        self._image = out.getvalue()

    def __len__(self) -> int:
        return self._rows

    def read(self, rows: np.ndarray) -> list[bytes]:
        return [self._image] * len(rows)


def make(rows: int, file: Path) -> None:
    """Saves an index of so many made-up members of shards."""
    number = np.arange(rows, dtype=np.int64)
    shard = number // PER_SHARD
    paths = np.zeros((rows, len("train-000000.tar/000000000.jpg")), np.uint8)
    paths[:] = np.frombuffer(b"train-000000.tar/000000000.jpg", np.uint8)
    for place, digits in ((6, shard), (17, number)):
        width = 6 if place == 6 else 9
        for digit in range(width):
            paths[:, place + digit] += (digits // 10 ** (width - 1 - digit) % 10).astype(np.uint8)
    names = [f"train-{n:06d}.tar" for n in range(int(shard[-1]) + 1)]
    SampleIndex(
        root="/data",
        paths=paths,
        sizes=np.full((rows, 2), 32, np.int32),
        labels=(number % 1000).astype(np.int32),
        classes=[f"{n:03d}" for n in range(1000)],
        holder="ranges",
        files=names,
        file_stamps=np.full((len(names), 2), 1 << 40, np.int64),
        places=np.column_stack([shard, number % PER_SHARD * 110_000 + 512, np.full(rows, 100_000)]),
    ).save(file)


def own() -> float:
    """Memory of this process that nobody can share, in MB."""
    found = re.search(r"^Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def mapped(file: str) -> tuple[float, float]:
    """What of a mapped file is resident for this process, and its share of that, in MB."""
    parts = Path("/proc/self/smaps").read_text().split(file)[1:]
    found = [re.search(r"Rss: +(\d+) kB\nPss: +(\d+) kB", part) for part in parts]
    resident, share = (
        np.array([[int(n) for n in each.groups()] for each in found if each]).reshape(-1, 2).sum(0)
    )
    return resident * 1024 / 1e6, share * 1024 / 1e6


def measure(file: str) -> None:
    """Loads an index, starts a loader on it and runs some batches; prints what it took."""

    def loader_of(index: SampleIndex) -> ViewLoader:
        return ViewLoader(index, [View(size=16)] * 2, BATCH, device="cpu", threads=1)

    # What loads code and libraries is not what grows with the rows.
    few = SampleIndex.from_source(OneImage(4 * BATCH), progress=False)
    next(iter(loader_of(few)))
    before, began = own(), time.perf_counter()
    index = SampleIndex.load(file)
    loaded = time.perf_counter()
    loader = loader_of(replace(index, source=OneImage(len(index))))
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    seconds, plans = [], []
    for number in range(BATCHES):
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        loader.plan_at(number * BATCH)
        plans.append(time.perf_counter() - start)
    print(
        loaded - began,
        first - loaded,
        1e3 * statistics.median(seconds),
        1e3 * statistics.median(plans),
        max(0.0, own() - before),
        flush=True,
    )
    sys.stdin.readline()  # when the other one has loaded it, too
    print(*mapped(file), flush=True)
    sys.stdin.readline()


def two(file: Path) -> list[list[float]]:
    """What two processes on the same index measure, one after the other."""

    def line(child: subprocess.Popen[str]) -> list[float]:
        assert child.stdout is not None
        return [float(word) for word in child.stdout.readline().split()]

    lines, children = [], []
    for _ in range(2):
        command = [sys.executable, __file__, str(file), "--child"]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        lines.append(line(children[-1]))
    for measured, child in zip(lines, children, strict=True):
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
        measured += line(child)
    for child in children:
        child.communicate()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 1_281_167, 100_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(str(args.out))
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            file = Path(folder, "index.npz")
            # In a process of its own, whose memory goes with it.
            command = [sys.executable, "-c", MAKE, str(rows), str(file)]
            subprocess.run(command, check=True, cwd=Path(__file__).parent)
            found = np.median([line for _ in range(args.rounds) for line in two(file)], axis=0).tolist()
            size = file.stat().st_size / 1e6
            lines.append([rows, f"{size:.0f}", *(f"{value:.3g}" for value in found), machine("cpu")])
            print(*(f"{cell!s:>12s}" for cell in lines[-1]), flush=True)
    with args.out.open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)


if __name__ == "__main__":
    main()
