"""An epoch of one rank: from a position to the plan of a batch.

    position -> rows (order) -> readable rows (replacement) -> regions (choice) -> crops and colours (draw)

It is a pure function of its fields, so that any process can continue it at any position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from . import order, rng
from .draw import F32, I32, I64, Bool, Plan, Samples, draw
from .views import View

if TYPE_CHECKING:
    from ..regions.snapshot import Snapshot

_SUBSTITUTES = 64  # random substitutes tried for an unreadable sample; after that, the next readable row
_REGION_VIEW = -1  # view number in the key of the region, which all views of a sample share


@dataclass(frozen=True)
class Epoch:
    """All that decides what one rank does in one epoch."""

    views: Sequence[View]
    """The V views of a sample."""
    sizes: I32
    """(N, 2) height and width of all images in pixels."""
    seed: int
    epoch: int
    shuffle: bool
    global_batch: int
    """Samples per step over all ranks."""
    rank: int
    world: int
    readable: Callable[[I64], Bool]
    """Rows (B,) -> (B,) False where an image is known to be unreadable. It raises an error if all N are."""
    snapshot: Snapshot | None
    """The frozen region table; None is a table that was never written."""

    def plan(self, position: int) -> Plan:
        """This rank's part of the global batch that begins `position` samples into the epoch."""
        length = len(self.sizes)
        positions = order.rank_slice(position, length, self.global_batch, self.rank, self.world)
        rows = self._replace(order.rows(positions, length, self.seed, self.epoch, self.shuffle))
        keys = rng.keys(self.seed, self.epoch, rows, _REGION_VIEW)
        samples = self._samples(rows, keys)
        partner = rows if self.snapshot is None else self.snapshot.partner[rows]
        if any(view.partner for view in self.views):
            # A sample whose partner is unreadable is its own partner.
            partners = self._samples(np.where(self.readable(partner), partner, rows), keys)
        else:
            partners = Samples(partner, samples.sizes, samples.boxes, samples.weights, samples.written)
        return draw(self.views, samples, partners, seed=self.seed, epoch=self.epoch)

    def _replace(self, rows: I64) -> I64:
        """(B,) the rows; each unreadable one is replaced by a sample drawn from (seed, row) alone.

        The draw is repeated until it gives a readable row. So the substitute does not depend on the order in
        which unreadable images are found, nor on the rank that finds them.
        """
        wanted = rows
        for slot in count():
            good = self.readable(rows)
            if good.all():
                break
            if slot < _SUBSTITUTES:
                drawn = rng.bits(rng.keys(self.seed, wanted), slot) % np.uint64(len(self.sizes))
                rows = np.where(good, rows, drawn.astype(np.int64))
            else:
                rows = np.where(good, rows, (rows + 1) % len(self.sizes))
        return rows

    def _samples(self, rows: I64, keys: rng.Keys) -> Samples:
        """Sizes and regions of rows (B,). Partners are given the keys of their samples."""
        if self.snapshot is None:
            boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0], np.float32), (len(rows), 1))
            weights, written = np.ones(len(rows), np.float32), np.zeros(len(rows), np.bool_)
        else:
            boxes, weights = pick_region(self.snapshot.boxes[rows], self.snapshot.weights[rows], keys)
            written = self.snapshot.written[rows]
        return Samples(rows, self.sizes[rows], boxes, weights, written)


def pick_region(boxes: F32, weights: F32, keys: rng.Keys) -> tuple[F32, F32]:
    """Choose one of K regions per sample in proportion to its weight: boxes (B, 4) and weights (B,).

    Args:
        boxes: (B, K, 4); weights: (B, K), not negative, with a positive sum.
        keys: (B,) one per sample: all its views share the region.
    """
    if boxes.shape[1] == 1:
        return boxes[:, 0], weights[:, 0]
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    mark = rng.uniform(keys, 0) * cumulative[:, -1]
    # A mark can round up to the total; then the last region with a positive weight is chosen.
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0.0, axis=1)
    choice = np.minimum((cumulative <= mark[:, None]).sum(axis=1), last)
    rows = np.arange(len(boxes))
    return boxes[rows, choice], weights[rows, choice]
