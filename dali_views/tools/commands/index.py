"""dali-views index: which images are usable, and why others are not."""

from __future__ import annotations

import argparse
from typing import Any

from ..command_line import Answer
from . import common

EXAMPLES = """
dali-views index photos
dali-views index "imagenet-{000000..000146}.tar"
dali-views index data/train-*.parquet --label fine_label
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "index",
        parents=[common.images(), common.options()],
        examples=EXAMPLES,
        help="scan images, say what is left out and why, and cache the result",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Answer:
    """Carries it out."""
    index = common.open_index(args)
    return Answer(common.facts(index), f"{index.summary()}\nfingerprint {index.fingerprint[:16]}")
