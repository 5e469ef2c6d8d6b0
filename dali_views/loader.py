"""ViewLoader: an epoch of Batches, in exact order, resumable at any batch, that survives unreadable images."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import order, pipeline, plan, rng
from .index import SampleIndex
from .regions import Regions, RegionTable
from .views import View

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """B samples in V views, and what was done to them. All tensors are on the loader's device."""

    views: list[torch.Tensor]
    """V tensors (B, 3, S, S), channels-last, normalised; S may differ between views."""
    index: torch.Tensor
    """(B,) int64, row in the SampleIndex."""
    label: torch.Tensor
    """(B,) int64, -1 where unknown."""
    crops: torch.Tensor
    """(B, V, 4) float32, y0 x0 y1 x1 as fractions of the image the view was cut from."""
    flipped: torch.Tensor
    """(B, V) bool, True where the view is mirrored left to right."""
    boxes: torch.Tensor
    """(B, 4) float32, the semantic box the crops were drawn from."""
    weights: torch.Tensor
    """(B,) float32, the saliency weight of that box."""
    partner: torch.Tensor
    """(B,) int64, sample that partner views were cut from (itself if none)."""

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Stats:
    """What the current (or last) epoch cost this rank."""

    images: int = 0
    batches: int = 0
    seconds: float = 0.0
    """From the first request for a batch until the latest one was handed out."""
    waited: float = 0.0
    """Seconds of these in which the consumer waited for a batch."""
    bad_images: int = 0
    """Images found unreadable while running, in this and all earlier epochs."""

    @property
    def images_per_second(self) -> float:
        """Images per second of the epoch so far; 0 before the first batch."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that the consumer waited for the loader, in [0, 1]."""
        return self.waited / self.seconds if self.seconds else 0.0


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

    An image that cannot be read while running costs that image: it is reported by a warning that names
    the file, counted in `stats`, and replaced, here and in later epochs, by another sample drawn by rule.

    Raises:
        ValueError: for arguments that cannot work together; RuntimeError: if ``"gpu"`` is asked for without one.
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
    ) -> None:
        self.index = index
        self.views = list(views)
        self.batch_size = batch_size
        self.regions = regions
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank, self.world = _place(rank, world)
        self.device = _torch_device(device)
        self.stats = Stats()
        self._check(device, dtype)
        self._graph_options: dict[str, Any] = {
            "batch_size": batch_size,
            "device": device,
            "device_id": self.device.index,
            "threads": threads or pipeline.default_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
            "encoded": index.arrays is None,
            "dtype": dtype,
            "mean": mean,
            "std": std,
            "hw_decoder_load": hw_decoder_load,
        }
        self._partnered = any(view.source == "partner" for view in self.views)
        self._pipeline: Any = None
        self._planned: deque[plan.Plan] = deque()
        self._unreadable: dict[int, str] = {}
        self._resumed = False
        if regions is not None:
            regions.bind(index.fingerprint)
        self.epoch, self.position = 0, 0
        self._start, self._next, self._stop = 0, 0, 0
        self._freeze(0)

    def _check(self, device: str, dtype: str) -> None:
        if not self.views:
            raise ValueError("ViewLoader needs at least one View.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is a number of samples, at least 1; got {self.batch_size}.")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype {dtype!r} is neither float32 nor float16.")
        if self.regions is not None and len(self.regions) != len(self.index):
            raise ValueError(
                f"The region table has {len(self.regions)} rows but the index has {len(self.index)} samples; "
                "make it with RegionTable(len(index))."
            )
        if len(self) == 0:
            raise ValueError(
                f"{len(self.index)} samples do not fill one global batch of {self.global_batch} "
                f"({self.batch_size} on each of {self.world} ranks); lower batch_size or pass drop_last=False."
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

    @property
    def unreadable(self) -> dict[str, str]:
        """Files that could not be read while running, with the reason."""
        return {self.index.path(row): reason for row, reason in self._unreadable.items()}

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
        self.epoch, self.position, self._resumed = epoch, 0, False
        self._order: order.Rows | None = None
        self._frozen: Regions | None = None
        if self.regions is not None:
            self.regions.epoch = epoch
            self._frozen = self.regions.snapshot()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain numbers, strings and NumPy arrays; also in the middle of an epoch."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "fingerprint": self.index.fingerprint,
            "regions": None if self._frozen is None else self._frozen.state_dict(),
            "unreadable": dict(self._unreadable),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. World size, batch size, threads and device may be others than when it was saved.

        Raises:
            ValueError: if the state belongs to another data set or another seed.
        """
        if state["fingerprint"] != self.index.fingerprint:
            raise ValueError("The loader's state was saved for another data set: the files or their sizes differ.")
        if state["seed"] != self.seed:
            raise ValueError(f"The loader's state was saved with seed {state['seed']}, this loader has {self.seed}.")
        self._freeze(int(state["epoch"]))
        if state["regions"] is not None:
            self._frozen = Regions.from_state_dict(state["regions"])
        self.position = int(state["position"])
        self._unreadable = dict(state["unreadable"])
        self._resumed = True

    # --- iteration ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch from its start, or from where a loaded state stood."""
        if not self._resumed:
            self.position = 0
        self._resumed = False
        if self._order is None:
            self._order = order.permutation(len(self.index), self.seed, self.epoch, self.shuffle)
        self._seek(self.position)
        self.stats = Stats(bad_images=self.stats.bad_images)
        began = time.perf_counter()
        while True:
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
            yield batch

    def _seek(self, position: int) -> None:
        """Make the next batch out of the graph the one at `position`, discarding what an abandoned loop left."""
        if self._pipeline is not None:
            self._drain()
        if self._pipeline is None:
            self._pipeline = pipeline.build(self.views, self._source, **self._graph_options)
        self._planned.clear()
        self._next = position
        self._stop = len(self.index) - (self.global_batch - 1 if self.drop_last else 0)

    def _drain(self) -> None:
        """Run the graph to the end of its epoch, so that it can begin another."""
        self._stop = 0  # the source ends at once; only what is under way comes out
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # an unreadable image that nobody waits for any more
            self._pipeline = None

    def _take(self) -> Batch | None:
        """The next batch, or None at the end of the epoch. Unreadable images are replaced on the way."""
        while True:
            try:
                if self.device.type == "cuda":
                    outputs = self._pipeline.run(torch.cuda.current_stream(self.device))
                else:
                    outputs = self._pipeline.run()
                break
            except StopIteration:
                return None
            except RuntimeError as error:
                self._set_aside(error)
        return self._batch(self._planned.popleft(), outputs)

    def _batch(self, drawn: plan.Plan, outputs: Sequence[Any]) -> Batch:
        # DALI's dynamic executor gives every batch memory of its own, so DLPack needs no copy.
        views = [torch.from_dlpack(out.as_tensor()).permute(0, 3, 1, 2) for out in outputs]
        rest = {
            field.name: torch.from_numpy(np.array(getattr(drawn, field.name))).to(self.device)
            for field in fields(Batch)
            if field.name not in ("views", "label")
        }
        label = torch.from_numpy(self.index.labels[drawn.index].astype(np.int64)).to(self.device)
        return Batch(views=views, label=label, **rest)

    # --- the external source --------------------------------------------------------------------

    def _source(self) -> list[np.ndarray[Any, Any]]:
        """Inputs of the graph for the batch after the last planned one. DALI calls it ahead of `_take`."""
        if self._next >= self._stop:
            raise StopIteration
        drawn = self.plan(self._next)
        self._next += self.global_batch
        self._planned.append(drawn)
        images = [self._images(drawn.index)]
        if self._partnered:
            images.append(self._images(drawn.partner))
        return pipeline.inputs(images, self.views, drawn.views)

    def _images(self, rows: plan.I64) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.index.path_rows(rows) if self.index.arrays is None else self.index.arrays[rows]

    def plan(self, position: int) -> plan.Plan:
        """What this rank will do with the global batch that begins at `position` samples into the epoch."""
        if self._order is None:
            self._order = order.permutation(len(self.index), self.seed, self.epoch, self.shuffle)
        rows = order.rank_slice(self._order, position, self.global_batch, self.rank, self.world)
        rows = self._readable(rows)
        partner = rows if self._frozen is None else self._frozen.partner[rows]
        if self._partnered:
            partner = np.where(self._is_readable(partner), partner, rows)
        keys = plan.region_keys(self.seed, self.epoch, rows)
        guidance = self._guidance(rows, keys)
        return plan.draw(
            self.views, rows, seed=self.seed, epoch=self.epoch, sizes=self.index.sizes[rows], guidance=guidance,
            partner=partner, partner_sizes=self.index.sizes[partner],
            partner_guidance=self._guidance(partner, keys) if self._partnered else guidance,
        )  # fmt: skip

    def _guidance(self, rows: plan.I64, keys: rng.Keys) -> plan.Guidance:
        if self._frozen is None:
            whole = np.tile(np.array([0.0, 0.0, 1.0, 1.0], np.float32), (len(rows), 1))
            return plan.Guidance(whole, np.ones(len(rows), np.float32), np.zeros(len(rows), np.bool_))
        frozen = self._frozen
        return plan.pick_region(frozen.boxes[rows], frozen.weights[rows], frozen.written[rows], keys)

    # --- unreadable images ----------------------------------------------------------------------

    def _is_readable(self, rows: plan.I64) -> plan.Bool:
        return ~np.isin(rows, list(self._unreadable)) if self._unreadable else np.ones(len(rows), np.bool_)

    def _readable(self, rows: plan.I64) -> plan.I64:
        """The rows, with each unreadable one replaced by a sample drawn from (seed, row) alone."""
        slot = 0
        wanted = rows
        while not (good := self._is_readable(rows)).all():
            replacement = rng.bits(rng.keys(self.seed, wanted), slot) % np.uint64(len(self.index))
            rows = np.where(good, rows, replacement.astype(np.int64))
            slot += 1
        return rows

    def _set_aside(self, error: RuntimeError) -> None:
        """Find the files that made the batch fail, remember them, and plan again from the failed batch."""
        failed = self._planned[0]
        rows = np.unique(np.concatenate([failed.index, failed.partner]) if self._partnered else failed.index)
        found = {} if self.index.arrays is not None else self._probe(rows)
        if not found:
            raise error
        for row, reason in found.items():
            warnings.warn(f"Left out while running: {self.index.path(row)}: {reason}", stacklevel=4)
        self._unreadable.update(found)
        self.stats.bad_images += len(found)
        if len(self._unreadable) == len(self.index):
            raise RuntimeError("Every image of the data set turned out to be unreadable.") from error
        # The graph that failed may not be used again; one built anew continues from the failed batch.
        self._pipeline = None
        self._seek(self.position)

    def _probe(self, rows: plan.I64) -> dict[int, str]:
        """Decode each row's file alone; the rows that fail, with the reason."""
        found = {}
        for row in rows.tolist():
            path = Path(self.index.path(row))
            if not path.is_file():
                found[row] = "the file is gone"
                continue
            reason = pipeline.decode_error(str(path), self._graph_options["device"], self.device.index)
            if reason is not None:
                found[row] = reason
        return found


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and world size as given, else from torch.distributed, else 0 of 1."""
    if (rank is None) != (world is None):
        raise ValueError("Give both rank and world, or neither.")
    if rank is None or world is None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside range({world}).")
    return rank, world


def _torch_device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if device != "gpu":
        raise ValueError(f'device {device!r} is neither "gpu" nor "cpu".')
    if not torch.cuda.is_available():
        raise RuntimeError('No GPU was found (torch.cuda.is_available() is False); use device="cpu".')
    return torch.device("cuda", torch.cuda.current_device())
