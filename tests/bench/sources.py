"""The loader on the same photographs wherever their bytes lie: makes the other places of a folder, then

dali-views bench FOLDER --source LIST --source SHARDS ...

python tests/bench/sources.py FOLDER OUT.csv [--rounds 5] [--seconds 6]
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from dali_views import SampleIndex, cli

SHARDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    args = parser.parse_args()
    folder = SampleIndex.from_folder(args.folder)
    with tempfile.TemporaryDirectory() as made:
        places = [shards_of(folder, Path(made))]
        sources = [word for place in places for word in ("--source", *map(str, place))]
        options = ["--rounds", str(args.rounds), "--seconds", str(args.seconds), "--csv", str(args.out)]
        cli.main(["bench", str(args.folder), "--device", "cpu", *sources, *options])


def shards_of(folder: SampleIndex, into: Path) -> list[Path]:
    """The folder's files as tar shards of equal length."""
    paths = [into / f"shard-{number:03d}.tar" for number in range(SHARDS)]
    for path, rows in zip(paths, np.array_split(np.arange(len(folder)), SHARDS), strict=True):
        with tarfile.open(path, "w") as tar:
            for row in rows.tolist():
                tar.add(folder.path(row), Path(folder.path(row)).name)
    return paths


if __name__ == "__main__":
    main()
