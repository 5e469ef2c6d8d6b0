"""Which device and which precision a run uses."""

from __future__ import annotations

import torch

from .. import config as cfg

__all__ = ["autocast", "device_kind", "precision"]


def device_kind(config: cfg.Config) -> str:
    """ "gpu" or "cpu": what the configuration says, or what the machine has."""
    if config.run.device != "auto":
        return config.run.device
    return "gpu" if torch.cuda.is_available() else "cpu"


def precision(config: cfg.Config) -> torch.dtype | None:
    """The half precision of the forward pass, None for full precision."""
    choice = config.run.amp
    if choice == "auto":
        if device_kind(config) == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


def autocast(config: cfg.Config, device: torch.device) -> torch.autocast:
    """The context of every forward pass."""
    dtype = precision(config)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
