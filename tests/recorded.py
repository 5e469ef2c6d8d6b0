"""The trainer, watched: what every training batch holds is written down, and a rank may get a signal.

python tests/recorded.py FOLDER STEP:RANK:SIGNAL pretrain CONFIG ...

The process of RANK signals itself before it trains step STEP (from 1), unless torchrun has restarted it;
"never" spares all.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from dali_views import Batch, ViewLoader
from trainers import cli

PLAIN = ViewLoader.__iter__


def main(folder: str | Path, when: str, *words: str) -> int:
    """Run one command of the trainer; its exit code."""
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def record(loader: ViewLoader) -> Iterator[Batch]:
        if not loader.shuffle:  # not of training
            yield from PLAIN(loader)
            return
        for batch in PLAIN(loader):
            step = loader.epoch * len(loader) + loader.step
            if when.startswith(f"{step}:{loader.rank}:") and first:
                signal.raise_signal(signal.Signals[when.rpartition(":")[2]])
            rows = zip(batch.index.tolist(), batch.crops.tolist(), batch.flipped.tolist(), strict=True)
            with (Path(folder) / f"batches-{os.getpid()}.jsonl").open("a") as file:
                file.writelines(json.dumps([step, *row]) + "\n" for row in rows)
            yield batch

    ViewLoader.__iter__ = record  # type: ignore[method-assign]
    return cli.main(words)


def batches(folder: Path) -> set[str]:
    """Step, sample, crops and flips of every sample that any process recorded there."""
    return {line for file in folder.glob("batches-*.jsonl") for line in file.read_text().splitlines()}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
