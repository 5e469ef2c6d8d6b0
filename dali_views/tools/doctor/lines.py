"""What the system grants a run: cores, memory, files, packages, each in one line of `dali-views doctor`."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ...system.machine import installed

# Of the standard library alone: the doctor must speak where the packages are what is broken.

MiB, GiB = 2**20, 2**30
EXTRAS = {
    "timm": "more backbones",
    "obstore": "images in buckets",
    "pyarrow": "Parquet and Arrow files",
    "wandb": "curves on a server",
}
"""Optional packages, and what each is for."""

_OTHER_FILES = 100  # open beside the images: libraries, devices, sockets
_LEAST_FILES = 128
_GOOD_FILES = 1024
_NO_LIMIT = 2**60  # what version 1 of cgroups says where there is none


@dataclass(frozen=True)
class Line:
    """One finding. A problem keeps a run from starting, or from starting as it would by default."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    mend: str = ""
    """What to change, in a few words."""


def python() -> Line:
    """The interpreter."""
    found = f"{platform.python_version()}, {platform.machine()}"
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        return Line("Python", "problem", found, "use Python 3.10 to 3.13")
    if sys.platform != "linux":
        return Line("Python", "problem", f"{found}, {sys.platform}", "DALI runs on Linux alone (or WSL)")
    return Line("Python", "ok", found)


def cores() -> Line:
    """Cores that this process may use, by affinity and cgroup, and its share of them beside others."""
    usable = len(os.sched_getaffinity(0))
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    threads = max(1, usable // processes)
    quota = min(_quotas(), default=float(usable))
    found = f"{usable} of {os.cpu_count()} usable, {threads} threads per process"
    if quota < usable:
        granted = f"{quota:g}" if quota >= 0.01 else "less than 0.01"
        share = max(1, int(quota) // processes)
        return Line("cores", "note", f"{found}; the cgroup grants {granted}", f"set threads={share}")
    return Line("cores", "ok", found)


def memory() -> Line:
    """Memory of the machine, and how much of it the cgroup grants."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(_memory_limits(), default=total)
    found = f"{total / GiB:.1f} GiB"
    if limit < total:
        found += f", of which the cgroup grants {limit / GiB:.1f}"
    if min(limit, total) < 4 * GiB:
        return Line("memory", "note", found, "lower batch_size, or grant 4 GiB")
    return Line("memory", "ok", found)


def shared_memory() -> Line:
    """/dev/shm, over which NCCL and the workers of DataLoaders exchange data; this loader does not use it."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        return Line("shared memory", "note", f"no /dev/shm ({error.strerror})", "mount a tmpfs there")
    size = status.f_frsize * status.f_blocks
    found = f"/dev/shm has {size / MiB:.0f} MiB"
    if size < GiB:
        return Line("shared memory", "note", found, "for several GPUs: docker run --shm-size=1g")
    return Line("shared memory", "ok", found)


def open_files() -> Line:
    """How many files a process may have open: DALI opens all images of a batch at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited:
        return Line("open files", "ok", "no limit")
    found = f"at most {soft}, batches of up to {max(0, soft - _OTHER_FILES)} image files per process"
    if soft >= _GOOD_FILES:
        return Line("open files", "ok", found)
    reach = hard == unlimited or hard >= _GOOD_FILES
    mend = f"ulimit -n {_GOOD_FILES}" + ("" if reach else f", which an administrator must allow (now {hard})")
    return Line("open files", "problem" if soft < _LEAST_FILES else "note", found, mend)


def extras() -> Iterator[Line]:
    """The optional packages."""
    for package, purpose in EXTRAS.items():
        if found := installed(package):
            yield Line(package, "ok", found)
        else:
            yield Line(package, "note", f"not installed ({purpose})", f"pip install {package}")


def torch_build() -> tuple[str, str] | None:
    """Version of PyTorch and of the CUDA that it was built with ("" for none), read without importing it."""
    try:
        spec = find_spec("torch")
        text = Path(str(spec and spec.origin)).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return None
    named = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return (named[1] if named else "?"), (cuda[1] if cuda else "")


def dali_build() -> tuple[str, str] | None:
    """Version of DALI and of the CUDA (major) that its package is for."""
    for major in ("12", "13", "11"):
        if found := installed(f"nvidia-dali-cuda{major}0"):
            return found, major
    return None


def _quotas() -> Iterator[float]:
    """Cores that each cgroup above this process grants, where it grants fewer than all."""
    for folder in _cgroups("cpu"):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            yield int(words[0]) / int(words[1])
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[int]:
    """Bytes that each cgroup above this process grants."""
    for folder in _cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (limit := _text(folder / name)).isdigit() and int(limit) < _NO_LIMIT:
                yield int(limit)


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of the cgroups that hold this process, of both versions, from its own up to the root."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = Path("/sys/fs/cgroup") / controllers
        # In a container its own group may be the root that it sees, under a path of the host.
        folder = top / own.lstrip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
