"""dali-views pack: a data set as tar shards or, shrunk, as a folder."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from pathlib import Path

from .. import options
from ..command_line import Answer

EXAMPLES = """
dali-views pack photos shards
dali-views pack s3://bucket/train shards --short-side 256
dali-views pack photos photos-256 --folder --short-side 256
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_images(parser)
    parser.add_argument("destination", type=Path, help="new folder, or one that was begun")
    parser.add_argument(
        "--short-side",
        type=options.at_least(1),
        metavar="N",
        help="larger images are shrunk to it, in pixels (shards: all stay as they are; --folder: 256)",
    )
    parser.add_argument("--quality", type=int, help="JPEG quality of re-encoded images (90)")
    parser.add_argument(
        "--per-shard",
        type=options.at_least(1),
        metavar="COUNT",
        help="images in a shard, counted before any is left out or shrunk (10000: of ImageNet's about 1 GB)",
    )
    parser.add_argument(
        "--numbers", action="store_true", help="labels in shards are numbers, never names of classes"
    )
    parser.add_argument("--folder", action="store_true", help="write a folder of JPEGs instead of tar shards")
    parser.add_argument("--workers", type=options.at_least(1), help="threads (default: all cores)")


def run(args: argparse.Namespace) -> Answer:
    """Carries it out."""
    from ..pack.folder import pack
    from ..pack.shards import pack_shards

    index = options.open_index(args)
    if args.quality is not None and not (args.folder or args.short_side):
        raise ValueError("--quality is of images that are shrunk; give --short-side, too, or leave it out.")
    given = {"short_side": args.short_side, "per_shard": args.per_shard, "quality": args.quality}
    given = {name: value for name, value in given.items() if value is not None}
    given["workers"] = args.workers
    if not args.folder:
        if args.coco is not None:
            warnings.warn("Shards hold labels, but no boxes; a copy with --folder has both.", stacklevel=1)
        packed = pack_shards(index, args.destination, numbers=args.numbers, **given)
    elif args.per_shard is not None or args.numbers:
        raise ValueError("--per-shard and --numbers are of shards; leave them out with --folder.")
    else:
        packed = pack(index, args.destination, instances=args.coco, **given)
    text = f"{args.destination}: {packed}"
    if packed.left_out:
        path, reason = next(iter(packed.left_out.items()))
        text += f"\nleft out, for example: {path}: {reason}; all are in {args.destination / 'left_out.txt'}"
    return Answer(asdict(packed), text)
