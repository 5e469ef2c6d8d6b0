"""dali-views doctor: what this machine can do, and what to change, before a run finds out.

This process imports the standard library alone, so it reports even if NumPy cannot be imported. What may hang
or crash (a driver, DALI, PyTorch, a disk) is tried in a child process, one probe after the other.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..system.machine import cache_folder, installed
from .command_line import Answer

EXAMPLES = """
dali-views doctor
dali-views doctor --data photos              measures how fast the images are read
dali-views doctor --quick                    health check of a container
"""
MiB, GiB = 2**20, 2**30
_DALI = next(filter(installed, ("nvidia-dali-cuda130", "nvidia-dali-cuda110")), "nvidia-dali-cuda120")
PACKAGES = {
    "PyTorch": ("torch", ""), "DALI": (_DALI, ""), "timm": ("timm", ": more backbones"),
    "obstore": ("obstore", ": images in buckets"), "pyarrow": ("pyarrow", ": Parquet and Arrow files"),
    "lmdb": ("lmdb", ": images in LMDB"),
    "wandb": ("wandb", ": curves on a server"),
}  # fmt: skip
"""What pip calls each package and, if it is optional, its purpose."""

_LOWEST_DRIVER = {"cuda110": 450, "cuda120": 525, "cuda130": 580}  # release for Linux
_MARK, _LATE = "doctor: ", "no answer in time"
_SLOW = 500  # images/s; two CPU cores decode more
_MOST, _PIECE, _SECONDS = 2000, 128 * 1024, 2.0  # images to read, bytes of one in a shard, time for it


class Line(NamedTuple):
    """One finding. A problem keeps a run from starting, or from starting as it would by default."""

    name: str
    state: str  # "ok", "note" or "problem"
    found: str
    fix: str = ""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--data", metavar="PATH", help="folder of images or a shard; measures how fast it is read"
    )
    parser.add_argument("--quick", action="store_true", help="skip PyTorch and --data: a health check")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds to wait (40, with --quick 19)")


def run(args: argparse.Namespace) -> Answer:
    """Examines the machine; exit code 0 if a run can start, if only on the CPU, 1 if there is a problem."""
    wait = (19.0 if args.quick else 40.0) if args.timeout is None else args.timeout
    left_out = ("together", "data") if args.quick else () if args.data else ("data",)
    probes = [name for name in _PROBES if name not in left_out]
    found = [*_machine(), *_packages(), *_tried(probes, args.data or "", wait)]
    problems = sum(line.state == "problem" for line in found)
    text = [f"{one.state:8} {one.name:16} {one.found}{' -> ' * bool(one.fix)}{one.fix}" for one in found]
    text.append(f"{problems or 'no'} problem{'s' * (problems != 1)}")
    facts = {"ok": not problems, "lines": [line._asdict() for line in found]}
    return Answer(facts, "\n".join(text), int(problems > 0))


def _line(name: str, found: str, bad: bool, fix: str, state: str = "note") -> Line:
    return Line(name, state, found, fix) if bad else Line(name, "ok", found)


def _machine() -> Iterator[Line]:
    """What the system grants a process."""
    here = f"{platform.python_version()}, {platform.machine()}, {sys.platform}"
    fits = (3, 10) <= sys.version_info[:2] < (3, 14) and sys.platform == "linux"
    yield _line("Python", here, not fits, "use Python 3.10 to 3.13 on Linux (or WSL)", "problem")

    usable = len(os.sched_getaffinity(0))
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    quota = min([usable, *(int(most) / int(period) for most, period in _limits("cpu.max"))])
    found = f"{usable} of {os.cpu_count()} usable" + f", the cgroup grants {quota:.2g}" * (quota < usable)
    threads = max(1, int(quota) // processes)
    yield _line("cores", f"{found}: {threads} per process", quota < usable, f"set threads={threads}")

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min([total, *(int(most) for (most,) in _limits("memory.max"))])
    found = f"{total / GiB:.1f} GiB" + f", of which the cgroup grants {limit / GiB:.1f}" * (limit < total)
    yield _line("memory", found, limit < 4 * GiB, "lower batch_size, or grant 4 GiB")

    # NCCL and the workers of DataLoaders exchange data there; this loader does not.
    size = shutil.disk_usage("/dev/shm").total if os.path.exists("/dev/shm") else 0
    fix = "for several GPUs: docker run --shm-size=1g"
    yield _line("shared memory", f"/dev/shm has {size / MiB:.0f} MiB", size < GiB, fix)

    # DALI opens all images of a batch at once.
    soft, hard = (2**63 if limit < 0 else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    fix = "ulimit -n 1024" + f", which an administrator must allow (now {hard})" * (hard < 1024)
    found = f"at most {soft}, batches of up to {max(0, soft - 100)} image files per process"
    yield _line("open files", found, soft < 1024, fix, "problem" if soft < 128 else "note")


def _limits(file: str, groups: str = "/proc/self/cgroup", top: str = "/sys/fs/cgroup") -> Iterator[list[str]]:
    """Words of a limit in each cgroup (version 2) from this process's own up to the root, but for "max"."""
    with suppress(OSError):
        own = Path(top, Path(groups).read_text().rpartition("::")[2].strip().lstrip("/"))
        # In a container its own group may be the root that it sees, under a path of the host.
        for folder in (own, *own.parents[: len(own.relative_to(top).parts)]):
            if (folder / file).is_file() and (words := (folder / file).read_text().split())[0] != "max":
                yield words


