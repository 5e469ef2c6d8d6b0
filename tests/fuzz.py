"""Damaged files of every kind that is loaded: each ends as a result or as an error that is documented.

python tests/fuzz.py --count 10000 --seed 0 [--kinds jpeg list ...] [--json out.json] [--keep folder]

An input is judged in a process that works through many. One that kills or stops this process, takes much
memory or raises something else is a finding: it is told, kept in a folder, and the next one is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mutations
import numpy as np

from dali_views import RegionTable, SampleIndex
from dali_views.data.scan import FileScan, read_index
from dali_views.graph.decode import Alone
from dali_views.regions import Snapshot
from trainers.config import file as config_file
from trainers.engine import checkpoint

LIMIT_S = 60.0
LIMIT_MB = {"image": 2500, "other": 300}
"""Rise of the resident memory. An image of as many pixels as the scan accepts has 540 MB in each copy."""
IMAGES_SHARE = 0.4


@dataclass
class Result:
    """What came of a run."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each kind had each outcome."""
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Finding:
    """An input that was not handled."""

    kind: str
    number: int
    what: str
    file: str


# ---- in the judging process


def judge(kind: str, file: Path) -> str:
    """Loads one file and uses what was loaded; the outcome in a few words."""
    images = file.parent.parent / "images"
    if kind in mutations.IMAGES:
        try:
            SampleIndex.from_folder(file.parent, cache=False, progress=False)
        except ValueError:
            return "left out"
        return "undecodable" if Alone("cpu", None).refusal(file.read_bytes()) else "image"
    try:
        return _LOADERS[kind](file, images)
    except (ValueError, FileNotFoundError) as error:
        if "\n" in str(error):
            raise RuntimeError(f"an error of several lines: {error}") from error
        return "refused"


def _use(index: SampleIndex) -> None:
    for row in range(len(index)):
        index.path(row), index.truth(row)
    if index.form == "names":
        index.path_rows(np.arange(len(index)))
    index.subset([0]).summary()
    assert all(label == -1 or index.classes[label] for label in index.labels)


def _list(file: Path, images: Path) -> str:
    _use(SampleIndex.from_list(file, images, cache=False, progress=False))
    return "loaded"


def _coco(file: Path, images: Path) -> str:
    _use(SampleIndex.from_coco(images, file, cache=False, progress=False))
    return "loaded"


def _index(file: Path, images: Path) -> str:
    index = SampleIndex.load(file)
    kept = read_index(file, FileScan) if b"stamp_files" in file.read_bytes() else None
    try:
        _use(index)
        if kept is not None:
            kept.records(), kept.holds()
    except ValueError as error:
        raise RuntimeError(f"loaded, but of no use: {error}") from error
    return "loaded"


def _regions(file: Path, images: Path) -> str:
    table = RegionTable.load(file)
    try:
        table.snapshot(), table.state_dict(), table.update([0], weights=[1.0])
    except ValueError as error:
        raise RuntimeError(f"loaded, but of no use: {error}") from error
    return "loaded"


def _checkpoint(file: Path, images: Path) -> str:
    folder = file.parent
    shutil.copyfile(folder.parent / checkpoint.LAST, folder / checkpoint.PREVIOUS)
    file.replace(folder / checkpoint.LAST)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state = checkpoint.load(folder)
    try:
        RegionTable(3).load_state_dict(state["regions"])
        Snapshot.from_state_dict(state["regions"])
        config_file.parse(state["config"])
    except (KeyError, TypeError):
        return "refused"
    return "fell back" if told else "loaded"


def _yaml(file: Path, images: Path) -> str:
    config_file.load(file)
    return "loaded"


def _shard(file: Path, images: Path) -> str:
    return _contained(
        SampleIndex.from_shards(file.rename(file.with_suffix(".tar")), cache=False, progress=False)
    )


def _table(file: Path, images: Path) -> str:
    file = file.rename(file.with_suffix(".parquet"))
    return _contained(SampleIndex.from_table(file, cache=False, progress=False))


def _lmdb(file: Path, images: Path) -> str:
    return _contained(SampleIndex.from_lmdb(file, cache=False, progress=False))


def _contained(index: SampleIndex) -> str:
    _use(index)
    for row in range(len(index)):
        content = index.encoded(row)  # what the scan has read once, can be read
        assert index.holder == "groups" or len(content) == index.places[row, 2]
    return "left out" if index.left_out else "loaded"


