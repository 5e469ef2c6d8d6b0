"""`dali-views bench`: the one place where speed is judged, on any folder, in one run.

`loaders` sets ours beside the limits and the peers, `training` says what loading costs a model, `memory` what
it takes and whether it grows, `decoder` whether the hardware decoder's pixels can be trusted,
`sources` what it costs to keep the images elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...data.index import SampleIndex
from ...plan.views import View
from ...system.machine import machine
from . import decoder, loaders, memory, sources, training
from .contender import Setup
from .results import Row, read_csv, table, write_csv

__all__ = ["PARTS", "Row", "Setup", "read_csv", "run", "table", "write_csv"]

PARTS = ("loaders", "training", "memory", "decoder", "sources")

_EPOCH = 50_000  # images


def run(
    index: SampleIndex,
    views: Sequence[View],
    *,
    parts: Sequence[str] = ("loaders",),
    batch_size: int,
    device: str,
    workers: int,
    rounds: int = 3,
    seconds: float = 10.0,
    only: Sequence[str] = (),
    models: Sequence[str] = training.MODELS,
    batches: int = 10_000,
    batch_sizes: Sequence[int] = (),
    cold: bool = False,
    hw_decoder_load: float = 0.65,
    recipe: str = "",
    seed: int = 0,
    elsewhere: Mapping[str, SampleIndex] | None = None,
    told: Callable[[str], None] = print,
) -> list[Row]:
    """Measure the parts asked for and return their figures, each with the configuration it belongs to.

    Args:
        parts: some of `PARTS`.
        workers: DataLoader processes of the peers, threads of graphs.
        rounds, seconds: turns that each contender takes and their length, after a warm-up.
        only: contenders to keep, by a part of their name (`loaders`).
        models: torchvision ResNets to train (`training`).
        batches: how long memory is watched; batch_sizes: for which peaks are taken (`memory`).
        cold: drop the images from the page cache before every turn.
        seed: of the order and of what views are drawn.
        elsewhere: the same images in other places, by a name for each (`sources`).
        told: receives lines about progress and about what is left out.

    Raises:
        ValueError: for an unknown part, or an index without files where files are read.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"{part!r} is no part of the bench; there are {', '.join(PARTS)}.")
    if index.paths is None:
        raise ValueError("The bench reads files; give an index of a folder or of a list.")

    def set_up(index: SampleIndex) -> Setup:
        # A small set is repeated, so that no one pays for the ends of an epoch every few batches.
        times = 1 if cold else -(-_EPOCH // len(index))
        repeated = index.subset(np.tile(np.arange(len(index)), times))
        return Setup(repeated, list(views), batch_size, device, workers, hw_decoder_load, seed)

    setup = set_up(index)
    rows: list[Row] = []
    if "loaders" in parts:
        rows += loaders.compare(setup, rounds=rounds, seconds=seconds, only=only, cold=cold, told=told)
    if "training" in parts:
        rows += training.measure(setup, rounds=rounds, seconds=seconds, models=models, told=told)
    if "memory" in parts:
        threads = sorted({max(1, workers // 2), workers})
        rows += memory.measure(setup, batches=batches, batch_sizes=batch_sizes, threads=threads, told=told)
    if "decoder" in parts:
        rows += decoder.check(setup, told=told)
    if "sources" in parts:
        places = {os.path.basename(index.root): setup} | {
            name: set_up(other) for name, other in (elsewhere or {}).items()
        }
        rows += sources.compare(places, rounds=rounds, seconds=seconds, cold=cold)
    setting: dict[str, str | int | float] = {
        "recipe": recipe,
        "size": views[0].size,
        "batch_size": batch_size,
        "workers": workers,
        "cache": "cold" if cold else "warm",
        "hw_decoder_load": hw_decoder_load if device == "gpu" else "",
        "images": len(index),
        "machine": machine(device),
    }
    return [replace(row, setting=setting) for row in rows]
