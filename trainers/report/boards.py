"""Where curves and pictures go while a run lasts: TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import importlib
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import config as cfg

__all__ = ["Boards", "wandb_module"]

WANDB_ID = "wandb_id.txt"
"""In a run's folder: what Weights & Biases knows the run by, so that a resumed run goes on there."""


class Boards:
    """Passes scalars, pictures and histograms on; on the main rank only.

    Args:
        step: optimiser steps taken already; TensorBoard takes back what was written after them, or, if there
            are none, all that another run left.
    """

    def __init__(self, config: cfg.Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        folder = Path(config.run.out) / "tensorboard"
        if step == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._board = SummaryWriter(str(folder), purge_step=step or None)
        self._wandb: Any = None if config.run.wandb is None else _wandb_run(config, config.run.wandb, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Note values by name."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._log(values, step)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Note a picture (H, W, 3)."""
        self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            self._log({name: wandb_module().Image(pixels)}, step)

    def histogram(self, name: str, values: NDArray[np.float32], step: int) -> None:
        """Note how values (N,) are spread."""
        self._board.add_histogram(name, values, step)
        if self._wandb is not None:
            self._log({name: wandb_module().Histogram(values)}, step)

    def close(self, failed: bool) -> None:
        """Write out what is under way."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self._wandb is not None:
            self._wandb.log({**values, "step": step})


def wandb_module() -> Any:
    """The library of Weights & Biases.

    Raises:
        ValueError: it is not installed.
    """
    try:
        module = importlib.import_module("wandb")
    except ImportError:
        module = None
    # A folder "wandb", such as the library leaves where it runs, can be imported too.
    if not hasattr(module, "init"):
        raise ValueError("run.wandb needs Weights & Biases; pip install wandb, or leave run.wandb out")
    return module


def _wandb_run(config: cfg.Config, project: str, step: int) -> Any:
    """A new run there, or the one that a resumed run began."""
    folder = Path(config.run.out)
    known = folder / WANDB_ID
    if not step or not known.is_file():
        known.write_text(uuid.uuid4().hex[:12] + "\n")
    run = wandb_module().init(
        project=project, name=folder.name, dir=str(folder), id=known.read_text().strip(), resume="allow",
        config=config.model_dump(mode="json"),
    )  # fmt: skip
    # Its own count of steps cannot go back, as a resumed run does.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
