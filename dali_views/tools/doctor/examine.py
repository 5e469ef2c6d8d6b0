"""`dali-views doctor`: what this machine can do, and what to change, before a run finds out.

Of the standard library alone, and nothing that may hang or crash runs in this process: it speaks where NumPy
cannot be imported, a driver hangs or a disk does not answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...system import machine
from ..command_line import Answer
from . import lines
from .lines import GiB, Line, MiB

__all__ = ["add", "examine", "run"]

EXAMPLES = """
dali-views doctor
dali-views doctor --data photos              how fast are the images read?
dali-views doctor --quick                    health check of a container
"""

_FOR_DATA = 7.0  # seconds that the images are given at least
_SLOW = 500  # images/s under which reading is told as slow: two cores of a CPU decode more
_LOWEST_DRIVER = {"11": "450", "12": "525", "13": "580"}  # driver of Linux from which a CUDA runs
_OF_GPU = {"decode on GPU": ("decode", "gpu"), "hardware JPEG": ("hardware",)}
_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl-gpu", "/dev/nvmap")  # of a server, WSL, Jetson


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--data", metavar="PATH", help="folder of images or a shard: how fast is it read?")
    parser.add_argument(
        "--quick", action="store_true", help="neither PyTorch nor the disk is tried; for a health check"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=None,
        metavar="S",
        help="seconds to wait for what does not answer (40, quickly 19)",
    )


def run(args: argparse.Namespace) -> Answer:
    """Carries it out; exit code 0 if a run can start, on the CPU maybe, 1 if there is a problem."""
    timeout = (19.0 if args.quick else 40.0) if args.timeout is None else args.timeout
    found = examine(args.data, quick=args.quick, timeout=timeout)
    problems = sum(line.state == "problem" for line in found)
    told = [
        f"{line.state:8} {line.name:16} {line.found}{' -> ' * bool(line.mend)}{line.mend}" for line in found
    ]
    told.append(f"{problems or 'no'} problem{'s' * (problems != 1)}")
    facts = {"ok": not problems, "lines": [asdict(line) for line in found]}
    return Answer(facts, "\n".join(told), int(problems > 0))


def examine(data: str | None = None, quick: bool = False, timeout: float = 40.0) -> list[Line]:
    """All findings, in about three seconds, and two to five more if images are read.

    Args:
        data: folder of images, or a shard, whose reading is measured; not if `quick`.
        quick: leaves out what imports PyTorch.
        timeout: seconds after which what has not answered is a problem.
    """
    end = time.monotonic() + timeout
    device = any(map(os.path.exists, _DEVICES))
    probes = {"driver": Probe("driver"), "decode on CPU": Probe("decode", "cpu")}
    probes["cache"] = Probe("cache", str(_cache_folder()))
    if device:
        probes |= {name: Probe(*probe) for name, probe in _OF_GPU.items()}
    if not quick:
        probes["together"] = Probe("together")
    found: list[Line] = []
    for make in (lines.python, lines.cores, lines.memory, lines.shared_memory, lines.open_files):
        found += _guarded(make.__name__.replace("_", " "), make)
    answers = {name: probe.answer(end) for name, probe in probes.items()}
    if answers["driver"].get("gpus") and not device:
        answers |= {name: Probe(*probe).answer(end) for name, probe in _OF_GPU.items()}
    found += _guarded("versions", lambda: _versions(answers, device))
    found += _guarded("probes", lambda: _tried(answers))
    if data is not None and not quick:
        answer = Probe("data", data).answer(max(end, time.monotonic() + _FOR_DATA))
        found += _guarded("data", lambda: _data(data, answer))
    return found + _guarded("packages", lines.extras)


class Probe:
    """One probe at work in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self._failed = ""
        # Of itself, an interpreter looks for modules in the current folder first.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.probes import main; main()"
        command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
            )
        except (OSError, ValueError) as error:  # too many open files or processes; a NUL in a path
            self._failed = f"no process can be started ({error})"

    def answer(self, until: float) -> dict[str, Any]:
        """What the probe found, or why not as "failed", and as "mend" what to do where this is known.

        Waits for it until a time of the monotonic clock.
        """
        if self._failed:
            return {"failed": self._failed}
        try:
            out, errors = self._process.communicate(timeout=min(max(0.1, until - time.monotonic()), 3600))
        except subprocess.TimeoutExpired:
            self._process.kill()  # not waited for: a process that hangs in the system cannot be killed
            return {
                "failed": "no answer in time",
                "mend": "a longer --timeout tells whether it is slow or hangs",
            }
        if (code := self._process.returncode) < 0:
            return {"failed": f"crashed ({signal.Signals(-code).name})"}
        try:
            answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            told = [line.strip() for line in errors.splitlines() if line.strip()]
            return {"failed": told[-1] if told else f"ended with code {code}"}
        return answer


def _guarded(name: str, make: Callable[[], Line | Iterable[Line]]) -> list[Line]:
    """The lines of one question; what fails unforeseen is a line of its own."""
    try:
        made = make()
        return [made] if isinstance(made, Line) else list(made)
    except Exception as error:
        return [Line(name, "note", f"cannot be found out ({type(error).__name__}: {error})")]


