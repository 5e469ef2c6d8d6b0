"""Contenders take turns, round after round, so that a machine whose speed drifts hurts all alike.

A contender exists during its own turn only, so that none works ahead while another is measured.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence

from ...data.index import SampleIndex
from ...data.remote import is_remote
from .contender import Batches, Contender

WARM_UP = 4  # batches: as many as a DataLoader's two workers hold ready


def take_turns(
    contenders: Sequence[Contender],
    rounds: int,
    seconds: float,
    *,
    before: Callable[[], None] | None = None,
    images: float = math.inf,
    told: Callable[[str], None] = print,
) -> dict[str, list[float]]:
    """Images per second of each contender in every round.

    Args:
        rounds: turns of each; seconds: length of a turn, after a warm-up.
        before: called before each turn, for instance to empty the page cache.
        images: a turn ends with this many, warm-up included, though its time is not over.
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
                rates[contender.name].append(rate(contender.start(), seconds, images))
            except Exception as error:
                if contender.kind != "peer":
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                told(f"left out: {contender.name} failed ({reason})")
                del rates[contender.name]
            gc.collect()
    return rates


def rate(batches: Batches, seconds: float, most: float = math.inf) -> float:
    """Images per second of one turn, from when processes run and queues are filled."""
    try:
        most -= sum(next(batches) for _ in range(WARM_UP))
        began, images, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < seconds and images < most:
            images += next(batches)
            elapsed = time.perf_counter() - began
    finally:
        batches.close()
    return images / elapsed


def forget_files(index: SampleIndex) -> None:
    """Ask the kernel to drop the images from the page cache, so that the next turn reads the disk."""
    files = [os.path.join(index.root, file) for file in index.files]
    for path in files or map(index.path, range(len(index))):
        if is_remote(path):
            raise ValueError(f"{index.root} is no disk whose cache could be emptied; leave --cold out.")
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
