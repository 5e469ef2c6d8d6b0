"""A trained run: its configuration and checkpoint, its method, its encoder or a baseline beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from . import config as cfg
from .config import file as config_file
from .encoders.backbones import Backbone, build_backbone
from .encoders.weights import load_weights
from .engine import checkpoint
from .engine.restore import restore
from .methods import Method, method_of

__all__ = ["KINDS", "ColourHistogram", "Kind", "encoder_of", "load_run", "method_with"]

Kind = Literal["trained", "untrained", "colours"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_TRAINED = ("model.", "method.")  # sections that the weights of a checkpoint depend on


def load_run(
    path: Path, overrides: Sequence[str] = (), files: Sequence[str | Path] = (),
    afresh: Mapping[str, Any] | None = None,
) -> tuple[Path, cfg.Config, dict[str, Any]]:  # fmt: skip
    """Folder, configuration with changes (see `override`), and checkpoint of a run, named by its folder or
    last.pt.

    A ValueError if the file is another one, or if an override would change the network that was trained.
    """
    if path.is_file() and path.name != checkpoint.LAST:
        raise ValueError(f"{path} is not the {checkpoint.LAST} of a run; name the run's folder")
    folder = path.parent if path.is_file() else path
    saved = checkpoint.load_run(folder)
    trained = config_file.parse(saved["config"])
    config = config_file.override(trained, overrides, files, afresh)
    changed = [key for key in config_file.differences(trained, config) if key.startswith(_TRAINED)]
    if changed:
        raise ValueError(
            f"the run in {folder} was trained with another {', '.join(changed)}, which no evaluation can "
            "change; leave it out"
        )
    return folder, config, saved


def encoder_of(config: cfg.Config, saved: Mapping[str, Any], kind: Kind, device: torch.device) -> Backbone:
    """The encoder on `device`: of the checkpoint, with its first weights, or a colour histogram."""
    if kind == "colours":
        return cast(Backbone, ColourHistogram(config.views.mean, config.views.std).to(device))
    if not isinstance(config.method, cfg.Own):
        return method_with(config, saved if kind == "trained" else None, device).encoder
    torch.manual_seed(config.run.seed)
    encoder = build_backbone(config.model.backbone, config.model.stem, config.model.zero_init_residual)
    if kind == "trained":
        within = f"{saved['encoder']}."  # what else there is needs the method's class
        parts = {name: value for name, value in saved["method"].items() if name.startswith(within)}
        own = {name.removeprefix(within): value for name, value in parts.items()}
        restore({"encoder": own}, {"encoder": encoder})
    elif config.model.weights is not None:
        load_weights(encoder, config.model.weights)
    return encoder.to(device).to(memory_format=torch.channels_last)


def method_with(config: cfg.Config, saved: Mapping[str, Any] | None, device: torch.device) -> Method:
    """A run's method on `device`, with the checkpoint's weights, or those that the run began with."""
    torch.manual_seed(config.run.seed)
    method = method_of(config)
    if saved is not None:
        restore(saved, {"method": method})
    elif config.model.weights is not None:
        method.start_from(config.model.weights)
    return method.to(device).to(memory_format=torch.channels_last)


class ColourHistogram(nn.Module):
    """Share of pixels in each of 8 x 8 x 8 colours, square-rooted: what colour alone says about a class.

    Square roots make the inner product of two histograms their Bhattacharyya coefficient, and rows of
    length 1. Takes images (B, 3, H, W) normalised by `mean` and `std`; gives (B, 512).
    """

    dim = 512

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        level = ((images.float() * std + mean) * 8).long().clamp(0, 7)
        colour = (level[:, 0] * 64 + level[:, 1] * 8 + level[:, 2]).flatten(1)
        counts = torch.zeros(len(images), self.dim, device=images.device)
        counts.scatter_add_(1, colour, torch.ones_like(colour, dtype=counts.dtype))
        return (counts / colour.shape[1]).sqrt()