_LOADERS: dict[str, Callable[[Path, Path], str]] = {
    "list": _list,
    "coco": _coco,
    "index": _index,
    "regions": _regions,
    "checkpoint": _checkpoint,
    "yaml": _yaml,
    "shard": _shard,
    "table": _table,
    "lmdb": _lmdb,
}


def serve() -> None:
    """Answers a line `[kind, file]` with `[outcome, finding, MB]`; what a library prints goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(outcome: str, finding: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([outcome, finding, peak]), file=answers, flush=True)

    answer("started", "")
    for line in sys.stdin:
        kind, file = json.loads(line)
        try:
            answer(judge(kind, Path(file)), "")
        except Exception as error:
            answer("finding", f"{type(error).__name__}: {error}")


# ---- in the process that sees what comes of it


class Judge:
    """A judging process, which is started again when it has died or was stopped."""

    def __init__(self, log: Path, script: str = __file__, limit_s: float = LIMIT_S) -> None:
        self._log = log
        self._script = script
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None
        self._peak = 0.0

    def __call__(self, kind: str, file: Path) -> tuple[str, str]:
        """(outcome, what was found) of a file."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([kind, str(file)]), file=process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            answered = selector.select(self._limit_s)
        line = process.stdout.readline() if answered else ""
        if not line:
            self.stop()
            return (
                "finding",
                f"ended with code {process.returncode}" if answered else f"no answer in {self._limit_s} s",
            )
        outcome, finding, peak = json.loads(line)
        limit = LIMIT_MB["image" if kind in mutations.IMAGES else "other"]
        if peak - self._peak > limit:
            outcome, finding = "finding", finding or f"took {peak - self._peak:.0f} MB"
            self.stop()
        self._peak = peak
        return outcome, finding

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, self._script, "--judge"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._peak = json.loads(self._process.stdout.readline())[2]
        return self._process

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def plan(count: int, kinds: Sequence[str]) -> list[str]:
    """The kind of each input: of all kinds, images take `IMAGES_SHARE`."""
    images, others = ([k for k in kinds if (k in mutations.IMAGES) is which] for which in (True, False))
    share = round(count * (IMAGES_SHARE if others else 1)) if images else 0
    return [images[n % len(images)] for n in range(share)] + [
        others[n % len(others)] for n in range(count - share)
    ]


def run(count: int, seed: int, kinds: Sequence[str], keep: Path, workers: int = 2) -> Result:
    """Makes and judges `count` inputs; those that are findings stay in the folder `keep`."""
    result = Result()
    keep.mkdir(parents=True, exist_ok=True)

    def work(first: int, folder: Path) -> None:
        valid = mutations.originals(folder)
        judging = Judge(keep / f"judge{first}.log")
        for number, kind in list(enumerate(plan(count, kinds)))[first::workers]:
            draw = random.Random(f"{seed} {kind} {number}")
            data = mutations.damaged(kind, valid[kind], draw)
            place = folder / "input"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            file = place / f"input{draw.choice(mutations.IMAGES.get(kind, '.file').split())}"
            file.write_bytes(data)
            outcome, finding = judging(kind, file)
            result.outcomes[kind, outcome] += 1
            if finding:
                kept = keep / f"{kind}-{seed}-{number}{file.suffix}"
                kept.write_bytes(data)
                result.findings.append(Finding(kind, number, " ".join(finding.split())[:500], str(kept)))
        judging.stop()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as threads:
        for done in [threads.submit(work, first, Path(folder, str(first))) for first in range(workers)]:
            done.result()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=mutations.KINDS, default=mutations.KINDS)
    parser.add_argument("--json", type=Path, help="file for outcomes and findings")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for findings")
    args = parser.parse_args()
    result = run(args.count, args.seed, args.kinds, args.keep)
    columns = sorted({outcome for _, outcome in result.outcomes})
    print("| kind | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for kind in args.kinds:
        print(f"| {kind} | " + " | ".join(str(result.outcomes[kind, column]) for column in columns) + " |")
    for finding in result.findings:
        print(f"{finding.file}: {finding.what}")
    print(f"{len(result.findings)} findings in {args.count} inputs")
    if args.json:
        table: dict[str, Any] = {kind: {} for kind in args.kinds}
        for (kind, outcome), times in sorted(result.outcomes.items()):
            table[kind][outcome] = times
        found = [asdict(finding) for finding in result.findings]
        args.json.write_text(json.dumps({"seed": args.seed, "outcomes": table, "findings": found}, indent=1))
    return bool(result.findings)


if __name__ == "__main__":
    if sys.argv[1:] == ["--judge"]:
        serve()
    else:
        sys.exit(main())
