"""Damaged files of every kind that is loaded: each ends as a result or as an error that is documented.

python tests/fuzz.py --count 10000 --seed 0 [--kinds jpeg list ...] [--keep folder]

A process judges many inputs. One that kills or stops this process, takes much memory or raises something else
is a finding: it is printed and kept in a folder, and the next one is judged.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import mutations
import numpy as np

from dali_views import RegionTable, SampleIndex
from dali_views.data.scan import FileScan, read_index
from dali_views.graph.decode import Alone
from dali_views.regions import Snapshot
from trainers.config import file as config_file
from trainers.engine import checkpoint

LIMIT_S = 60
LIMIT_MB = {"image": 2500, "other": 300}
"""Rise of the resident memory. An image of as many pixels as the scan accepts has 540 MB in each copy."""
IMAGES_SHARE = 0.4
QUIET = {"cache": False, "progress": False}


class Finding(NamedTuple):
    """An input that was not handled."""

    what: str
    file: str


@dataclass
class Result:
    """Outcome of a run: how often each kind had each outcome, and the findings."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)


# ---- in the judging process


def judge(kind: str, file: Path) -> str:
    """Loads one file and uses what was loaded; the outcome in a few words."""
    if kind in mutations.IMAGES:
        try:
            SampleIndex.from_folder(file.parent, **QUIET)
        except ValueError:
            return "left out"
        return "undecodable" if Alone("cpu", None).refusal(file.read_bytes()) else "image"
    try:
        loaded, outcome = load(kind, file, file.parent.parent / "images")
    except (ValueError, FileNotFoundError) as error:
        if "\n" in str(error):
            raise RuntimeError(f"an error of several lines: {error}") from error
        return "refused"
    try:
        use(loaded, read=kind in ("shard", "table", "lmdb"))
    except ValueError as error:
        raise RuntimeError(f"loaded, but of no use: {error}") from error
    return outcome


def load(kind: str, file: Path, images: Path) -> tuple[object, str]:
    """What a file holds, and whether it was loaded as a whole."""
    if kind == "list":
        return SampleIndex.from_list(file, images, **QUIET), "loaded"
    if kind == "coco":
        return SampleIndex.from_coco(images, file, **QUIET), "loaded"
    if kind == "index":
        kept = FileScan if b"stamp_files" in file.read_bytes() else SampleIndex
        return (SampleIndex.load(file), read_index(file, kept)), "loaded"
    if kind == "regions":
        return RegionTable.load(file), "loaded"
    if kind == "yaml":
        return config_file.load(file), "loaded"
    if kind == "checkpoint":
        folder = file.parent
        shutil.copyfile(folder.parent / checkpoint.LAST, folder / checkpoint.PREVIOUS)
        file.replace(folder / checkpoint.LAST)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            state = checkpoint.load(folder)
        try:
            RegionTable(3).load_state_dict(state["regions"])
            Snapshot.from_state_dict(state["regions"])
            config_file.parse(state["config"])
        except (KeyError, TypeError) as error:
            raise ValueError("it lacks a part") from error
        return state, "fell back" if heard else "loaded"
    make = {"shard": SampleIndex.from_shards, "table": SampleIndex.from_table, "lmdb": SampleIndex.from_lmdb}
    ending = {"shard": ".tar", "table": ".parquet", "lmdb": file.suffix}
    index = make[kind](file.rename(file.with_suffix(ending[kind])), **QUIET)
    return index, "left out" if index.left_out else "loaded"


def use(loaded: object, read: bool = False) -> None:
    """Does with what was loaded what a run does; if `read`, also with the images of an index."""
    if isinstance(loaded, tuple):
        for one in loaded:
            use(one)
    elif isinstance(loaded, SampleIndex):
        for row in range(len(loaded)):
            loaded.path(row), loaded.truth(row)
        if loaded.form == "names":
            loaded.inputs(np.arange(len(loaded)))
        loaded.subset([0]).summary()
        assert all(label == -1 or loaded.classes[label] for label in loaded.labels)
        for row in (
            range(len(loaded)) if loaded.holder and Path(loaded.root, *loaded.files[:1]).exists() else ()
        ):
            content = loaded.encoded(row)  # what the scan has read once, can be read
            assert loaded.holder == "groups" or len(content) == loaded.places[row, 2]
    elif isinstance(loaded, FileScan):
        loaded.records(), loaded.holds()
    elif isinstance(loaded, RegionTable):
        loaded.snapshot(), loaded.state_dict(), loaded.update([0], weights=[1.0])


def peak() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def watched(judge: Callable[[str, Path], str], kind: str, file: Path, limit_s: int) -> tuple[str, str, float]:
    """(outcome, what was found, peak) of a file; the alarm ends a process that hangs."""
    signal.alarm(limit_s)
    try:
        return judge(kind, file), "", peak()
    except Exception as error:
        return "finding", f"{type(error).__name__}: {error}", peak()
    finally:
        signal.alarm(0)


def silence(log: Path) -> None:
    """What a library prints goes to a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)


# ---- in the process that sees what comes of it


class Judge:
    """Judges in a process of its own, which is started again when it has died or grown."""

    def __init__(self, log: Path, judge: Callable[[str, Path], str] = judge, limit_s: int = LIMIT_S) -> None:
        self._log, self._judge, self._limit_s = log, judge, limit_s
        self._pool: ProcessPoolExecutor | None = None
        self._peak = 0.0

    def __call__(self, kind: str, file: Path) -> tuple[str, str]:
        """(outcome, what was found) of a file."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("forkserver"), silence, (self._log,))
            self._peak = self._pool.submit(peak).result()
        try:
            work = self._pool.submit(watched, self._judge, kind, file, self._limit_s)
            outcome, finding, peak_mb = work.result()
        except BrokenProcessPool:
            self.stop()
            return "finding", f"the process died: a crash, or no answer in {self._limit_s} s"
        if peak_mb - self._peak > LIMIT_MB["image" if kind in mutations.IMAGES else "other"]:
            outcome, finding = "finding", finding or f"took {peak_mb - self._peak:.0f} MB"
            self.stop()
        self._peak = peak_mb
        return outcome, finding

    def stop(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def plan(count: int, kinds: Sequence[str]) -> list[str]:
    """The kind of each input; with others, images take `IMAGES_SHARE`."""
    images, others = ([k for k in kinds if (k in mutations.IMAGES) is which] for which in (True, False))
    share = round(count * (IMAGES_SHARE if others else 1)) if images else 0
    return [(images if n < share else others)[n % len(images if n < share else others)] for n in range(count)]


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
                result.findings.append(Finding(" ".join(finding.split())[:500], str(kept)))
        judging.stop()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as threads:
        for done in [threads.submit(work, first, Path(folder, str(first))) for first in range(workers)]:
            done.result()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=mutations.KINDS, default=mutations.KINDS)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for findings")
    args = parser.parse_args()
    result = run(args.count, args.seed, args.kinds, args.keep)
    for (kind, outcome), times in sorted(result.outcomes.items()):
        print(f"{kind:12} {outcome:12} {times}")
    for finding in result.findings:
        print(f"{finding.file}: {finding.what}")
    print(f"{len(result.findings)} findings in {args.count} inputs")
    return bool(result.findings)


if __name__ == "__main__":
    sys.exit(main())
