"""The machine: where scans are kept, its name in tables of figures, a full GPU, and marks for profilers.

Only the standard library is imported, so that `dali-views doctor` reports where NumPy is broken.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What decides the speed of loading, and the name under which it is installed.
_PACKAGES = {"DALI": "nvidia-dali-cuda120"} | {
    n: n for n in ("torch", "torchvision", "numpy", "numba", "Pillow")
}
# DALI and PyTorch raise plain RuntimeErrors when memory is full. DALI's memory pools say "Can't allocate 123
# bytes on device 0.", a thread without room for its stack "Resource temporarily unavailable".
_FULL = {
    "memory of the GPU": (
        "out of memory", "CUDA allocation failed", "cudaErrorMemoryAllocation", "bytes on device",
    ),
    "main memory, or what a limit (ulimit -v or -u, a container's) leaves of it,": (
        "Cannot allocate memory", "can't allocate memory", "not enough memory", "bad_alloc",
        "can't start new thread", "Resource temporarily unavailable", "failed to map segment",
    ),
}  # fmt: skip


def cache_folder() -> Path:
    """Where scans are kept: $DALI_VIEWS_CACHE, else dali_views in $XDG_CACHE_HOME, else in ~/.cache."""
    own, shared = os.environ.get("DALI_VIEWS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dali_views"


def full_memory(error: BaseException | None) -> str:
    """Which memory an error, or one that it was raised from or during, says to be full; "" if none does."""
    gpu, main = _FULL
    while error is not None and not isinstance(error, ConnectionError):  # sockets use some of these words
        if isinstance(error, MemoryError):  # it may have no text
            return main
        for name in (gpu, main):
            if any(words in str(error) for words in _FULL[name]):
                return name
        # Numba says that a library is missing when it could not be mapped into memory.
        error = error.__cause__ or error.__context__
    return ""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show what runs inside as one range of a profile; costs a few microseconds.

    The range is PyTorch's and, where there is a GPU, also NVTX's (Nsight Systems).
    """
    import torch

    nvtx = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if nvtx:
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def machine(device: str) -> str:
    """Cores, processor, GPU and driver (for `device="gpu"`), Python and package versions; no host name."""
    processor = _first_line("/proc/cpuinfo", "model name").partition(":")[2].strip()
    parts = [f"{len(os.sched_getaffinity(0))} cores", processor or platform.machine()]
    if device == "gpu":
        import torch  # the doctor, which imports this file, must run without it

        words = _first_line("/proc/driver/nvidia/version", "NVRM").split()
        release = [f"driver {word}" for word in words if word[0].isdigit() and "." in word][:1]
        parts += [torch.cuda.get_device_name(), *release]
    parts += [f"Python {platform.python_version()}"]
    parts += [f"{name} {found}" for name, package in _PACKAGES.items() if (found := installed(package))]
    return ", ".join(parts)


def _first_line(file: str, wanted: str) -> str:
    """The first line of a file of the kernel that begins with a word, or ""."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(wanted)), "")


def installed(package: str) -> str:
    """Version of an installed package, or ""."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
