"""TensorBoard, and Weights & Biases if configured: curves and pictures while a run lasts."""

from __future__ import annotations

import importlib
import shutil
import uuid
from pathlib import Path
from typing import Any

from ..config import file as config_file
from . import CONFIG

__all__ = ["start_wandb", "tensorboard", "wandb_module"]

WANDB_ID = "wandb_id.txt"
"""In a run's folder: the identifier under which a resumed run continues in Weights & Biases."""


def tensorboard(folder: Path, step: int) -> Any:
    """The writer of a run in `folder` that has taken `step` steps: later entries of it are dropped or, if it
    has taken none, all that another run left."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    if step == 0:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)


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


def start_wandb(folder: Path, project: str, step: int) -> Any:
    """A new run there, or the one that a resumed run began. It copies what TensorBoard gets from now on."""
    known = folder / WANDB_ID
    if not step or not known.is_file():
        known.write_text(uuid.uuid4().hex[:12] + "\n")
    config = config_file.parse((folder / CONFIG).read_text()).model_dump(mode="json")
    return wandb_module().init(
        project=project, name=folder.name, dir=str(folder), id=known.read_text().strip(), resume="allow",
        config=config, sync_tensorboard=True,
    )  # fmt: skip
