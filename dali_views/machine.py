"""Which machine and which versions a figure belongs to, without the machine's name or address."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from .doctor.lines import driver_release, installed

# What decides the speed of loading, by the name under which each is installed.
_PACKAGES = {
    "DALI": "nvidia-dali-cuda120",
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "numba": "numba",
    "Pillow": "pillow",
}


def machine(device: str) -> str:
    """Cores, processor, GPU and driver (for `device="gpu"`), Python and the versions that matter."""
    parts = [f"{len(os.sched_getaffinity(0))} cores", _processor()]
    if device == "gpu":
        release = driver_release()
        parts += [torch.cuda.get_device_name(), f"driver {release}" if release else ""]
    parts += [f"Python {platform.python_version()}"]
    parts += [f"{name} {found}" for name, package in _PACKAGES.items() if (found := installed(package))]
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
