"""What the order of an epoch and a region table cost by the number of samples.

python tests/bench/scale.py order OUT.csv      computed, and as a stored permutation
python tests/bench/scale.py regions OUT.csv    with one rank and with two
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from dali_views import RegionTable
from dali_views.plan import order
from dali_views.regions.rows import COLUMNS, FROZEN
from dali_views.system.machine import machine

BATCH, BATCHES = 256, 400
IMAGENET = 1_281_167
ORDERS = [(how, n) for n in (40, 50_000, IMAGENET, 10**8, 10**9) for how in ("computed", "stored")]
TABLES = [(1, IMAGENET, 3), (2, IMAGENET, 3), (1, 10**8, 1)]  # ranks, rows, rounds
Figures = dict[str, float]


def memory() -> Figures:
    """MB of this process: what it alone has (private), and that with its share of common pages (pss)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    taken = {name: int(size.split()[0]) * 1024 / 1e6 for name, _, size in (s.partition(":") for s in lines)}
    return {"private": taken["Private_Clean"] + taken["Private_Dirty"], "pss": taken["Pss"]}


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure_order(rank: int, how: str, length: int, folder: str) -> None:
    order.rows(np.arange(BATCH), 1000, 0, 0)  # the first call of anything is slow
    np.random.default_rng(0).permutation(1000)
    batches = [np.arange(first, first + BATCH) % length for first in range(0, BATCHES * BATCH, BATCH)]
    before, began = memory()["private"], time.perf_counter()
    stored = np.random.default_rng(0).permutation(length) if how == "stored" else None

    def rows(positions: order.Rows) -> order.Rows:
        return order.rows(positions, length, 0, 0) if stored is None else stored[positions]

    rows(batches[0][:1])
    found = {"ms_to_begin": 1e3 * (time.perf_counter() - began)}
    found["ms_per_256_rows"] = 1e3 * statistics.median(seconds(lambda b=b: rows(b)) for b in batches)
    torch.save(found | {"own_mb": memory()["private"] - before}, f"{folder}/{rank}")


def measure_table(rank: int, ranks: int, length: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    draw = np.random.default_rng(rank)

    def update() -> float:
        rows, low = draw.integers(0, length, BATCH), draw.uniform(0, 0.5, (BATCH, 2))
        boxes, weights = np.concatenate([low, low + 0.5], axis=1), draw.random(BATCH)
        return 1e3 * seconds(lambda: table.update(rows, boxes, weights, rows[::-1]))

    RegionTable(1000).update([0], [[0, 0, 1, 1]])  # the first call of anything is slow
    before, began = memory(), time.perf_counter()
    table = RegionTable(length)
    found = {"s_to_make": time.perf_counter() - began, "ms_to_snapshot": 1e3 * seconds(table.snapshot)}
    update()
    table.sync()
    frozen = table.snapshot()
    # From here on as in the middle of a training: written, frozen for an epoch, and written again.
    found["ms_first_256_rows"] = update()
    found["ms_per_256_rows"] = statistics.median(update() for _ in range(BATCHES))
    found |= {"s_to_sync": seconds(table.sync), "s_to_compare": seconds(table.check_equal)}
    for held, names in ((frozen, FROZEN), (table, COLUMNS)):  # read every page of both
        for name in names:
            getattr(held, name).max()
    dist.barrier()
    found |= {f"written_{name}_mb": now - before[name] for name, now in memory().items()}
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def run(measure: Callable[..., None], ranks: int, *arguments: object) -> list[Figures]:
    """The figures of every rank, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(measure, args=(*arguments, folder), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        return [torch.load(f"{folder}/{rank}") for rank in range(ranks)]


if __name__ == "__main__":
    lines = []
    if sys.argv[1] == "order":
        for how, length in ORDERS:
            if how == "computed" or length <= 10**8:
                facts = {"order": how, "samples": length, "rounds": 3}
                lines.append((facts, [run(measure_order, 1, how, length)[0] for _ in range(3)]))
    else:
        for ranks, length, rounds in TABLES:
            facts = {"table": "private", "ranks": ranks, "rows": length, "regions": 1, "rounds": rounds}
            rows = [one for _ in range(rounds) for one in run(measure_table, ranks, ranks, length)]
            lines.append((facts, rows))
    with Path(sys.argv[2]).open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*lines[0][0], *lines[0][1][0], "machine"])
        for facts, found in lines:
            medians = [f"{statistics.median(one[name] for one in found):.3f}" for name in found[0]]
            writer.writerow([*facts.values(), *medians, machine("cpu")])
