"""ViewLoader: the Batches of an epoch in exact order, resumable at any batch, robust to unreadable images."""

from __future__ import annotations

import json
import operator
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from ..graph.build import default_threads
from ..graph.decode import HW_DECODER_LOAD
from ..graph.feed import Feed
from ..plan import order
from ..plan.draw import Plan
from ..plan.epoch import Epoch
from ..plan.views import FIXED, View
from ..regions.table import RegionTable
from ..system import stored
from ..system.machine import stage
from ..system.ranks import all_gather_bytes, rank_and_world, torch_device, world
from .arguments import dtype_name, view_list, warn_unguided
from .batch import Batch, Stats, StreamWaits
from .quarantine import Quarantine
from .state import REMEDY, described, state_form, tensors

if TYPE_CHECKING:
    from ..data.index import SampleIndex

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RETRIES = 3
"""Attempts after a batch failed although each of its files can be decoded."""


class ViewLoader:
    """Iterates over the Batches of an epoch.

    Every view is a pure function of (seed, epoch, sample, view number, the sample's row in the region table
    at the start of the epoch). Batch size, ranks, threads, prefetching and resuming decide which process
    makes a view and when; they never change it.

    Args:
        index: which images there are.
        views: the V views of each image; see `recipes`.
        batch_size: samples per batch of this rank.
        regions: what the model has written about each sample, or None; `set_epoch` makes updates visible.
        device: ``"gpu"`` (decoding included; the current GPU) or ``"cpu"``, or as PyTorch names them.
        seed: determines order and views.
        rank, world: this process among all; by default from torch.distributed if initialised, else 0 of 1.
        shuffle: False keeps the order of the index.
        drop_last: drop the samples that do not fill a global batch; else the last one is smaller (`order`).
        dtype: ``"float32"`` or ``"float16"`` of the views, or PyTorch's dtypes.
        mean, std: for the normalisation of RGB in [0, 1]; default ImageNet's.
        threads: CPU threads of the graph; default this process's share of the cores.
        hw_decoder_load: share of a batch's JPEGs for the GPU's hardware decoder; between 0 and 1 the pixels
            of a sample depend on its place in the batch, see `HW_DECODER_LOAD`.
        on_bad_image: ``"raise"``, or ``"skip"``: a warning names the file, and the run continues. It is put
            into `index.quarantine`, counted in `stats`, and replaced by another sample drawn by rule.
        max_bad_share: a larger share of unreadable images ends the run with their list.

    Raises:
        ValueError: arguments that cannot work together. TypeError: no index, or no list of views.
        RuntimeError: ``"gpu"`` on a machine without one.
    """

    def __init__(
        self,
        index: SampleIndex,
        views: Sequence[View],
        batch_size: int,
        *,
        regions: RegionTable | None = None,
        device: str | torch.device = "gpu",
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        dtype: str | torch.dtype = "float32",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        threads: int | None = None,
        hw_decoder_load: float = HW_DECODER_LOAD,
        on_bad_image: str = "skip",
        max_bad_share: float = 0.1,
    ) -> None:
        self.index = index
        self.views = view_list(index, views)
        # Python's own numbers: by default `torch.load` does not read a state that holds NumPy's.
        self.batch_size = operator.index(batch_size)
        self.regions = regions
        self.seed = operator.index(seed)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank, self.world = rank_and_world(rank, world)
        self.device = torch_device(device)
        kind = "gpu" if self.device.type == "cuda" else "cpu"
        self.stats = Stats()
        self.on_bad_image = on_bad_image
        self.max_bad_share = max_bad_share
        self._check()
        self._quarantine = Quarantine(
            index, kind, self.device.index, hw_decoder_load, strict=on_bad_image == "raise"
        )
        self._feed = Feed(
            index,
            self.views,
            device=kind,
            device_id=self.device.index,
            batch_size=self.batch_size,
            threads=threads or default_threads(),
            dtype=dtype_name(dtype),
            mean=mean,
            std=std,
            hw_decoder_load=hw_decoder_load,
        )
        self._failures = 0  # consecutive ones without an unreadable image
        self._resumed = False
        self._passes = 0  # number of iterators and epochs begun; only the latest iterator may continue
        self._ended, self._warned = False, False  # a pass over this epoch; of a second one
        self._grouped = rank is None and self.world > 1
        if regions is not None:
            regions.bind(index.fingerprint)
        else:
            warn_unguided(self.views)
        self.epoch, self.position = 0, 0
        self._begin(0)

    def _check(self) -> None:
        rows, own = len(self.index), 0 if self.regions is None else len(self.regions)
        if not self.views or self.batch_size < 1:
            raise ValueError(
                f"ViewLoader needs at least one View and a batch_size of at least 1; got {len(self.views)} "
                f"and {self.batch_size}."
            )
        if self.on_bad_image not in ("skip", "raise") or not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                'on_bad_image is "skip" or "raise" and max_bad_share a share in [0, 1]; '
                f"got {self.on_bad_image!r} and {self.max_bad_share}."
            )
        if self.regions is not None and own != rows:
            raise ValueError(
                f"The region table has {own} rows but the index has {rows} samples; make it with "
                "RegionTable(len(index))."
            )
        if len(self) == 0:
            raise ValueError(
                f"{rows} samples do not fill one global batch of {self.global_batch} ({self.batch_size} on "
                f"each of {self.world} ranks); lower batch_size or pass drop_last=False."
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
        """Number of batches of this epoch that have been returned."""
        return self.position // self.global_batch

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A ViewLoader cannot be copied or pickled: its graph and its threads belong to this process. "
            "Make another one with the same arguments; pass the position by state_dict and load_state_dict."
        )

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`, counted from 0: its order is fixed and the region table is frozen as it is now.

        After `load_state_dict`, setting the same epoch continues it, with its frozen region table.

        With a region table, and with rank and world from torch.distributed, a collective call: the ranks
        compare checksums of their frozen tables. So all of them set each epoch.

        Raises:
            ValueError: on every rank, if the tables differ; `RegionTable.sync` was forgotten.
        """
        if not (self._resumed and epoch == self.epoch):
            self._begin(epoch)
        if self._grouped and self._epoch.snapshot is not None:
            self._epoch.snapshot.check_equal()

    def _begin(self, epoch: int) -> None:
        self.epoch = stored.check(epoch, stored.whole(0, stored.EPOCHS), "The epoch", "count epochs from 0.")
        self.position, self._resumed, self._ended = 0, False, False
        self._passes += 1
        snapshot = None
        if self.regions is not None:
            self.regions.epoch = self.epoch
            with stage("dali_views: freeze regions"):
                snapshot = self.regions.snapshot()
        self._epoch = Epoch(
            views=self.views,
            sizes=self.index.sizes,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
            global_batch=self.global_batch,
            rank=self.rank,
            world=self.world,
            readable=self._quarantine.readable,
            snapshot=snapshot,
        )

    def plan_at(self, position: int) -> Plan:
        """What this rank does with the global batch that begins `position` samples into the epoch."""
        return self._epoch.plan(position)

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader, also inside an epoch, and its region table as it is now.

        `torch.load` reads it by default. With several ranks, `sync` table and loader first; then the state of
        any rank is valid for all.
        """
        snapshot = self._epoch.snapshot
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            # A last batch that is not dropped ends beyond the images: for every batch size, that is the end.
            "position": min(self.position, len(self.index)),
            "fingerprint": self.index.fingerprint,
            "regions": None if snapshot is None else tensors(snapshot.state_dict()),
            "table": None if self.regions is None else tensors(self.regions.state_dict()),
            "unreadable": self._quarantine.reasons(),
            "views": described(self.views),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with its epoch's boxes, and with its region table if both have one.

        World size, batch size, threads and device may have changed.

        Raises:
            ValueError: `state` is not complete or damaged, or belongs to another data set, another seed or
                other views; nothing was changed.
        """
        found = stored.check(state, self.form(), "The loader's state", REMEDY)
        # The folder of the images may be gone, which ends this before the first change.
        self._quarantine.search(np.array(sorted(found["unreadable"]), np.int64))
        if self.regions is not None and found.get("table") is not None:
            self.regions.load_state_dict(state["table"])
        self._begin(found["epoch"])
        # A table that was not written since has equal columns, which are not stored twice.
        snapshot, current = found["regions"], self._epoch.snapshot
        if snapshot is not None and (current is None or not current.equals(snapshot)):
            self._epoch = replace(self._epoch, snapshot=snapshot)
        over = found["position"] >= len(self.index)
        self.position = len(self) * self.global_batch if over else found["position"]
        self.stats.bad_images = self._quarantine.count
        self._resumed = True

    def form(self) -> stored.Form:
        """What ``load_state_dict`` takes, to check it as a part of a larger state."""
        return state_form(self)

    def sync(self) -> None:
        """Give all ranks the unreadable images that any of them has found.

        A collective call on the default process group; all ranks must have loaders of equal indexes.

        Raises:
            BadImageError: on every rank, if together they are more than `max_bad_share`.
        """
        if world() == 1:
            return
        for found in all_gather_bytes(json.dumps(self._quarantine.reasons()).encode()):
            self._quarantine.add({int(row): reason for row, reason in json.loads(found).items()})
        self._quarantine.check_share(self.max_bad_share)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch from its start, or from the position of a loaded state.

        RuntimeError if another iterator or another epoch was begun since: a loader has one position only. And
        in a process forked from one that has iterated: DALI's threads are not there.
        """
        self._feed.check_process()
        if not self._resumed:
            self.position = 0
            self._warn_again()
        self._resumed = False
        self._passes += 1
        mine = self._passes
        self._seek()
        self.stats = Stats(
            bad_images=self._quarantine.count, stream=StreamWaits() if self._stream() else None
        )
        began = time.perf_counter()
        while True:
            if mine != self._passes:
                raise RuntimeError(
                    "This iterator lost its position: another iterator or epoch of its loader has been "
                    "begun; iterate over one at a time, or make a second ViewLoader."
                )
            self._feed.check_process()
            asked = time.perf_counter()
            with nullcontext() if self.stats.stream is None else self.stats.stream.measured(*self._stream()):
                batch = self._take()
            now = time.perf_counter()
            self.stats.waited += now - asked
            self.stats.seconds = now - began
            self.stats.bad_images = self._quarantine.count
            if batch is None:
                self._ended = True
                return
            self.position += self.global_batch
            self.stats.images += len(batch)
            self.stats.batches += 1
            yield batch

    def _warn_again(self) -> None:
        """Warn of a second pass over an epoch that was to be different; once per loader."""
        drawn = self.shuffle or any(view.crop not in FIXED for view in self.views)
        if self._ended and drawn and not self._warned:
            self._warned = True
            warnings.warn(
                f"Epoch {self.epoch} is iterated a second time, with the same order and the same crops; call "
                "loader.set_epoch(epoch) before each epoch.",
                stacklevel=3,
            )

    def _seek(self) -> None:
        self._quarantine.refresh()
        if self.on_bad_image == "skip":
            self._quarantine.check_share(self.max_bad_share)
        # With drop_last, a batch may begin only where a whole global batch still fits.
        stop = len(self.index) - (self.global_batch - 1 if self.drop_last else 0)
        # The feed must not hold this loader: without a cycle, both are freed as soon as they are dropped.
        self._feed.seek(self._epoch.plan, range(self.position, stop, self.global_batch))

    def _stream(self) -> list[torch.cuda.Stream]:
        """The consumer's, which waits for views; none on the CPU."""
        return [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []

    def _take(self) -> Batch | None:
        """The next batch, or None at the end of the epoch. Unreadable images are replaced on the way."""
        while True:
            try:
                taken = self._feed.take(*self._stream())
            except RuntimeError as error:
                self._set_aside(error)
                continue
            self._failures = 0
            if taken is None:
                return None
            drawn, views = taken
            with stage("dali_views: batch"):
                views = [view.permute(0, 3, 1, 2) for view in views]
                return Batch.of(drawn, views, self.index.labels[drawn.index], self.device)

    def _set_aside(self, error: RuntimeError) -> None:
        """Find the files that made the batch fail, remember them, and continue from the failed batch."""
        found = self._quarantine.search(self._feed.awaited)
        # Without an unreadable file, the disk or the network may have failed for a moment: try again.
        self._failures = 0 if found else self._failures + 1
        if self._failures > RETRIES:
            raise error
        if self.on_bad_image == "skip":
            for row, reason in found.items():
                warnings.warn(f"Left out while running: {self.index.path(row)}: {reason}", stacklevel=4)
        self._seek()