def _versions(answers: dict[str, dict[str, Any]], device: bool) -> Iterator[Line]:
    """PyTorch, DALI and the driver, and whether each has what it needs of the others."""
    driver = answers["driver"]
    gpus, cuda = driver.get("gpus", []), driver.get("cuda", "")
    for name, build, package in (
        ("PyTorch", lines.torch_build(), "torch"),
        ("DALI", lines.dali_build(), "nvidia-dali-cuda120"),
    ):
        if build is None:
            yield Line(name, "problem", "not installed", f"pip install {package}")
            continue
        version, made_for = build
        found = f"{version}, made for CUDA {made_for}" if made_for else f"{version}, made without CUDA"
        if gpus and not made_for:
            yield Line(name, "problem", found, f"install a build of {package} with CUDA, or use the CPU")
        elif gpus and int(cuda.partition(".")[0]) < (major := int(made_for.partition(".")[0])):
            lowest = _LOWEST_DRIVER.get(str(major), "a newer one")
            mend = f"driver {lowest} or newer, or a build of {package} for CUDA {cuda}"
            yield Line(name, "problem", f"{found}, but the driver ends at CUDA {cuda}", mend)
        else:
            yield Line(name, "ok", found)
    if failed := driver.get("failed"):
        # A library without a device comes with some images of containers.
        yield Line(
            "driver", "problem" if device else "note", failed,
            driver.get("mend", "restart or reinstall the NVIDIA driver"),
        )  # fmt: skip
    elif cuda:
        release = machine.driver_release()
        yield Line("driver", "ok", f"{release + ', ' if release else ''}up to CUDA {cuda}")
    elif device:
        mend = "docker run --gpus all, with the NVIDIA Container Toolkit"
        yield Line("driver", "note", "a GPU's device, but no libcuda.so.1", mend)
    if not gpus:
        yield Line("GPU", "note", "none visible", 'use device="cpu"; in a container: --gpus all')
    for number, gpu in enumerate(gpus):
        found = f"{gpu['name']}, {gpu['bytes'] / GiB:.0f} GiB, compute capability {gpu['capability']}"
        yield Line(f"GPU {number}", "ok", found)


def _tried(answers: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """What was tried out on this machine."""
    gpus = bool(answers["driver"].get("gpus"))
    if both := answers.get("together"):
        if "failed" in both:
            mend = both.get("mend", "reinstall torch, in a build for this machine")
            yield Line("together", "problem", both["failed"], mend)
        elif gpus and not both["gpu"]:
            yield Line("together", "problem", "PyTorch does not see the GPU", "see PyTorch and driver above")
        else:
            where = "GPU" if both["gpu"] else "CPU"
            yield Line("together", "ok", f"PyTorch takes DALI's images, on the {where}")
    for name in ("decode on GPU", "decode on CPU"):
        if name == "decode on CPU" or gpus:
            failed = answers[name].get("failed")
            mend = "reinstall nvidia-dali-cuda120" + (", see DALI and driver above" if "GPU" in name else "")
            mend = answers[name].get("mend", mend)
            yield Line(name, "problem", failed, mend) if failed else Line(name, "ok", "works")
    if gpus:
        answer = answers["hardware JPEG"]
        if answer.get("there"):
            yield Line("hardware JPEG", "ok", "there; hw_decoder_load says how much it gets")
        else:
            why = answer.get("failed", "this GPU has no JPEG decoder of its own")
            yield Line("hardware JPEG", "note", why, "none needed: CUDA decodes, hw_decoder_load=0")
    folder = _cache_folder()
    if failed := answers["cache"].get("failed"):
        mend = "set DALI_VIEWS_CACHE to a folder that can be written"
        yield Line("cache", "note", f"{folder} cannot be written ({failed}); indexes are not kept", mend)
    else:
        yield Line("cache", "ok", f"{folder} can be written")


def _data(path: str, answer: dict[str, Any]) -> Line:
    if failed := answer.get("failed"):
        mend = answer.get("mend", "mend the path, or mount it")
        return Line("data", "problem", f"{path} cannot be read ({failed})", mend)
    if not answer["images"]:
        return Line(
            "data", "problem", f"{path}: no image was found in it", "give a folder of images or a shard"
        )
    size, seconds = answer["bytes"] / answer["images"], answer["seconds"]
    rate = answer["images"] / seconds
    found = (
        f"{path}: {answer['bytes'] / MiB / seconds:.0f} MiB/s, {rate:.0f} images/s of {size / 1024:.0f} KiB"
        f" ({answer['images']} read, cold where the system allows)"
    )
    if rate < _SLOW:
        return Line("data", "note", found, "a local disk, dali-views pack, or shards")
    return Line("data", "ok", found)


def _cache_folder() -> Path:
    """Where scans are kept, see `data.scan.ScanCache`."""
    own, shared = os.environ.get("DALI_VIEWS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dali_views"
