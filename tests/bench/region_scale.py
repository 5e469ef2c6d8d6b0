"""What a region table costs by the number of samples: held by each rank alone, and by two ranks together.

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
from dali_views.regions.columns import COLUMNS, FROZEN
from dali_views.system.machine import machine

BATCH, BATCHES = 256, 400
IMAGENET, MANY = 1_281_167, 10**8
# Table, ranks, rows, rounds. The largest take more than ten GB.
CASES = [
    ("private", 1, IMAGENET, 3),
    ("private", 2, IMAGENET, 3),
    ("shared", 2, IMAGENET, 3),
    ("private", 1, MANY, 1),
    ("shared", 2, MANY, 1),
]
MEASURES = [
    "s_to_make", "ms_to_snapshot", "ms_first_256_rows", "ms_per_256_rows", "mean_ms_per_256_rows",
    "s_to_sync", "s_to_compare",
    "unwritten_private_mb", "unwritten_pss_mb", "written_private_mb", "written_pss_mb",
]  # fmt: skip


def memory() -> dict[str, float]:
    """Memory of this process in MB: what it alone has, and that with its share of what several have."""
    taken = {"private": 0.0, "pss": 0.0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, size = line.partition(":")
        if name in ("Private_Clean", "Private_Dirty", "Pss"):
            taken["pss" if name == "Pss" else "private"] += int(size.split()[0]) * 1024 / 1e6
    return taken


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(rank: int, kind: str, ranks: int, length: int, folder: str) -> None:
    """One rank of one case: its figures go into folder/RANK.json."""
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    draw = np.random.default_rng(rank)

    def update() -> float:
        rows, low = draw.integers(0, length, BATCH), draw.uniform(0, 0.5, (BATCH, 2))
        boxes, weights = np.concatenate([low, low + 0.5], axis=1), draw.random(BATCH)
        return 1e3 * seconds(lambda: table.update(rows, boxes, weights, rows[::-1]))

    RegionTable(1000).update([0], [[0, 0, 1, 1]])  # the first call of anything is slow
    found, before = {}, memory()

    def note(when: str) -> None:
        if ranks > 1:
            dist.barrier()
        now = memory()
        found.update({f"{when}_{name}_mb": now[name] - before[name] for name in now})

    began = time.perf_counter()
    table = RegionTable(length, shared=kind == "shared")
    found["s_to_make"] = time.perf_counter() - began
    frozen = table.snapshot()
    note("unwritten")
    update()
    table.sync()
    frozen = table.snapshot()
    # From here on as in the middle of a training: written, frozen for an epoch, and written again.
    found["ms_first_256_rows"] = update()
    batches = [update() for _ in range(BATCHES)]
    found["ms_per_256_rows"] = statistics.median(batches)
    found["mean_ms_per_256_rows"] = statistics.mean(batches)  # with what a few have to do for all
    found["s_to_sync"] = seconds(table.sync)
    found["s_to_compare"] = seconds(table.check_equal)
    for held, names in ((frozen, FROZEN), (table, COLUMNS)):  # every page of both
        for name in names:
            getattr(held, name).max()
    note("written")
    found["ms_to_snapshot"] = 1e3 * seconds(table.snapshot)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(out: Path) -> None:
    with out.open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["table", "ranks", "rows", "regions", "rounds", *MEASURES, "machine"])
        for kind, ranks, length, rounds in CASES:
            found = [figures for _ in range(rounds) for figures in run(kind, ranks, length)]
            # Of all ranks and rounds.
            medians = [f"{statistics.median(figures[name] for figures in found):.3f}" for name in MEASURES]
            line = [kind, ranks, length, 1, rounds, *medians]
            writer.writerow([*line, machine("cpu")])
            table.flush()
            print(*line)


def run(kind: str, ranks: int, length: int) -> list[dict[str, float]]:
    """The figures of every rank, in processes whose memory nothing else has been in."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(measure, args=(kind, ranks, length, folder), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
