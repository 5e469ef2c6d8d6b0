"""The parts of `dali-views bench`: speed, cost in training, memory and the decoder, on any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...data.index import SampleIndex
from ...plan.views import View
from ...system.machine import machine
from . import checks, loaders, training
from .contest import Report, Row, Setup, read_csv, table, write_csv

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
    report: Report = print,
) -> list[Row]:
    """Measure some `parts`; each figure holds the configuration that it belongs to.

    Args:
        workers: DataLoader processes of the peers, threads of graphs.
        rounds, seconds: turns of each contender and their length, after a warm-up.
        only: contenders to keep, by a part of their name (`loaders`).
        models: torchvision ResNets to train (`training`).
        batches: how long memory is watched; batch_sizes: for which peaks are measured (`memory`).
        cold: drop the images from the page cache before every turn.
        elsewhere: the same images in other places, by name (`sources`).
        report: receives lines about progress and about what is left out.

    Raises:
        ValueError: for an unknown part, or an index without files.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"{part!r} is not a part of the bench; choose from {', '.join(PARTS)}.")
    if index.paths is None:
        raise ValueError("The bench reads files; give an index of a folder or of a list.")

    def set_up(index: SampleIndex) -> Setup:
        # A small set is repeated, so that no contender waits for the end of an epoch every few batches.
        times = 1 if cold else -(-_EPOCH // len(index))
        repeated = index.subset(np.tile(np.arange(len(index)), times))
        return Setup(repeated, list(views), batch_size, device, workers, hw_decoder_load, seed)

    setup = set_up(index)
    rows: list[Row] = []
    if "loaders" in parts:
        rows += loaders.compare(setup, rounds, seconds, only=only, cold=cold, report=report)
    for model in models if "training" in parts else ():
        rows += training.measure(setup, model, rounds, seconds, report)
    if "memory" in parts:
        rows += checks.memory(setup, batches, batch_sizes, report)
    if "decoder" in parts:
        rows += checks.decoder(setup, report=report)
    if "sources" in parts:
        others = {name: set_up(other) for name, other in (elsewhere or {}).items()}
        places = {os.path.basename(index.root): setup} | others
        rows += loaders.compare_places(places, rounds, seconds, cold)
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
