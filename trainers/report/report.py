"""What a run leaves for people: progress, curves, pictures, a page, metrics.jsonl, the list of bad images."""

from __future__ import annotations

import json
import math
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dali_views import RegionTable, ViewLoader, bad_list
from dali_views.regions import Snapshot
from dali_views.regions.sync import Traffic
from dali_views.system.files import append_line, atomic_write
from dali_views.system.machine import machine
from dali_views.system.progress import Progress
from dali_views.tools.command_line import counted
from dali_views.tools.sample import sheet

from .. import config as cfg
from ..config import file as config_file
from ..data import DataSets
from ..engine import ranks
from ..engine.optim import LOWER
from ..evaluate.box_scores import box_areas, health
from ..methods.networks import normalise
from . import CONFIG, METRICS, PAGE, PICTURES, QUARANTINE, SCORES, history, page

if TYPE_CHECKING:
    from ..evaluate.evaluator import Evaluation
    from ..evaluate.online_probe import OnlineProbe

NOTHING = (
    "no labels and no boxes to measure by; sort some images into class folders and name them by "
    "data.eval_train and data.eval_val (docs/learning.md)"
)
WANDB_ID = "wandb_id.txt"  # in a run's folder: under this identifier a resumed run continues there


class Report:
    """Writes into the run folder on the main rank; elsewhere only checks the loss. All ranks make all calls.

    Args:
        batch: images of a step, on all ranks.
        per_epoch: optimiser steps of an epoch.
        steps: optimiser steps this process may come to.
        step: those already taken by an earlier process; later entries of it are dropped.
        outlook: lines to show at the start.
        total: steps of the whole run; absent: those of `run.epochs`.
    """

    def __init__(
        self, run: cfg.Run, data: DataSets, loader: ViewLoader, batch: int, per_epoch: int,
        steps: int, step: int, outlook: str, total: int | None = None,
    ) -> None:  # fmt: skip
        self.run, self.index, self.loader, self.main = run, data.train, loader, ranks.is_main()
        self.throughput, self.collapse = Throughput(loader, batch), Collapse()
        self._latest: Tensor | None = None  # loss
        if not self.main:
            return
        self.folder = Path(run.out)
        # At step 0, what is there belongs to a run that did not come to its first checkpoint.
        history.keep_until(self.folder / METRICS, step or -1)
        self.board, self.wandb = _boards(self.folder, run.wandb, step)
        self.history = history.History(self.folder, data.train, run.seed, step)
        self.total, self.last, self._step, self._listed = total or run.epochs * per_epoch, steps, step, 0
        self.history.event(
            "start", step, steps=self.total, steps_per_epoch=per_epoch, processes=ranks.world(),
            machine=machine("gpu" if loader.device.type == "cuda" else "cpu"), images=len(data.train),
            classes=len(data.train.classes), true_boxes=len(data.train.boxes),
            left_out=len(data.train.left_out),
        )  # fmt: skip
        resumed = f"continued after step {step} of {self.total}" if 0 < step < steps else ""
        for told in filter(None, (data.train.summary(), outlook, resumed)):
            tqdm.write(told)
        self.bar = Progress(steps, "step", step)

    def step(
        self, step: int, epoch: int, loss: Tensor, lr: float, embedding: Tensor | None = None,
        online: OnlineProbe | None = None,
    ) -> None:  # fmt: skip
        """Record step number `step` (from 1). Every `run.log_every` steps, wait for the loss of all ranks and
        for the probe's answers, and measure `embedding` (B, D), which the loss compared, if it did."""
        self._latest = loss.detach()
        self.throughput.step(step)
        if self.main:
            self._step = step
            self.bar.update()
        if step % self.run.log_every:
            return
        value, pace = self.check_loss(step), self.throughput.read(step)
        answers = {} if online is None else online.read()
        if self.main:
            collapse = {} if embedding is None else self.collapse.measure(embedding)
            found = {**collapse, **pace, "bad_images": self.loader.stats.bad_images}
            self._write(step, epoch, {"loss": value, "lr": lr, **answers, **found})
            self._note(epoch, value)

    def epoch(self, step: int, epoch: int) -> None:
        """Epoch number `epoch` (from 0) has ended: `check_loss`, and a line of progress with it."""
        value = self.check_loss(step)
        if self.main:
            self._note(epoch, value)
            self.bar.line()

    def _note(self, epoch: int, loss: float) -> None:
        pace = self.throughput.latest
        rate = {"images_s": f"{pace['images_per_second']:.0f}"} if pace else {}
        self.bar.note({"epoch": epoch, "loss": f"{loss:.4f}", **rate})

    def check_loss(self, step: int) -> float:
        """The latest loss, the mean of all ranks. A FloatingPointError if it is not finite, before a
        checkpoint is written, so that a sound one stays."""
        value = 0.0 if self._latest is None else float(ranks.all_mean(self._latest))
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}; {LOWER}")
        return value

    def scores(self, evaluation: Evaluation, epoch: int, step: int) -> dict[str, float]:
        """Record an evaluation after `epoch` epochs; its scores, with the latest loss and rate."""
        scores = dict(evaluation.scores)
        if self._latest is not None:
            scores["loss"] = float(ranks.all_mean(self._latest))
        scores |= {name: v for name, v in self.throughput.latest.items() if name == "images_per_second"}
        self.throughput.pause()
        if self.main:
            self._write(step, epoch, evaluation.scores)
            known = {name: value for name, value in evaluation.scores.items() if name in SCORES}
            told = ", ".join(f"{SCORES[name][0]} {value:{SCORES[name][1]}}" for name, value in known.items())
            moment = f"after {counted(epoch, 'epoch')}"
            tqdm.write(f"{moment}: {told or NOTHING}")
            if evaluation.picture is not None:
                with atomic_write(self.folder / PICTURES / f"epoch-{epoch:04d}.png") as file:
                    evaluation.picture.save(file, "PNG")
                self._picture("views", evaluation.picture, step)
            if evaluation.localised is not None:
                self._drawn("localised", self.history.localised(evaluation.localised, epoch, step), step)
            self._page()
        return scores

    def guide(
        self, regions: RegionTable, before: Snapshot, more: Mapping[str, float], epoch: int, step: int
    ) -> None:
        """Record the region table that a guide has just written after `epoch` epochs, `more` that the guide
        has found, and what the main rank has received for it since the last time: rows, bytes and seconds."""
        self.throughput.pause()
        if self.main:
            measured = {**health(regions, before, self.index), **more}
            found = {f"guide_{name}": value for name, value in measured.items()}
            if ranks.world() > 1:
                found |= {f"sync_{name}": value for name, value in asdict(regions.traffic).items()}
                regions.traffic = Traffic()
            self._write(step, epoch, found)
            self.board.add_histogram("guide_box_area", box_areas(regions), step)
            self._drawn("followed", self.history.boxes(regions, epoch, step), step)
            self._drawn("pairs", self.history.pairs(regions, step), step)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        """Finish the bar, curves and page and list the bad images, however the run ended."""
        if not self.main:
            return
        self.bar.close()
        self._list_bad_images()
        how = "stopped at run.max_steps" if self._step >= self.last else "stopped by a signal"
        how = "finished" if self._step >= self.total else how
        self._page(how if error is None else f"failed: {type(error).__name__}: {error}"[:600])
        if error is None:
            tqdm.write(f"{how}: {self.folder / PAGE}")
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error is not None))

    def _page(self, ended: str = "") -> None:
        """Write report.html. An error there must not end a run, nor hide why it ended."""
        try:
            if ended:
                self.history.event("end", self._step, how=ended)
            page.write(self.folder)
        except Exception as error:  # of any kind: the page can be made again at any time
            warnings.warn(f"{PAGE}: {error}; `report {self.folder}` writes it again", stacklevel=2)

    def _list_bad_images(self) -> None:
        if len(self.index.quarantine) > self._listed:
            bad_list.save(self.folder / QUARANTINE, self.index.quarantine)
            self._listed = len(self.index.quarantine)

    def _drawn(self, name: str, lines: history.Lines, step: int) -> None:
        if lines:
            self._picture(name, sheet(lines), step)

    def _picture(self, name: str, image: Any, step: int) -> None:
        self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def _write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        line = {"step": step, "epoch": epoch, **values}
        append_line(self.folder / METRICS, json.dumps(line))
        for name in line.keys() - {"step"}:
            self.board.add_scalar(name, line[name], step)
        self._list_bad_images()


