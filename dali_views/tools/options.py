"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..data.index import SampleIndex
from ..plan import recipes
from .open_images import open_images


def add_images(parser: argparse.ArgumentParser) -> None:
    """Which images; `open_index` opens them."""
    parser.add_argument(
        "images",
        nargs="+",
        help="folder of images, text file that lists them, tar shards, Parquet or Arrow tables, or LMDB; "
        "all but tables and LMDB also as a URL (s3://, gs://)",
    )
    parser.add_argument(
        "--coco", type=Path, metavar="JSON", help="instances file with true boxes for the folder"
    )
    parser.add_argument("--root", metavar="DIR", help="where a list's paths start (default: its own folder)")
    parser.add_argument("--image", metavar="COLUMN", help="of tables: images (the only one that fits)")
    parser.add_argument("--label", metavar="COLUMN", help="of tables: labels (label or the like)")
    parser.add_argument(
        "--leave-out", type=Path, metavar="LIST", help="files not to use, as `check` and a run list them"
    )


def add_views(parser: argparse.ArgumentParser) -> None:
    """Which views of them, on which device."""
    names = sorted(recipes.BY_NAME)
    parser.add_argument("--recipe", default="moco_v2", choices=names, help="set of views (moco_v2)")
    parser.add_argument("--size", type=at_least(1), default=224, help="side of a (global) view, pixels (224)")
    add_device(parser)
    parser.add_argument("--seed", type=at_least(0), default=0)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where images are decoded; see `device`."""
    parser.add_argument("--device", choices=["gpu", "cpu"], help="default: gpu if there is one")


def open_index(args: argparse.Namespace) -> SampleIndex:
    """The images that were named, without those to leave out."""
    index = open_images(args.images, args.coco, args.root, args.image, args.label)
    return index if args.leave_out is None else index.without(args.leave_out)


def device(args: argparse.Namespace) -> str:
    """``"gpu"`` or ``"cpu"``."""
    import torch

    return str(args.device or ("gpu" if torch.cuda.is_available() else "cpu"))


def at_least(least: int) -> Callable[[str], int]:
    """A `type` for argparse: integers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"{value} is too large")
        return value

    return number
