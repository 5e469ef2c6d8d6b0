"""dali-views bench: speed beside the limits and other loaders, cost in training, memory."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...data.index import SampleIndex
from ...data.remote import absolute
from ...plan import recipes
from ...system.machine import machine
from .. import options
from ..command_line import Answer

if TYPE_CHECKING:
    from .contest import Row

EXAMPLES = """
dali-views bench photos
dali-views bench photos --parts training memory --csv figures.csv
dali-views bench photos --source shards/*.tar --source s3://bucket/photos
"""
_EPOCH = 50_000  # images


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_images(parser)
    options.add_views(parser)
    add, number = parser.add_argument, options.at_least
    parts = ["loaders", "training", "memory", "decoder", "pixels", "sources"]
    add("--parts", nargs="+", choices=parts, help="what to measure (loaders; with --source: sources)")
    elsewhere = "the same images from another source, measured beside; may be repeated"
    add("--source", nargs="+", action="append", default=[], metavar="IMAGES", help=elsewhere)
    add("--batch-size", type=number(1), help="default: 256 on a GPU, 64 on the CPU")
    add("--workers", type=number(1), help="processes of DataLoaders, threads of graphs (all cores)")
    add("--rounds", type=number(1), default=3, help="turns of each loader (3)")
    add("--seconds", type=float, default=10.0, help="length of a turn (10)")
    add("--only", nargs="+", default=[], metavar="NAME", help="loaders to keep, by name or part of it")
    models = "torchvision ResNets to train, and barlow_vit_s16: stable-pretraining's speed test"
    add("--models", nargs="+", default=["resnet18", "resnet50"], help=models)
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="after this time, start no further peer and no further round",
    )
    add("--batches", type=number(2), default=10_000, help="batches over which memory is watched (10000)")
    sizes = "batch sizes whose peak memory is measured"
    add("--batch-sizes", type=number(1), nargs="+", default=[], metavar="B", help=sizes)
    add("--cold", action="store_true", help="empty the page cache before every turn")
    add("--hw-decoder-load", type=float, default=1.0, help="share of JPEGs for the hardware decoder (1)")
    add("--csv", type=Path, help="write the results here too")


def run(args: argparse.Namespace) -> Answer:
    """Measures the parts that were named."""
    from . import contest  # the parts load PyTorch and DALI, which the help does without

    if args.seconds <= 0:
        raise ValueError(f"--seconds is the length of a turn, above 0; got {args.seconds:g}.")
    if args.minutes <= 0:
        raise ValueError(f"--minutes is the time to begin turns in, above 0; got {args.minutes:g}.")
    if args.source and args.parts and "sources" not in args.parts:
        raise ValueError("--source needs the part sources; name it in --parts, or leave --parts out.")
    index = options.open_index(args)
    print(index.summary())
    places = dict(zip(_places(index.root, args.source), map(options.open_images, args.source), strict=True))
    rows: list[Row] = []
    for found in _measured(args, index, places):
        rows += found
        if args.csv is not None:
            contest.write_csv(rows, args.csv)  # after every part, for the next may be killed
    setting = rows[0].setting
    text = (
        f"{setting['machine']}\n{args.recipe}, {args.size} pixels, batch {setting['batch_size']}, "
        f"{setting['workers']} workers, {setting['cache']} cache\n\n{contest.table(rows)}"
    )
    if args.csv is not None:
        text += f"\nwritten to {args.csv}"
    return Answer({"rows": [asdict(row) for row in rows]}, text)


def _places(first: str, sources: Sequence[Sequence[str]]) -> list[str]:
    """A name for each place: the last part of its path, or the whole where that is another's, too."""
    paths = [absolute(where[0]) for where in sources]
    short = [os.path.basename(path) for path in paths]
    taken = [os.path.basename(first), *short]
    return [path if taken.count(name) > 1 else name for path, name in zip(paths, short, strict=True)]


def _measured(
    args: argparse.Namespace, index: SampleIndex, elsewhere: Mapping[str, SampleIndex]
) -> Iterator[list[Row]]:
    """The figures of each part with their setting; `elsewhere`: the same images in other places, by name."""
    from ...graph.build import default_threads
    from . import costs, loaders, peers, pixels
    from .contest import Setup

    device, workers = options.device(args), args.workers or default_threads()
    batch_size = args.batch_size or {"gpu": 256}.get(device, 64)
    views, turns = recipes.BY_NAME[args.recipe](args.size), (args.rounds, args.seconds)

    def set_up(index: SampleIndex) -> Setup:
        # A small set is repeated, so that no contender waits for the end of an epoch every few batches.
        times = 1 if args.cold else -(-_EPOCH // len(index))
        repeated = index.subset(np.tile(np.arange(len(index)), times))
        return Setup(repeated, views, batch_size, device, workers, args.hw_decoder_load, args.seed)

    setup = set_up(index)
    parts = args.parts or (["sources"] if args.source else ["loaders"])
    models = args.models if "training" in parts else []
    contests = len(models) + ("loaders" in parts)
    end: float = time.monotonic() + 60 * args.minutes

    def until() -> float:
        """The end of a fair share of the time that is left."""
        nonlocal contests
        now, contests = time.monotonic(), contests - 1
        return now + (end - now) / (contests + 1)

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

    def told(rows: Sequence[Row]) -> list[Row]:
        return [replace(row, setting=setting) for row in rows]

    if "loaders" in parts:
        contenders = peers.installed(setup)
        yield told(loaders.compare(setup, contenders, *turns, only=args.only, cold=args.cold, until=until()))
    for model in models:
        yield told(costs.training(setup, model, *turns, until=until()))
    if "memory" in parts:
        yield told(costs.memory(setup, args.batches, args.batch_sizes))
    if "decoder" in parts:
        yield told(pixels.decoder(setup))
    if "pixels" in parts:
        yield told(pixels.pixels(setup))
    if "sources" in parts:
        places = {name: set_up(other) for name, other in elsewhere.items()}
        yield told(loaders.compare_places({os.path.basename(index.root): setup} | places, *turns, args.cold))