def _packages() -> Iterator[Line]:
    for name, (package, purpose) in PACKAGES.items():
        version = installed(package)
        found, state = version or f"not installed{purpose}", "note" if purpose else "problem"
        yield _line(name, found, not version, f"pip install {package}", state)


def _tried(names: list[str], data: str, wait: float) -> list[Line]:
    """Tries probes in a child. If one kills it, the others go on; if one hangs, the rest is lost."""
    # Not the current folder, in which an interpreter looks for modules first.
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import child; child()"
    command, end = [sys.executable, "-W", "ignore", "-c", program, data], time.monotonic() + wait
    found: dict[str, list[Line]] = {}
    while waiting := [name for name in names if name not in found]:
        out, pipe, null = b"", subprocess.PIPE, subprocess.DEVNULL
        try:
            process = subprocess.Popen([*command, *waiting], stdin=null, stdout=pipe, stderr=null)
            out, _ = process.communicate(timeout=min(max(0.1, end - time.monotonic()), 3600))
            code = process.returncode
            why = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired as late:
            process.kill()  # not waited for: a process that hangs in the system cannot be killed
            out, why = late.stdout or b"", _LATE
        except OSError as error:  # too many open files or processes
            why = f"no process can be started ({error})"
        marked = [line for line in out.decode(errors="replace").splitlines() if line.startswith(_MARK)]
        for name, *answers in (json.loads(line.removeprefix(_MARK)) for line in marked):
            found[name] = [Line(*answer) for answer in answers if answer]
        lost = [name for name in waiting if name not in found]
        found |= {name: [_failed(name, why)] for name in lost[: None if why == _LATE else 1]}
    return [line for name in names for line in found[name]]


def _failed(name: str, why: str) -> Line:
    _, state, fix = _PROBES[name]
    return Line(name, state, why, "a longer --timeout shows whether it hangs" if why == _LATE else fix)


def child() -> None:
    """Tries the probes that are named, and prints the line of each as soon as it has ended."""
    data, *names = sys.argv[1:]
    for name in names:
        try:
            line = _PROBES[name][0](data if name == "data" else name)
        except Exception as error:
            line = _failed(name, f"{type(error).__name__}: {' '.join(str(error).split())}")
        print(f"\n{_MARK}{json.dumps([name, line])}", flush=True)


