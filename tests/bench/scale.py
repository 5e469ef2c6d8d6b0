"""What an index and a region table cost by the number of samples.

python tests/bench/scale.py index OUT.csv      made-up members of shards, one JPEG for all rows, two ranks
python tests/bench/scale.py regions OUT.csv    with one rank and with two
"""

from __future__ import annotations

import csv
import io
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.multiprocessing.spawn import start_processes

from dali_views import RegionTable, SampleIndex, View, ViewLoader
from dali_views.regions.rows import COLUMNS, FROZEN
from dali_views.system.machine import machine

BATCH, BATCHES = 256, 400
IMAGENET, PER_SHARD = 1_281_167, 10_000
INDEXES = [50_000, IMAGENET, 10**8]  # the last takes 7 GB of disk for a while
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


class OneImage:
    """The same JPEG for every row."""

    def __init__(self, rows: int) -> None:
        self._rows, out = rows, io.BytesIO()
        Image.new("RGB", (32, 32), "teal").save(out, "JPEG")
        self._image = out.getvalue()

    def __len__(self) -> int:
        return self._rows

    def read(self, rows: np.ndarray) -> list[bytes]:
        return [self._image] * len(rows)


def save_index(rank: int, rows: int, file: str, folder: str) -> None:
    """An index of so many made-up members of shards; in a process whose memory goes with it."""
    number = np.arange(rows, dtype=np.int64)
    shard = number // PER_SHARD
    paths = np.tile(np.frombuffer(b"train-000000.tar/000000000.jpg", np.uint8), (rows, 1))
    for place, width, digits in ((6, 6, shard), (17, 9, number)):
        for digit in range(width):
            paths[:, place + digit] += (digits // 10 ** (width - 1 - digit) % 10).astype(np.uint8)
    names = [f"train-{n:06d}.tar" for n in range(int(shard[-1]) + 1)]
    SampleIndex(
        root="/data", paths=paths, sizes=np.full((rows, 2), 32, np.int32), holder="ranges", files=names,
        labels=(number % 1000).astype(np.int32), classes=[f"{n:03d}" for n in range(1000)],
        file_stamps=np.full((len(names), 2), 1 << 40, np.int64),
        places=np.column_stack([shard, number % PER_SHARD * 110_000 + 512, np.full(rows, 100_000)]),
    ).save(file)  # fmt: skip
    torch.save({"file_mb": Path(file).stat().st_size / 1e6}, f"{folder}/{rank}")


def measure_index(rank: int, file: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)

    def loader_of(index: SampleIndex) -> ViewLoader:
        options = {"device": "cpu", "threads": 1, "rank": 0, "world": 1}
        return ViewLoader(index, [View(size=16)] * 2, BATCH, **options)

    # The first call of anything is slow.
    next(iter(loader_of(SampleIndex.from_source(OneImage(4 * BATCH), progress=False))))
    before, began = memory()["private"], time.perf_counter()
    index = SampleIndex.load(file)
    found = {"s_to_load": time.perf_counter() - began}
    began = time.perf_counter()
    loader = loader_of(replace(index, source=OneImage(len(index))))
    batches = iter(loader)
    next(batches)
    found["s_to_first_batch"] = time.perf_counter() - began
    found["ms_per_batch"] = 1e3 * statistics.median(seconds(lambda: next(batches)) for _ in range(30))
    plans = (seconds(lambda n=n: loader.plan_at(n * BATCH)) for n in range(30))
    found |= {"ms_to_plan": 1e3 * statistics.median(plans), "own_mb": memory()["private"] - before}
    dist.barrier()  # the other rank has mapped the file too
    parts = Path("/proc/self/smaps").read_text().split(file)[1:]
    pages = [re.search(r"Rss: +(\d+) kB\nPss: +(\d+) kB", part) for part in parts]
    sums = np.sum([[int(size) for size in page.groups()] for page in pages if page] or [[0, 0]], axis=0)
    found |= dict(zip(("mapped_mb", "share_mb"), sums * 1024 / 1e6, strict=True))
    torch.save({name: float(value) for name, value in found.items()}, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def run(measure: Callable[..., None], ranks: int, *arguments: object) -> list[Figures]:
    """The figures of every rank, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(measure, args=(*arguments, folder), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        return [torch.load(f"{folder}/{rank}") for rank in range(ranks)]


if __name__ == "__main__":
    lines = []
    if sys.argv[1] == "index":
        for rows in map(int, sys.argv[3:] or INDEXES):
            with tempfile.TemporaryDirectory() as folder:
                file = f"{folder}/index"
                (size,) = run(save_index, 1, rows, file)
                found = [size | one for _ in range(3) for one in run(measure_index, 2, file)]
            lines.append(({"rows": rows}, found))
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