def check_wandb() -> None:
    """A ValueError if Weights & Biases is not installed."""
    found = find_spec("wandb")
    if found is None or found.origin is None:  # without an origin it is a folder that the library left
        raise ValueError("run.wandb needs Weights & Biases; pip install wandb, or leave run.wandb out")


def _boards(folder: Path, project: str | None, step: int) -> tuple[Any, Any]:
    """The TensorBoard writer of a run, and its run in Weights & Biases, which copies it, or None. Entries
    after `step` are dropped."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    known, run = folder / WANDB_ID, None
    if step == 0:  # all of it is another run's
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    if project is not None:
        if step == 0 or not known.is_file():
            known.write_text(uuid.uuid4().hex[:12] + "\n")
        config = config_file.parse((folder / CONFIG).read_text()).model_dump(mode="json")
        run = import_module("wandb").init(
            project=project, name=folder.name, dir=str(folder), id=known.read_text().strip(), resume="allow",
            config=config, sync_tensorboard=True,
        )  # fmt: skip
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step or None), run


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Scores by moment or run as text; columns that no row has are left out."""
    columns = [name for name in SCORES if any(name in row for row in rows.values())]
    width = max([len(name) for name in rows] + [10])
    lines = [" " * width + "".join(f"{SCORES[name][0]:>11s}" for name in columns)]
    for moment, row in rows.items():
        cells = [f"{row[name]:>11{SCORES[name][1]}}" if name in row else f"{'-':>11s}" for name in columns]
        lines.append(f"{moment:{width}s}{''.join(cells)}")
    return "\n".join(lines)


