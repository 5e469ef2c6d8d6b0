"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...data.index import SampleIndex
from ...data.open_images import open_images
from ...plan import recipes


def options() -> argparse.ArgumentParser:
    """Of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="answer in one line of JSON")
    return parser


def images() -> argparse.ArgumentParser:
    """Which images."""
    parser = argparse.ArgumentParser(add_help=False)
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
    return parser


def views() -> argparse.ArgumentParser:
    """Which views of them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--recipe", default="moco_v2", choices=sorted(recipes.BY_NAME), help="set of views (moco_v2)"
    )
    parser.add_argument(
        "--size", type=at_least(1), default=224, help="side of a (global) view in pixels (224)"
    )
    parser.add_argument("--device", choices=["gpu", "cpu"], help="default: gpu if there is one")
    parser.add_argument("--seed", type=at_least(0), default=0)
    return parser


def open_index(args: argparse.Namespace) -> SampleIndex:
    """The images that were named, without those to be left out."""
    index = open_images(args.images, args.coco, args.root, args.image, args.label)
    return index if args.leave_out is None else index.without(args.leave_out)


def device(args: argparse.Namespace) -> str:
    """``"gpu"`` or ``"cpu"``."""
    import torch

    return str(args.device or ("gpu" if torch.cuda.is_available() else "cpu"))


def at_least(least: int) -> Any:
    """A type of argparse's: whole numbers from `least` on."""

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


def facts(index: SampleIndex) -> dict[str, Any]:
    """What an index comes to, for machines."""
    height, width = (int(side) for side in index.sizes.max(axis=0))
    return {
        "images": len(index),
        "root": index.root,
        "classes": index.classes,
        "unlabelled": int((index.labels < 0).sum()),
        "largest_height": height,
        "largest_width": width,
        "boxes": len(index.boxes),
        "left_out": dict(index.left_out),
        "fingerprint": index.fingerprint,
    }
