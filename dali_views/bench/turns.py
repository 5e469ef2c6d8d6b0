"""Contenders take turns, round after round, so that a machine whose speed drifts hurts all alike.

A contender exists during its own turn only, so that none works ahead while another is measured.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from ..index import SampleIndex
from .contender import Batches, Contender

_WARM_UP = 4  # batches: as many as a DataLoader's two workers hold ready


def take_turns(
    contenders: Sequence[Contender],
    rounds: int,
    seconds: float,
    *,
    before: Callable[[], None] | None = None,
    told: Callable[[str], None] = print,
) -> dict[str, list[float]]:
    """Images per second of each contender in every round.

    Args:
        rounds: turns of each; seconds: length of a turn, after a warm-up.
        before: called before each turn, for instance to empty the page cache; then nothing is warmed up.
        told: receives a line about a peer that fails. It leaves the comparison; the others go on.
    """
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            if contender.name not in rates:
                continue
            if before is not None:
                before()
            try:
                rates[contender.name].append(rate(contender.start(), seconds, warm=before is None))
            except Exception as error:
                if contender.kind != "peer":
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                told(f"left out: {contender.name} failed ({reason})")
                del rates[contender.name]
            gc.collect()
    return rates


def rate(batches: Batches, seconds: float, *, warm: bool = True) -> float:
    """Images per second of one turn; if `warm`, from when processes run and queues are filled."""
    try:
        for _ in range(_WARM_UP if warm else 0):
            next(batches)
        began, images, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < seconds:
            images += next(batches)
            elapsed = time.perf_counter() - began
    finally:
        batches.close()
    return images / elapsed


def forget_files(index: SampleIndex) -> None:
    """Ask the kernel to drop the images from the page cache, so that the next turn reads the disk."""
    for row in np.unique(index.path_rows(np.arange(len(index))), axis=0):
        with open(bytes(row).rstrip(b"\0"), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
