"""What a run leaves for people: progress, curves, pictures, a page, metrics.jsonl, the list of bad images."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dali_views import RegionTable, ViewLoader, bad_list
from dali_views.regions import Snapshot
from dali_views.regions.sync import Traffic
from dali_views.system.machine import machine
from dali_views.tools.sample import sheet

from .. import config as cfg
from ..data import DataSets
from ..engine import ranks as distributed
from ..evaluate import Evaluation
from ..guides.health import box_areas, health
from . import METRICS, PAGE, PICTURES, QUARANTINE, history, page
from .boards import start_wandb, tensorboard
from .measures import Collapse, Throughput

__all__ = ["Report", "table"]

_COLUMNS = {
    "loss": "loss", "knn_top1": "kNN top-1", "knn_top5": "kNN top-5", "iou": "IoU", "corloc": "CorLoc",
    "images_per_second": "images/s",
    "loader": "loader/s",
}  # fmt: skip


class Report:
    """Writes into the run folder on the main rank; elsewhere only checks the loss. All ranks make all calls.

    Args:
        batch: images of a step, on all ranks.
        steps: optimiser steps this process may come to.
        step: those already taken by an earlier process; later entries of it are dropped.
        outlook: when crops will follow boxes, shown at the start.
    """

    def __init__(
        self, run: cfg.Run, data: DataSets, loader: ViewLoader, batch: int, steps: int, step: int,
        outlook: str = "",
    ) -> None:  # fmt: skip
        self.every = run.log_every
        self.loader = loader
        self.throughput = Throughput(loader, batch)
        self.index = data.train
        self.main = distributed.is_main()
        self._latest: torch.Tensor | None = None
        if not self.main:
            return
        self.folder = folder = Path(run.out)
        self.metrics = folder / METRICS
        self._listed = 0  # bad images
        if step == 0:  # what is there belongs to a run that did not come to its first checkpoint
            self.metrics.unlink(missing_ok=True)
        history.keep_until(self.metrics, step)
        # First, for it copies what TensorBoard gets afterwards.
        self.wandb = None if run.wandb is None else start_wandb(folder, run.wandb, step)
        self.board = tensorboard(folder, step)
        self.history = history.History(folder, data.train, run.seed, step)
        self.collapse = Collapse()
        self._step, self._last, self._total = step, steps, run.epochs * len(loader)
        device = "gpu" if loader.device.type == "cuda" else "cpu"
        self.history.event(
            "start", step, steps=self._total, steps_per_epoch=len(loader), processes=distributed.world(),
            machine=machine(device), images=len(data.train), classes=len(data.train.classes),
            true_boxes=len(data.train.boxes), left_out=len(data.train.left_out),
        )  # fmt: skip
        resumed = f"continued after step {step} of {self._total}" if 0 < step < steps else ""
        for told in filter(None, (data.train.summary(), outlook, resumed)):
            tqdm.write(told)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def step(self, step: int, epoch: int, loss: torch.Tensor, lr: float, embedding: torch.Tensor) -> None:
        """Note step number `step` (from 1); every `run.log_every` steps the loss of all ranks is read, which
        waits.

        `embedding` (B, D) is what the loss compared: its spread and rank tell a collapse.
        """
        self._latest = loss.detach()
        self.throughput.step(step)
        if self.main:
            self._step = step
            self.bar.update()
        if step % self.every:
            return
        value = self._loss(self._latest, step)
        pace = self.throughput.read(step)
        if not self.main:
            return
        values = {
            "loss": value, "lr": lr, **self.collapse.measure(embedding), **pace,
            "bad_images": self.loader.stats.bad_images,
        }  # fmt: skip
        self._write({"step": step, "epoch": epoch, **values}, step)
        self._list_bad_images()
        rate = {"images_s": f"{pace['images_per_second']:.0f}"} if pace else {}
        self.bar.set_postfix({"epoch": epoch, "loss": f"{value:.4f}", **rate})

    def check_loss(self, step: int) -> None:
        """Before a checkpoint is written, see that the latest loss is a number, so that a sound one stays.

        Raises:
            FloatingPointError: it is none.
        """
        if self._latest is not None:
            self._loss(self._latest, step)

    def _loss(self, latest: torch.Tensor, step: int) -> float:
        """The loss of all ranks, which is waited for."""
        value = float(distributed.all_mean(latest))
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}; lower optim.lr, lengthen the warm-up or set run.amp=off"
            )
        return value

    def scores(self, evaluation: Evaluation, epoch: int, step: int) -> dict[str, float]:
        """Note an evaluation after `epoch` epochs; its scores, with the latest loss and rate."""
        scores = dict(evaluation.scores)
        if self._latest is not None:
            scores["loss"] = float(distributed.all_mean(self._latest))
        if "images_per_second" in self.throughput.latest:
            scores["images_per_second"] = self.throughput.latest["images_per_second"]
        self.throughput.pause()
        if self.main:
            self._write({"step": step, "epoch": epoch, **evaluation.scores}, step)
            told = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.scores.items())
            tqdm.write(f"after {epoch} epochs: {told or 'no labels and no boxes to measure by'}")
            if evaluation.picture is not None:
                (self.folder / PICTURES).mkdir(exist_ok=True)
                evaluation.picture.save(self.folder / PICTURES / f"epoch-{epoch:04d}.png")
                self._picture("views", evaluation.picture, step)
            if evaluation.localised is not None:
                self.history.localised(evaluation.localised, epoch, step)
                self._picture("localised", sheet(history.recorded(self.folder, "localised")[1]), step)
            self._page()
        return scores

    def guide(self, regions: RegionTable, before: Snapshot, epoch: int, step: int) -> None:
        """Note the region table that a guide has just written after `epoch` epochs, and what the ranks
        have exchanged for it since the last time: rows and bytes received by the main one, and seconds."""
        self.throughput.pause()
        if self.main:
            found = {f"guide_{name}": value for name, value in health(regions, before, self.index).items()}
            if distributed.world() > 1:
                found |= {f"sync_{name}": value for name, value in asdict(regions.traffic).items()}
                regions.traffic = Traffic()
            self._write({"step": step, "epoch": epoch, **found}, step)
            self.board.add_histogram("guide_box_area", box_areas(regions), step)
            if self.history.boxes(regions, epoch, step):
                self._picture("followed", sheet(history.followed(self.folder)), step)
            if self.history.pairs(regions, step):
                self._picture("pairs", sheet(history.recorded(self.folder, "pairs")[1]), step)

    def _picture(self, name: str, image: Image.Image, step: int) -> None:
        self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Finish the bar, the curves and the page and list the images that could not be read, however the run
        ended."""
        if not self.main:
            return
        self.bar.close()
        self._list_bad_images()
        self._page(ended=self._how(error))
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error is not None))

    def _how(self, error: BaseException | None) -> str:
        """How the run came to its end."""
        if error is not None:
            return f"failed: {type(error).__name__}: {error}"[:600]
        if self._step >= self._total:
            return "finished"
        return "stopped at run.max_steps" if self._step >= self._last else "stopped by a signal"

    def _page(self, ended: str = "") -> None:
        """Write report.html; what keeps it from being written does not end a run, nor hide why it ended."""
        try:
            if ended:
                self.history.event("end", self._step, how=ended)
            page.write(self.folder)
        except Exception as error:  # of whatever kind: it can be made anew at any time
            warnings.warn(
                f"{PAGE} could not be written ({error}); `report {self.folder}` makes it anew",
                stacklevel=2,
            )

    def _list_bad_images(self) -> None:
        quarantine = self.index.quarantine
        if len(quarantine) > self._listed:
            bad_list.save(self.folder / QUARANTINE, quarantine)
            self._listed = len(quarantine)

    def _write(self, values: Mapping[str, Any], step: int) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for name in values.keys() - {"step"}:
            self.board.add_scalar(name, values[name], step)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Scores by moment or run as text; columns that no row has are left out."""
    columns = [name for name in _COLUMNS if any(name in row for row in rows.values())]
    width = max([len(name) for name in rows] + [10])
    lines = [" " * width + "".join(f"{_COLUMNS[name]:>11s}" for name in columns)]
    for moment, row in rows.items():
        cells = [f"{_cell(name, row[name]):>11s}" if name in row else " " * 10 + "-" for name in columns]
        lines.append(f"{moment:{width}s}" + "".join(cells))
    return "\n".join(lines)


def _cell(name: str, value: float) -> str:
    if name.startswith("knn") or name == "corloc":
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if name in ("images_per_second", "loader") else f"{value:.3f}"
