"""ViewLoader: an epoch of Batches, in exact order, resumable at any batch, unharmed by unreadable images."""

from __future__ import annotations

import json
import operator
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..data.index import SampleIndex
from ..graph import build as pipeline
from ..graph.feed import Feed
from ..plan import draw as plan
from ..plan import order, rng
from ..plan.views import View
from ..regions.snapshot import Snapshot, entry
from ..regions.table import RegionTable
from ..system.machine import stage
from ..system.ranks import all_gather_bytes, rank_and_world, torch_device, world
from .batch import Batch, Stats
from .quarantine import Substitutes

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Batch", "Stats", "ViewLoader"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RETRIES = 3
"""How often a batch is tried again that failed although each of its files can be decoded."""


class ViewLoader:
    """Iterate over the Batches of an epoch.

    Every view is a pure function of (seed, epoch, sample, view number, the sample's row in the region
    table when the epoch began). Batch size, rank, world size, threads, prefetching and resuming change
    which process makes a view and when, never the view.

    Args:
        index: which images there are.
        views: the V views to cut of each; see `recipes`.
        batch_size: samples per batch of this rank.
        regions: what the model has said about each sample; None means nothing. Updates become visible
            at the next `set_epoch`.
        device: ``"gpu"`` (decoding included) or ``"cpu"``.
        seed: of order and views.
        rank, world: this process among all; taken from torch.distributed if it is initialised, else 0 of 1.
        shuffle: False keeps the index's order.
        drop_last: drop the samples that do not fill a global batch. If kept, the last batch is smaller
            (see `order`).
        dtype: ``"float32"`` or ``"float16"`` of the views.
        mean, std: of the normalisation, for RGB in [0, 1]; default ImageNet's.
        threads: CPU threads of the graph; default this process's share of the cores.
        hw_decoder_load: share of JPEGs given to the GPU's hardware decoder.

        on_bad_image: ``"skip"`` or ``"raise"``, what happens when an image cannot be read. If skipped, it
            costs that image: a warning names the file, it is put into `index.quarantine`, counted in `stats`,
            and replaced, here and in later epochs, by another sample drawn by rule.
        max_bad_share: a larger share of unreadable images ends the run with their list.

    Raises:
        ValueError: for arguments that cannot work together.
        RuntimeError: if ``"gpu"`` is asked for where there is none.
    """

    def __init__(
        self,
        index: SampleIndex,
        views: Sequence[View],
        batch_size: int,
        *,
        regions: RegionTable | None = None,
        device: str = "gpu",
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        dtype: str = "float32",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        threads: int | None = None,
        hw_decoder_load: float = 0.65,
        on_bad_image: str = "skip",
        max_bad_share: float = 0.1,
    ) -> None:
        self.index = index
        self.views = list(views)
        # Python's own numbers: a state holds them, and NumPy's keep `torch.load` from reading it by default.
        self.batch_size = operator.index(batch_size)
        self.regions = regions
        self.seed = operator.index(seed)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank, self.world = rank_and_world(rank, world)
        self.device = torch_device(device)
        self.stats = Stats()
        self.on_bad_image = on_bad_image
        self.max_bad_share = max_bad_share
        self._check(dtype)
        self._feed = Feed(
            index,
            self.views,
            self.plan_at,
            self.global_batch,
            device=device,
            device_id=self.device.index,
            batch_size=batch_size,
            threads=threads or pipeline.default_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
            dtype=dtype,
            mean=mean,
            std=std,
            hw_decoder_load=hw_decoder_load,
        )
        self._partnered = any(view.source == "partner" for view in self.views)
        self._substitutes = Substitutes(index, self.seed, device, self.device.index)
        self._failures = 0  # in a row, without a bad image to blame
        self._resumed = False
        self._passes = 0  # iterators made and epochs begun, of which only the latest may go on
        if regions is not None:
            regions.bind(index.fingerprint)
        self.epoch, self.position = 0, 0
        self._freeze(0)

    def _check(self, dtype: str) -> None:
        if not self.views:
            raise ValueError("ViewLoader needs at least one View.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is a number of samples, at least 1; got {self.batch_size}.")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype {dtype!r} is neither float32 nor float16.")
        if self.on_bad_image not in ("skip", "raise") or not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                'on_bad_image is "skip" or "raise" and max_bad_share a share in [0, 1]; '
                f"got {self.on_bad_image!r} and {self.max_bad_share}."
            )
        if self.regions is not None and len(self.regions) != len(self.index):
            raise ValueError(
                f"The region table has {len(self.regions)} rows but the index has {len(self.index)} samples; "
                "make it with RegionTable(len(index))."
            )
        if len(self) == 0:
            raise ValueError(
                f"{len(self.index)} samples do not fill one global batch of {self.global_batch} "
                f"({self.batch_size} on each of {self.world} ranks); "
                "lower batch_size or pass drop_last=False."
            )

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        """Number of batches in a whole epoch, the same on every rank."""
        return order.steps(len(self.index), self.global_batch, self.drop_last)

    @property
    def step(self) -> int:
        """Number of batches of this epoch that have been handed out."""
        return self.position // self.global_batch

    # --- epochs and state -----------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`: its order is fixed and the region table is frozen as it is now.

        After `load_state_dict` in the middle of an epoch, setting that same epoch continues it where it
        stood, with the region table as it was frozen then.
        """
        if self._resumed and epoch == self.epoch:
            return
        self._freeze(epoch)

    def _freeze(self, epoch: int) -> None:
        self.epoch, self.position, self._resumed = operator.index(epoch), 0, False
        self._passes += 1
        self._frozen: Snapshot | None = None
        if self.regions is not None:
            self.regions.epoch = epoch
            with stage("dali_views: freeze regions"):
                self._frozen = self.regions.snapshot()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, also in mid-epoch, and its region table as it is now.

        Plain numbers, strings and tensors, so that `torch.load` reads it from a checkpoint as it does by
        default. With several ranks, `sync` table and loader first; then any rank's state is good for all.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "fingerprint": self.index.fingerprint,
            "regions": None if self._frozen is None else _tensors(self._frozen.state_dict()),
            "table": None if self.regions is None else _tensors(self.regions.state_dict()),
            "unreadable": self._substitutes.reasons(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with its epoch's boxes, and the whole region table if both have one.

        World size, batch size, threads and device may differ from those it was saved with.

        Raises:
            ValueError: if `state` is none, or belongs to another data set or another seed.
        """
        for name in ("fingerprint", "seed", "unreadable", "epoch", "regions", "position"):
            entry(state, name)
        if state["fingerprint"] != self.index.fingerprint:
            raise ValueError(
                "The loader's state was saved for another data set: the files or their sizes differ."
            )
        if state["seed"] != self.seed:
            raise ValueError(
                f"The loader's state was saved with seed {state['seed']}, this loader has {self.seed}."
            )
        rows = np.array(sorted(state["unreadable"]), np.int64)
        if ((rows < 0) | (rows >= len(self.index))).any():
            raise ValueError("The loader's state names an unreadable sample that the data set does not have.")
        epoch, position = int(state["epoch"]), int(state["position"])
        if position < 0:
            raise ValueError(f"The loader's state stands at {position} samples; it should be at least 0.")
        # Read first: a state that is refused changes nothing.
        frozen = None if state["regions"] is None else Snapshot.from_state_dict(state["regions"])
        if self.regions is not None and state.get("table") is not None:
            self.regions.load_state_dict(state["table"])
        self._freeze(epoch)
        # A table that has not been written since holds the same, which need not be held twice.
        if frozen is not None and (self._frozen is None or not self._frozen.equals(frozen)):
            self._frozen = frozen
        self.position = position
        self._substitutes.search(rows)  # who mended a file in the meantime gets it back
        self.stats.bad_images = len(self._substitutes.met)
        self._resumed = True

    def sync(self) -> None:
        """Give all ranks the unreadable images that any of them has found.

        A collective call on the default process group, whose ranks must have loaders of equal indexes.

        Raises:
            BadImageError: on every rank, if together they are more than `max_bad_share`.
        """
        if world() == 1:
            return
        for found in all_gather_bytes(json.dumps(self._substitutes.reasons()).encode()):
            self._substitutes.add({int(row): reason for row, reason in json.loads(found).items()})
        self._substitutes.check_share(self.max_bad_share)

    # --- iteration ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch from its start, or from where a loaded state stood.

        Raises:
            RuntimeError: when it is asked for a batch although another iterator has been begun since, or
                another epoch: the loader stands in one place only.
        """
        if not self._resumed:
            self.position = 0
        self._resumed = False
        self._passes += 1
        mine = self._passes
        self._seek()
        self.stats = Stats(bad_images=len(self._substitutes.met))
        began = time.perf_counter()
        while True:
            if mine != self._passes:
                raise RuntimeError(
                    "This iterator's place is lost, for another one or another epoch of its loader has been "
                    "begun; iterate over one at a time, or make a second ViewLoader."
                )
            asked = time.perf_counter()
            batch = self._take()
            now = time.perf_counter()
            self.stats.waited += now - asked
            self.stats.seconds = now - began
            if batch is None:
                return
            self.position += self.global_batch
            self.stats.images += len(batch)
            self.stats.batches += 1
            self.stats.bad_images = len(self._substitutes.met)
            yield batch

    def _seek(self) -> None:
        # If the rest is dropped, a batch may begin only where a whole global batch still fits.
        stop = len(self.index) - (self.global_batch - 1 if self.drop_last else 0)
        self._feed.seek(self.position, stop)

    def _take(self) -> Batch | None:
        """The next batch, or None at the end of the epoch. Unreadable images are replaced on the way."""
        while True:
            try:
                taken = self._feed.take()
            except RuntimeError as error:
                self._set_aside(error)
                continue
            self._failures = 0
            if taken is None:
                return None
            drawn, views = taken
            with stage("dali_views: batch"):
                return Batch.of(drawn, views, self.index.labels[drawn.index], self.device)

    def _set_aside(self, error: RuntimeError) -> None:
        """Find the files that made the batch fail, remember them, and plan again from the failed batch."""
        failed = self._feed.awaited
        rows = np.concatenate([failed.index, failed.partner]) if self._partnered else failed.index
        found = self._substitutes.search(rows)
        # The disk or the network may have failed for a moment: what is tried again costs nothing.
        self._failures = 0 if found else self._failures + 1
        if self._failures > RETRIES:
            raise error
        if self.on_bad_image == "skip":
            for row, reason in found.items():
                warnings.warn(f"Left out while running: {self.index.path(row)}: {reason}", stacklevel=4)
            self._substitutes.check_share(self.max_bad_share)
        self._seek()

    # --- the draw -------------------------------------------------------------------------------

    def plan_at(self, position: int) -> plan.Plan:
        """What this rank will do with the global batch that begins `position` samples into the epoch."""
        length = len(self.index)
        mine = order.rank_slice(position, length, self.global_batch, self.rank, self.world)
        rows = order.rows(mine, length, self.seed, self.epoch, self.shuffle)
        if self.on_bad_image == "raise":
            self._substitutes.refuse(rows)
        else:
            rows = self._substitutes.replaced(rows)
            self._substitutes.check_share(self.max_bad_share)
        partner = rows if self._frozen is None else self._frozen.partner[rows]
        if self._partnered:
            if self.on_bad_image == "raise":
                self._substitutes.refuse(partner)
            partner = np.where(self._substitutes.readable(partner), partner, rows)
        keys = plan.region_keys(self.seed, self.epoch, rows)
        guidance = self._guidance(rows, keys)
        return plan.draw(
            self.views,
            rows,
            seed=self.seed,
            epoch=self.epoch,
            sizes=self.index.sizes[rows],
            guidance=guidance,
            partner=partner,
            partner_sizes=self.index.sizes[partner],
            partner_guidance=self._guidance(partner, keys) if self._partnered else guidance,
        )

    def _guidance(self, rows: plan.I64, keys: rng.Keys) -> plan.Guidance:
        if self._frozen is None:
            whole = np.tile(np.array([0.0, 0.0, 1.0, 1.0], np.float32), (len(rows), 1))
            return plan.Guidance(whole, np.ones(len(rows), np.float32), np.zeros(len(rows), np.bool_))
        frozen = self._frozen
        return plan.pick_region(frozen.boxes[rows], frozen.weights[rows], frozen.written[rows], keys)


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
