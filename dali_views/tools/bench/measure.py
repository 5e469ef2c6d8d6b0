"""The parts of `dali-views bench`: speed, cost in training, memory and the decoder, on any images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...data.index import SampleIndex
from ...graph.build import default_threads
from ...plan import recipes
from ...system.machine import machine
from .. import options
from . import checks, loaders, training
from .contest import Report, Row, Setup

_EPOCH = 50_000  # images


def run(
    args: argparse.Namespace,
    index: SampleIndex,
    elsewhere: Mapping[str, SampleIndex],
    report: Report = print,
) -> list[Row]:
    """Measure the parts of `args`; each figure holds the configuration that it belongs to.

    Args:
        args: options of the command.
        elsewhere: the same images in other places, by name.
        report: receives lines about progress and about what is left out.
    """
    device, workers = options.device(args), args.workers or default_threads()
    batch_size = args.batch_size or {"gpu": 256}.get(device, 64)
    views = recipes.BY_NAME[args.recipe](args.size)
    turns = args.rounds, args.seconds

    def set_up(index: SampleIndex) -> Setup:
        # A small set is repeated, so that no contender waits for the end of an epoch every few batches.
        times = 1 if args.cold else -(-_EPOCH // len(index))
        repeated = index.subset(np.tile(np.arange(len(index)), times))
        return Setup(repeated, views, batch_size, device, workers, args.hw_decoder_load, args.seed)

    setup, rows = set_up(index), []
    parts = args.parts or (["sources"] if args.source else ["loaders"])
    if "loaders" in parts:
        rows += loaders.compare(setup, *turns, only=args.only, cold=args.cold, report=report)
    for model in args.models if "training" in parts else ():
        rows += training.measure(setup, model, *turns, report)
    if "memory" in parts:
        rows += checks.memory(setup, args.batches, args.batch_sizes, report)
    if "decoder" in parts:
        rows += checks.decoder(setup, report=report)
    if "sources" in parts:
        places = {os.path.basename(index.root): setup}
        places |= {name: set_up(other) for name, other in elsewhere.items()}
        rows += loaders.compare_places(places, *turns, args.cold)
    setting: dict[str, str | int | float] = {
        "recipe": args.recipe,
        "size": args.size,
        "batch_size": batch_size,
        "workers": workers,
        "cache": "cold" if args.cold else "warm",
        "hw_decoder_load": args.hw_decoder_load if device == "gpu" else "",
        "images": len(index),
        "machine": machine(device),
    }
    return [replace(row, setting=setting) for row in rows]
