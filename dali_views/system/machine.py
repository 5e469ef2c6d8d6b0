"""Which machine and which versions a figure belongs to, without the machine's name or address."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
        import torch  # the doctor, which reads this file, must run without it

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


def installed(package: str) -> str:
    """Version of an installed package, or ""."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def driver_release() -> str:
    """Release of the NVIDIA kernel driver, or ""."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")
