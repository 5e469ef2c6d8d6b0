"""dali-views pack: a data set as tar shards, with smaller images if desired."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from .. import options
from ..command_line import Answer
from .shards import LEFT_OUT, PER_SHARD, Packed, pack_shards

__all__ = ["Packed", "pack_shards"]

EXAMPLES = """
dali-views pack photos shards
dali-views pack s3://bucket/train shards --short-side 256
dali-views pack coco/train2017 shards --coco coco/annotations/instances_train2017.json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_images(parser)
    number = options.at_least(1)
    parser.add_argument("destination", type=Path, help="new folder, or that of an earlier call to continue")
    parser.add_argument("--short-side", type=number, metavar="N", help="shrink larger images to N pixels")
    parser.add_argument("--quality", type=int, help="JPEG quality of shrunk images (90)")
    text = f"images per shard, before any is left out ({PER_SHARD}: about 1 GB of ImageNet)"
    parser.add_argument("--per-shard", type=number, default=PER_SHARD, metavar="COUNT", help=text)
    parser.add_argument("--numbers", action="store_true", help="write labels as numbers, not as class names")
    parser.add_argument("--workers", type=number, help="threads (default: all cores)")


def run(args: argparse.Namespace) -> Answer:
    """Packs the images that were named."""
    if args.quality is not None and args.short_side is None:
        raise ValueError("--quality is for images that are shrunk; give --short-side, too, or leave it out.")
    given = {name: getattr(args, name) for name in ("short_side", "per_shard", "numbers", "workers")}
    quality = 90 if args.quality is None else args.quality
    packed = pack_shards(options.open_index(args), args.destination, quality=quality, **given)
    note = f", see {args.destination / LEFT_OUT}" if packed.left_out else ""
    return Answer(asdict(packed), f"{args.destination}: {packed}{note}")
