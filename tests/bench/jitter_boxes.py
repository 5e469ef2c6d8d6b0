"""Moves the true boxes of a COCO file until their IoU with the true ones is a given one: the dose of a curve.

python tests/bench/jitter_boxes.py instances.json 0.6 jittered.json

Each box is moved and scaled in a random direction, by as much as gives the IoU. It stays inside its image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

TRIES = 200


def overlap(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """IoU of two boxes (x0, y0, x1, y1)."""
    inner = np.prod((np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])).clip(0))
    return float(inner / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - inner))


def moved(
    box: npt.NDArray[np.float64], wanted: float, size: npt.NDArray[np.float64], draw: np.random.Generator
) -> npt.NDArray[np.float64]:
    """The box after a random move that leaves an IoU of `wanted` with where it was."""
    for _ in range(TRIES):
        shift, growth = draw.normal(0, 1, 2), draw.normal(0, 0.5, 2)
        low, high = 0.0, 4.0
        for _ in range(40):
            step = (low + high) / 2
            half, centre = (box[2:] - box[:2]) / 2, (box[2:] + box[:2]) / 2
            half, centre = half * np.exp(step * growth), centre + 2 * half * step * shift
            found = np.concatenate([centre - half, centre + half])
            low, high = (step, high) if overlap(box, found) > wanted else (low, step)
        if (found[:2] >= 0).all() and (found[2:] <= size).all() and abs(overlap(box, found) - wanted) < 0.01:
            return found
    raise ValueError(f"no box of IoU {wanted} with {box.tolist()} lies in an image of {size.tolist()} pixels")


def main(source: str, wanted: float, out: str) -> None:
    """Write the file with moved boxes."""
    tree, draw = json.loads(Path(source).read_text()), np.random.default_rng(0)
    sizes = {image["id"]: np.array([image["width"], image["height"]], float) for image in tree["images"]}
    for mark in tree["annotations"]:
        x, y, width, height = mark["bbox"]
        x0, y0, x1, y1 = moved(
            np.array([x, y, x + width, y + height], float), wanted, sizes[mark["image_id"]], draw
        )
        mark["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    Path(out).write_text(json.dumps(tree))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
