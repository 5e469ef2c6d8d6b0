"""Damaged files of every kind that is loaded: each ends as a result or as an error that is documented.

A process judges many inputs. One that kills or stops it, takes much memory or raises another error is a
finding, and the next one is judged. `python tests/test_fuzz.py --inputs 10000 --seed 1` makes more of them.
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
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import mutations
import pytest

from dali_views import RegionTable, SampleIndex
from dali_views.data.scan import FileScan, read_index
from dali_views.graph.decode import Alone
from dali_views.regions import Snapshot
from trainers.config import file as config_file
from trainers.engine import checkpoint

LIMIT_S = 60
# Rise of the resident memory. An image of as many pixels as the scan accepts has 540 MB in each copy.
LIMIT_MB = {"image": 2500, "other": 300}
QUIET = {"cache": False, "progress": False}
_SELF, _STARTED = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN


def judge(kind: str, file: Path) -> str:
    """Loads one file and uses what was loaded; the outcome in a few words."""
    if kind in mutations.IMAGES:
        try:
            SampleIndex.from_folder(file.parent, **QUIET)
        except ValueError:
            return "left out"
        return "undecodable" if Alone("cpu", None).refusal(file.read_bytes()) else "image"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            loaded = LOAD[kind](file, file.parent.parent / "images")
        except (ValueError, FileNotFoundError) as error:
            if "\n" in str(error):
                raise RuntimeError(f"an error of several lines: {error}") from error
            return "refused"
    try:
        use(loaded)
    except ValueError as error:
        raise RuntimeError(f"loaded, but of no use: {error}") from error
    if kind == "checkpoint" and heard:
        return "fell back"
    return "left out" if getattr(loaded, "left_out", ()) else "loaded"


def stored_index(file: Path, _: Path) -> object:
    """An index, also one that a scan has kept."""
    kept = FileScan if b"stamp_files" in file.read_bytes() else SampleIndex
    return SampleIndex.load(file), read_index(file, kept)


def resumed(file: Path, _: Path) -> object:
    """The state of a run whose last checkpoint is the file, and whose one before is whole."""
    folder = file.parent
    shutil.copyfile(folder.parent / checkpoint.LAST, folder / checkpoint.PREVIOUS)
    file.replace(folder / checkpoint.LAST)
    state = checkpoint.load(folder)
    try:
        RegionTable(3).load_state_dict(state["regions"])
        Snapshot.from_state_dict(state["regions"])
        config_file.parse(state["config"])
    except (KeyError, TypeError) as error:
        raise ValueError("it lacks a part") from error
    return state


LOAD: dict[str, Callable[[Path, Path], object]] = {
    "list": lambda file, images: SampleIndex.from_list(file, images, **QUIET),
    "coco": lambda file, images: SampleIndex.from_coco(images, file, **QUIET),
    "index": stored_index,
    "regions": lambda file, _: RegionTable.load(file),
    "checkpoint": resumed,
    "yaml": lambda file, _: config_file.load(file),
    "shard": lambda file, _: SampleIndex.from_shards(file, **QUIET),
    "table": lambda file, _: SampleIndex.from_table(file, **QUIET),
    "lmdb": lambda file, _: SampleIndex.from_lmdb(file, **QUIET),
}
"""Loads a file of each kind; the images that it names are in the folder."""


def use(loaded: object, stored: bool = False) -> None:
    """Does with what was loaded what a run does. The files of a `stored` index may have changed since."""
    if isinstance(loaded, tuple):
        for one in loaded:
            use(one, stored=True)
    elif isinstance(loaded, SampleIndex):
        for row in range(len(loaded)):
            loaded.path(row), loaded.truth(row)
        loaded.subset([0]).summary()
        assert all(label == -1 or loaded.classes[label] for label in loaded.labels)
        # `os.path`: a damaged name may be longer than Path.exists takes.
        there = loaded.holder and os.path.exists(os.path.join(loaded.root, *loaded.files[:1]))
        for row in range(len(loaded)) if there else ():
            try:
                content = loaded.encoded(row)  # what the scan has read once, can be read
            except OSError as error:
                # A stored stamp that is damaged looks like a file that has changed: that sentence, no other.
                if not stored or "has changed since it was indexed" not in str(error):
                    raise
                break
            assert loaded.holder == "groups" or len(content) == loaded.places[row, 2]
    elif isinstance(loaded, FileScan):
        loaded.records(), loaded.holds()
    elif isinstance(loaded, RegionTable):
        loaded.snapshot(), loaded.state_dict(), loaded.update([0], weights=[1.0])


def peak() -> float:
    """Largest resident memory so far of this process or of one that it started, MB."""
    return max(resource.getrusage(who).ru_maxrss for who in (_SELF, _STARTED)) / 1024


def watched(judge: Callable[[str, Path], str], kind: str, file: Path, limit_s: int) -> tuple[str, str]:
    """(outcome, what was found) of a file; the alarm ends a process that hangs."""
    before = peak()
    signal.alarm(limit_s)
    try:
        outcome = judge(kind, file)
        if (rise := peak() - before) > LIMIT_MB["image" if kind in mutations.IMAGES else "other"]:
            raise RuntimeError(f"took {rise:.0f} MB")
        return outcome, ""
    except Exception as error:
        return "finding", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def silence(log: Path) -> None:
    """What a library prints goes to a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)


