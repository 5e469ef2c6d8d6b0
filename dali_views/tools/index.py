"""dali-views index: which images are usable, and why others are not."""

from __future__ import annotations

import argparse

from . import options
from .command_line import Answer

EXAMPLES = """
dali-views index photos
dali-views index "imagenet-{000000..000146}.tar"
dali-views index data/train-*.parquet --label fine_label
"""

add = options.add_images


def run(args: argparse.Namespace) -> Answer:
    """Scans the images, or reads the cached scan."""
    index = options.open_index(args)
    height, width = index.sizes.max(axis=0).tolist()
    facts = {
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
    return Answer(facts, f"{index.summary()}\nfingerprint {index.fingerprint[:16]}")
