"""dali-views bench: speed beside the limits and other loaders, cost in training, memory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...data.remote import absolute
from .. import options
from ..command_line import Answer
from ..open_images import open_images

EXAMPLES = """
dali-views bench photos
dali-views bench photos --parts training memory --csv figures.csv
dali-views bench photos --source shards/*.tar --source s3://bucket/photos
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_images(parser)
    options.add_views(parser)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["loaders", "training", "memory", "decoder", "sources"],
        help="what to measure (loaders; with --source: sources)",
    )
    parser.add_argument(
        "--source",
        nargs="+",
        action="append",
        default=[],
        metavar="IMAGES",
        help="the same images in another place, to be measured beside; may be given several times",
    )
    parser.add_argument("--batch-size", type=options.at_least(1), help="default: 256 on a GPU, 64 on the CPU")
    parser.add_argument(
        "--workers",
        type=options.at_least(1),
        help="processes of DataLoaders, threads of graphs (all cores)",
    )
    parser.add_argument("--rounds", type=options.at_least(1), default=3, help="turns of each loader (3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a turn (10)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="loaders to keep, by part of name"
    )
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"], help="what to train")
    parser.add_argument(
        "--batches", type=options.at_least(2), default=10_000, help="how long memory is watched (10000)"
    )
    parser.add_argument(
        "--batch-sizes",
        type=options.at_least(1),
        nargs="+",
        default=[],
        metavar="B",
        help="whose peak memory is taken",
    )
    parser.add_argument("--cold", action="store_true", help="empty the page cache before every turn")
    parser.add_argument(
        "--hw-decoder-load", type=float, default=0.65, help="share of JPEGs for the hardware decoder (0.65)"
    )
    parser.add_argument("--csv", type=Path, help="write the results here too")


def run(args: argparse.Namespace) -> Answer:
    """Measures the parts that were named."""
    from . import contest, measure  # PyTorch and DALI, which the help does without

    if args.seconds <= 0:
        raise ValueError(f"--seconds is the length of a turn, above 0; got {args.seconds:g}.")
    if args.source and args.parts and "sources" not in args.parts:
        raise ValueError(
            "--source is measured by the part sources; name it in --parts, or leave --parts out."
        )
    index = options.open_index(args)
    print(index.summary())
    places = dict(zip(_places(index.root, args.source), map(open_images, args.source), strict=True))
    rows = measure.run(args, index, places)
    setting = rows[0].setting
    text = (
        f"{setting['machine']}\n{args.recipe}, {args.size} pixels, batch {setting['batch_size']}, "
        f"{setting['workers']} workers, {setting['cache']} cache\n\n{contest.table(rows)}"
    )
    if args.csv is not None:
        contest.write_csv(rows, args.csv)
        text += f"\nwritten to {args.csv}"
    return Answer({"rows": [asdict(row) for row in rows]}, text)


def _places(first: str, sources: Sequence[Sequence[str]]) -> list[str]:
    """A name for each place: the last part of its path, or the whole where that is another's, too."""
    paths = [absolute(where[0]) for where in sources]
    short = [os.path.basename(path) for path in paths]
    taken = [os.path.basename(first), *short]
    return [path if taken.count(name) > 1 else name for path, name in zip(paths, short, strict=True)]
