"""Where and in which precision a run computes: what its parts need beside their own section."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import config as cfg
from . import ranks

__all__ = ["Setting", "device_kind", "join"]


@dataclass(frozen=True)
class Setting:
    """The part of a configuration that every part of a run uses."""

    device: torch.device
    precision: torch.dtype | None  # half precision of forward passes; None: full precision
    seed: int
    batch: int  # images of a training step over all processes
    parts: int  # of a step, see `optim.accumulate`
    threads: int | None  # CPU threads per process that decode; None: this process's share of the cores
    on_bad_image: str
    max_bad_share: float
    hw_decoder_load: float  # share of JPEGs for the hardware decoder

    @property
    def kind(self) -> str:
        """ "gpu" or "cpu", where DALI decodes."""
        return "gpu" if self.device.type == "cuda" else "cpu"

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None)


def join(config: cfg.Config) -> Setting:
    """Join the process group that torchrun announced, if any, and resolve `auto` for this machine."""
    run, device = config.run, ranks.init(device_kind(config.run))
    return Setting(
        device, _precision(run.amp, device), run.seed, config.optim.batch, config.optim.accumulate,
        run.threads, run.on_bad_image, run.max_bad_share, run.hw_decoder_load,
    )  # fmt: skip


def device_kind(run: cfg.Run) -> str:
    """ "gpu" or "cpu": what the configuration says, or what the machine has."""
    if run.device != "auto":
        return run.device
    return "gpu" if torch.cuda.is_available() else "cpu"


def _precision(choice: str, device: torch.device) -> torch.dtype | None:
    if choice == "auto":
        if device.type == "cpu":
            return None
        # GPUs before compute capability 8 only emulate bfloat16, slower than they compute in float32.
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]
