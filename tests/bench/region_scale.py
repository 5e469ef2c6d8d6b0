"""What a region table costs by the number of samples, with one rank and with two.

python tests/bench/region_scale.py OUT.csv
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from dali_views import RegionTable
from dali_views.regions.rows import COLUMNS, FROZEN
from dali_views.system.machine import machine

BATCH, BATCHES = 256, 400
CASES = [(1, 1_281_167, 3), (2, 1_281_167, 3), (1, 10**8, 1)]  # ranks, rows, rounds


def memory() -> dict[str, float]:
    """MB of this process: what it alone has (private), and that with its share of common pages (pss)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    taken = {name: int(size.split()[0]) * 1024 / 1e6 for name, _, size in (s.partition(":") for s in lines)}
    return {"private": taken["Private_Clean"] + taken["Private_Dirty"], "pss": taken["Pss"]}


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(rank: int, ranks: int, length: int, folder: str) -> None:
    """One rank of one case: its figures go into folder/RANK.json."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    draw = np.random.default_rng(rank)

    def update() -> float:
        rows, low = draw.integers(0, length, BATCH), draw.uniform(0, 0.5, (BATCH, 2))
        boxes, weights = np.concatenate([low, low + 0.5], axis=1), draw.random(BATCH)
        return 1e3 * seconds(lambda: table.update(rows, boxes, weights, rows[::-1]))

    RegionTable(1000).update([0], [[0, 0, 1, 1]])  # the first call of anything is slow
    found, before = {}, memory()

    def note(when: str) -> None:
        dist.barrier()
        found.update({f"{when}_{name}_mb": now - before[name] for name, now in memory().items()})

    began = time.perf_counter()
    table = RegionTable(length)
    found["s_to_make"] = time.perf_counter() - began
    found["ms_to_snapshot"] = 1e3 * seconds(table.snapshot)
    note("unwritten")
    update()
    table.sync()
    frozen = table.snapshot()
    # From here on as in the middle of a training: written, frozen for an epoch, and written again.
    found["ms_first_256_rows"] = update()
    batches = [update() for _ in range(BATCHES)]
    found |= {"ms_per_256_rows": statistics.median(batches), "mean_ms_per_256_rows": statistics.mean(batches)}
    found |= {"s_to_sync": seconds(table.sync), "s_to_compare": seconds(table.check_equal)}
    for held, names in ((frozen, FROZEN), (table, COLUMNS)):  # read every page of both
        for name in names:
            getattr(held, name).max()
    note("written")
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, length: int) -> list[dict[str, float]]:
    """The figures of every rank, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(measure, args=(ranks, length, folder), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        for case, (ranks, length, rounds) in enumerate(CASES):
            found = [figures for _ in range(rounds) for figures in run(ranks, length)]
            medians = {name: statistics.median(figures[name] for figures in found) for name in found[0]}
            if not case:
                writer.writerow(["table", "ranks", "rows", "regions", "rounds", *medians, "machine"])
            told = [f"{value:.3f}" for value in medians.values()]
            writer.writerow(["private", ranks, length, 1, rounds, *told, machine("cpu")])
