"""What the order of an epoch costs by the number of samples, computed and as a stored permutation.

python tests/bench/order_scale.py OUT.csv
"""

from __future__ import annotations

import csv
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from dali_views.plan import order
from dali_views.system.machine import machine

BATCH, BATCHES, ROUNDS = 256, 400, 3
LENGTHS = (40, 50_000, 1_281_167, 10**8, 10**9)
MOST_STORED = 10**8
COLUMNS = ["order", "samples", "ms_to_begin", "ms_per_256_rows", "rounds", "resident_mb", "machine"]


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(how: str, length: int) -> tuple[float, float, float]:
    """Milliseconds until an epoch's first row is known and per batch, and the memory taken in MB."""
    # The first call of anything is slow, and is not what grows with the length.
    order.rows(np.arange(BATCH), 1000, 0, 0)
    np.random.default_rng(0).permutation(1000)
    batches = [np.arange(first, first + BATCH) % length for first in range(0, BATCHES * BATCH, BATCH)]
    before, began = resident(), time.perf_counter()
    stored = np.random.default_rng(0).permutation(length) if how == "stored" else None

    def rows(positions: order.Rows) -> order.Rows:
        return order.rows(positions, length, 0, 0) if stored is None else stored[positions]

    rows(batches[0][:1])
    begin = time.perf_counter() - began
    seconds = []
    for positions in batches:
        began = time.perf_counter()
        rows(positions)
        seconds.append(time.perf_counter() - began)
    return 1e3 * begin, 1e3 * statistics.median(seconds), max(0.0, resident() - before)


if __name__ == "__main__":
    cases = [("computed", length) for length in LENGTHS]
    cases += [("stored", length) for length in LENGTHS if length <= MOST_STORED]
    # Each case in a fresh process, in turns.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(measure, cases * ROUNDS, chunksize=1)
    with Path(sys.argv[1]).open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, case in enumerate(cases):
            begin, batch, memory = zip(*found[number :: len(cases)], strict=True)
            rounds = " ".join(f"{value:.3f}" for value in batch)
            figures = [f"{statistics.median(begin):.3f}", f"{statistics.median(batch):.3f}", rounds]
            writer.writerow([*case, *figures, f"{statistics.median(memory):.1f}", machine("cpu")])