def _cache(name: str) -> Line:
    """Whether a file can be made in the folder of scans, or where it would be made; nothing is left there."""
    folder = cache_folder().absolute()
    with tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())):
        return Line(name, "ok", f"{folder} can be written")


@cache
def _gpus() -> list[str]:
    """Name, memory, compute capability and driver of each GPU."""
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _gpu(name: str) -> Line:
    if not _gpus():
        return Line(name, "note", "nvidia-smi shows none", 'use device="cpu"; in a container: --gpus all')
    lowest = _LOWEST_DRIVER[_DALI.rpartition("-")[2]]
    old = any(int(gpu.rpartition(", ")[2].partition(".")[0]) < lowest for gpu in _gpus())
    fix = f"driver {lowest} or newer, which {_DALI} requires"
    return _line(name, "; ".join(_gpus()), old, fix, "problem")


def _decode(name: str) -> Line | None:
    """One JPEG through the loader's decoder, compared with what was encoded; "together": also by PyTorch."""
    gpu = name != "decode on CPU" and bool(_gpus())
    if name == "decode on GPU" and not gpu:
        return None
    import numpy as np
    from PIL import Image

    from ..graph.decode import decoder

    across, down = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 64))
    pixels = np.stack([across, down, 255 - across], 2).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=95)
    graph = decoder(1, 1, "gpu" if gpu else "cpu", 0 if gpu else None)
    (images,) = graph.run(images=[np.frombuffer(file.getvalue(), np.uint8)])
    if name == "together":
        import torch

        if gpu and not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch, made for CUDA {torch.version.cuda}, does not see the GPU")
        found = torch.utils.dlpack.from_dlpack(images.as_tensor())[0].cpu().numpy()
    else:
        found = np.asarray((images.as_cpu() if gpu else images).at(0))
    if found.shape != pixels.shape or abs(found.astype(int) - pixels).mean() > 8:
        raise RuntimeError("the decoded image is not the one that was encoded")
    return Line(name, "ok", f"works on the {'GPU' if gpu else 'CPU'}")


def _data(path: str) -> Line:
    """How fast images, or pieces of a shard, are read after a request to drop them from the page cache."""
    from ..data.listing import EXTENSIONS

    files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    images = islice((file for file in files if file.lower().endswith(EXTENSIONS)), _MOST)
    pieces = ((path, number * _PIECE, _PIECE) for number in range(_MOST))
    jobs = list(pieces if os.path.isfile(path) else ((image, 0, -1) for image in images))
    began = time.monotonic()

    def read(job: tuple[str, int, int]) -> int:
        if time.monotonic() - began > _SECONDS:
            return 0
        with open(job[0], "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(job[1])
            return len(file.read(job[2]))

    with ThreadPoolExecutor(8) as threads:
        sizes = [size for size in threads.map(read, jobs) if size]
    if not sizes:
        raise ValueError(f"no image was found in {path}")
    rate, size = len(sizes) / (time.monotonic() - began), sum(sizes) / len(sizes)
    found = f"{path}: {rate * size / MiB:.0f} MiB/s, {rate:.0f} images/s of {size / 1024:.0f} KiB"
    found += f" ({len(sizes)} read, cold where the system allows)"
    return _line("data", found, rate < _SLOW, "a local disk, or dali-views pack")


_PROBES: dict[str, tuple[Callable[[str], Line | None], str, str]] = {
    "cache": (_cache, "note", "set DALI_VIEWS_CACHE to a folder that can be written"),
    "decode on CPU": (_decode, "problem", f"reinstall {_DALI}"),
    "GPU": (_gpu, "problem", "restart or reinstall the NVIDIA driver"),
    "decode on GPU": (_decode, "problem", f"reinstall {_DALI}"),
    "together": (_decode, "problem", "reinstall torch, in a build for this machine"),
    "data": (_data, "problem", "give a folder of images or a shard, or mount it"),
}
"""What may hang or crash, given its name or --data; state and fix of its line if it fails."""