class Judge:
    """Judges in a process of its own, which is started again after a finding."""

    def __init__(self, log: Path, judge: Callable[[str, Path], str] = judge, limit_s: int = LIMIT_S) -> None:
        self._log, self._judge, self._limit_s = log, judge, limit_s
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, kind: str, file: Path) -> tuple[str, str]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("forkserver"), silence, (self._log,))
        try:
            outcome, found = self._pool.submit(watched, self._judge, kind, file, self._limit_s).result()
        except BrokenProcessPool:
            outcome, found = "finding", f"the process died: a crash, or no answer in {self._limit_s} s"
        if found:
            self.stop()
        return outcome, found

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def run(
    count: int, seed: int, kinds: Sequence[str], folder: Path, workers: int = 2, limit_s: int = LIMIT_S
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Makes and judges `count` inputs: how often each kind had each outcome, and the findings."""
    outcomes: Counter[tuple[str, str]] = Counter()
    findings: list[str] = []

    def work(first: int) -> None:
        place = folder / str(first) / "input"
        valid = mutations.originals(place.parent)
        judging = Judge(folder / f"judge{first}.log", limit_s=limit_s)
        for number in range(first, count, workers):
            kind = kinds[number % len(kinds)]
            draw = random.Random(f"{seed} {kind} {number}")
            data = mutations.damaged(kind, valid[kind], draw)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            file = place / f"input{draw.choice(mutations.ENDINGS.get(kind, '.file').split())}"
            file.write_bytes(data)
            outcome, finding = judging(kind, file)
            outcomes[kind, outcome] += 1
            if finding:
                kept = folder / f"{kind}-{seed}-{number}{file.suffix}"
                kept.write_bytes(data)
                findings.append(f"{kept}: {' '.join(finding.split())[:500]}")
        judging.stop()

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(work, range(workers)))
    return outcomes, findings


def bad_judge(failure: str, file: Path) -> str:
    if failure == "crash":
        os.abort()
    if failure == "hang":
        time.sleep(1000)
    return "loaded" if b"x" * (330 << 20) else ""


@pytest.mark.parametrize("count", [250, pytest.param(4000, marks=pytest.mark.slow)])
def test_no_damaged_file_crashes_hangs_or_takes_the_memory(tmp_path: Path, count: int) -> None:
    outcomes, findings = run(count, seed=7, kinds=mutations.KINDS, folder=tmp_path)
    assert findings == []
    kinds, found = map(set, zip(*outcomes, strict=True))
    assert found == {"image", "left out", "undecodable", "loaded", "fell back", "refused"}
    assert kinds == set(mutations.KINDS)


@pytest.mark.parametrize(
    ("failure", "words"), [("crash", "process died"), ("hang", "no answer in 1 s"), ("memory", "took 3")]
)
def test_a_crash_a_hang_and_a_leap_of_the_memory_are_found_and_the_next_is_judged(tmp_path, failure, words):
    judge = Judge(tmp_path / "log", bad_judge, limit_s=1 if failure == "hang" else LIMIT_S)
    for _ in range(2):
        outcome, finding = judge(failure, tmp_path)
        assert (outcome, words in finding) == ("finding", True), finding
    judge.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=mutations.KINDS, choices=mutations.KINDS)
    parser.add_argument("--limit", type=int, default=LIMIT_S, metavar="SECONDS", help="for each input")
    parser.add_argument("--out", type=Path, help="an empty folder, which keeps the inputs that are findings")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="fuzz"))
    outcomes, findings = run(args.inputs, args.seed, args.kinds, out, limit_s=args.limit)
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:12}{outcome:12}{count:6}")
    print(f"{len(findings)} findings", *findings, sep="\n")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
