"""Damaged files in a short form of `fuzz.py`; and whoever watches over them sees what he should."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fuzz
import mutations
import pytest


def bad_judge(failure: str, file: Path) -> str:
    """Fails in the way that is named."""
    if failure == "crash":
        os.abort()
    if failure == "hang":
        time.sleep(1000)
    return "loaded" if b"x" * (330 << 20) else ""


@pytest.mark.parametrize("count", [250, pytest.param(4000, marks=pytest.mark.slow)])
def test_no_damaged_file_crashes_hangs_or_takes_the_memory(tmp_path: Path, count: int) -> None:
    result = fuzz.run(count, seed=7, kinds=mutations.KINDS, keep=tmp_path / "found")
    assert result.findings == []
    outcomes = {outcome for _, outcome in result.outcomes}
    assert outcomes == {"image", "left out", "undecodable", "loaded", "fell back", "refused"}
    assert {kind for kind, _ in result.outcomes} == set(mutations.KINDS)


def test_an_input_is_the_same_whoever_makes_it(tmp_path: Path) -> None:
    valid = mutations.originals(tmp_path / "a")["list"]
    made = [[mutations.damaged("list", valid, fuzz.random.Random(f"0 {n}")) for n in range(50)] for _ in "ab"]
    assert made[0] == made[1]
    assert len(set(made[0])) > 40


@pytest.mark.parametrize(
    ("failure", "words"), [("crash", "process died"), ("hang", "no answer in 1 s"), ("memory", "took 3")]
)
def test_a_crash_a_hang_and_a_leap_of_the_memory_are_found_and_the_next_is_judged(tmp_path, failure, words):
    judge = fuzz.Judge(tmp_path / "log", bad_judge, limit_s=1 if failure == "hang" else fuzz.LIMIT_S)
    for _ in range(2):
        outcome, finding = judge(failure, tmp_path)
        assert outcome == "finding"
        assert words in finding
    judge.stop()
