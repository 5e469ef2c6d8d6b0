"""The loader on the same photographs wherever their bytes come from: ratios to the folder within one run.

python tests/bench/sources.py FOLDER OUT.csv [--shards 8] [--rounds 5] [--seconds 6]

All come from a warm page cache. Shards are made of the folder's files; a user's source keeps them in memory;
"decode only" is the limit, a graph that does no more than read and decode.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dali_views import SampleIndex, pipeline, recipes
from dali_views.bench import limits, ours
from dali_views.bench.contender import Contender, Setup
from dali_views.bench.results import IMAGES, Row, joined, median_ratio, table, write_csv
from dali_views.bench.turns import take_turns
from dali_views.machine import machine

BATCH, IMAGES_AN_EPOCH = 64, 50_000


class InMemory:
    """The least that a source can be."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray) -> list[bytes]:
        return [self.images[row] for row in rows.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    args = parser.parse_args()
    folder = SampleIndex.from_folder(args.folder)
    with tempfile.TemporaryDirectory() as made:
        indexes = {
            "folder": folder,
            "shards": SampleIndex.from_shards(shards_of(folder, Path(made), args.shards), cache=False),
            "source": SampleIndex.from_source(InMemory([folder.encoded(i) for i in range(len(folder))])),
        }
        contenders = []
        for name, index in indexes.items():
            repeated = index.subset(np.arange(IMAGES_AN_EPOCH) % len(index))
            setup = Setup(repeated, recipes.moco_v2(), BATCH, "cpu", pipeline.default_threads())
            (decode,) = (one for one in limits.contenders(setup) if one.name == limits.DECODE)
            contenders += [
                Contender(name, "ours", "cpu", partial(ours.batches, setup, setup.views), 2),
                Contender(f"{name}, {limits.DECODE}", "limit", "cpu", decode.start, 0),
            ]
        rates = take_turns(contenders, args.rounds, args.seconds)
    setting: dict[str, str | int | float] = {
        "recipe": "moco_v2",
        "size": 224,
        "batch_size": BATCH,
        "workers": pipeline.default_threads(),
        "cache": "warm",
        "hw_decoder_load": "",
        "images": len(folder),
        "machine": machine("cpu"),
    }
    rows = []
    for one in contenders:
        values = rates[one.name]
        base = rates["folder" if one.kind == "ours" else f"folder, {limits.DECODE}"]
        rows.append(
            Row(
                "sources",
                one.name,
                IMAGES,
                round(statistics.median(values), 1),
                ratio=median_ratio(values, base),
                rounds=joined(values),
                kind=one.kind,
                device="cpu",
                views=one.views,
                setting=setting,
            )
        )
    print(table(rows))
    write_csv(rows, args.out)


def shards_of(folder: SampleIndex, into: Path, count: int) -> list[Path]:
    """The folder's files as tar shards of equal length."""
    paths = [into / f"{number:03d}.tar" for number in range(count)]
    for path, rows in zip(paths, np.array_split(np.arange(len(folder)), count), strict=True):
        with tarfile.open(path, "w") as tar:
            for row in rows.tolist():
                tar.add(folder.path(row), Path(folder.path(row)).name)
    return paths


if __name__ == "__main__":
    main()