class Throughput:
    """Speed of training alone: what lies between `pause` and the next step is left out.

    `images` counts those of one step, on all ranks.
    """

    def __init__(self, loader: ViewLoader, images: int) -> None:
        self._loader, self._images, self._stats = loader, images, loader.stats
        self._since: tuple[float, int] | None = None  # seconds, and steps taken
        # Seconds that the host and the GPU have waited: in this epoch, and since the last reading.
        self._counted, self._waited = np.zeros(2), np.zeros(2)
        self.latest: dict[str, float] = {}  # result of `read`

    def pause(self) -> None:
        """An evaluation or a pass of the guide begins."""
        self._since = None

    def step(self, step: int) -> None:
        """Step number `step` (from 1) has been launched."""
        stats = self._loader.stats
        if stats is not self._stats:
            # Replaced at every epoch; meanwhile the GPU has come to the end of the old one.
            self._waited[1] += (self._stats.gpu_waited or 0.0) - self._counted[1]
            self._stats, self._counted = stats, np.zeros(2)
        now = np.array([stats.waited, stats.gpu_waited or 0.0])
        self._waited += now - self._counted
        self._counted = now
        if self._since is None:
            self._since, self._waited = (time.perf_counter(), step), np.zeros(2)

    def read(self, step: int) -> dict[str, float]:
        """images_per_second; wait_share, the share of the time in which the host waited for the loader; and
        gpu_wait_share, that in which a GPU did; up to step number `step`, which has ended. Empty at the first
        step after a pause."""
        if self._since is None or step == self._since[1]:
            return {}
        now = time.perf_counter()
        seconds, steps = now - self._since[0], step - self._since[1]
        host, gpu = (self._waited / seconds).tolist()
        self.latest = {"images_per_second": self._images * steps / seconds, "wait_share": host}
        if self._stats.stream is not None:
            self.latest["gpu_wait_share"] = gpu
        self._since, self._waited = (now, step), np.zeros(2)
        return self.latest


class Collapse:
    """Measures embeddings and warns once when they have collapsed."""

    least_spread, least_rank = 0.05, 1.5
    warned = False

    def measure(self, embedding: Tensor) -> dict[str, float]:
        """`embedding_std` and `embedding_rank` of a batch (B, D). Waits for the device."""
        width, rank = spread(embedding), effective_rank(embedding)
        if (width < self.least_spread or rank < self.least_rank) and not self.warned:
            self.warned = True
            warnings.warn(
                f"the embeddings have collapsed (spread {width:.3f} of 1, effective rank {rank:.1f}); "
                "lower optim.lr, lengthen the warm-up or raise the momentum",
                stacklevel=3,
            )
        return {"embedding_std": width, "embedding_rank": rank}


@torch.no_grad()
def spread(embedding: Tensor) -> float:
    """Standard deviation over the batch of unit embeddings (B, D), times sqrt(D): 1 if they point in all
    directions alike, 0 if all are equal (SimSiam, arXiv 2011.10566, section 4.1, without the factor)."""
    unit = normalise(embedding)
    return float(unit.std(dim=0, correction=0).square().mean().sqrt()) * math.sqrt(unit.shape[1])


@torch.no_grad()
def effective_rank(embedding: Tensor) -> float:
    """exp of the entropy of the singular values of the unit embeddings (B, D), scaled to sum to 1: between 1
    (all on one line) and min(B, D) (RankMe, arXiv 2210.02885; Roy and Vetterli 2007). They are not centred,
    so that embeddings that differ only by noise have rank 1."""
    rows = normalise(embedding).double()
    # Through the smaller of the two products: DINO has 65,536 columns.
    product = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())
