"""dali-views gpu-report: all that only a GPU can show, in one command, ten minutes and one page.

A part is a command that users have, too, in a process of its own, with a share of the time. One that fails or
hangs costs itself alone, and the page has the end of its log. Without a GPU everything runs at a small size,
so that the command can be tried before a GPU is at hand.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..system.machine import machine
from . import options
from .command_line import Answer

EXAMPLES = """
dali-views gpu-report report                     on generated scenes
dali-views gpu-report report photos --minutes 30
dali-views gpu-report report photos --parts pixels loaders
"""
PAGE = "report.html"
_ROOT = Path(__file__).resolve().parents[2]
_LEAST = 3.0  # seconds without which no part is begun
_TOLD = ("left out:", "failed:", "waits for the GPU:")  # lines of a log that the page quotes
_TAIL = 30  # lines of the log of a part that failed


@dataclass(frozen=True)
class Job:
    """What all parts are given; without a GPU batches, views, networks and turns are small."""

    images: str
    out: Path
    device: str
    minutes: float  # of the whole report

    @property
    def gpu(self) -> bool:
        return self.device == "gpu"

    def file(self, part: str) -> Path:
        """Its figures. The name says whether they are of a GPU."""
        return self.out / f"{self.device}_{part}.csv"

    def bench(self, part: str, *words: str, program: str = "dali_views") -> list[str]:
        """`bench` of either package, on the images."""
        size, batch = ("224", "256") if self.gpu else ("32", "4")
        common = ["--device", self.device, "--size", size, "--batch-size", batch]
        return ["-m", program, "bench", self.images, *common, "--csv", str(self.file(part)), *words]

    def turns(self, part: str, *words: str) -> list[str]:
        """Contests: longer turns and more rounds if there is time."""
        seconds = min(10.0, 2.0 * max(1.0, self.minutes / 10)) if self.gpu else 0.2
        rounds = "3" if self.gpu else "1"
        return self.bench(part, "--seconds", f"{seconds:g}", "--rounds", rounds, *words)


class Part(NamedTuple):
    """`share`: minutes out of ten; `command`: what Python is given, or a sentence why not; `timed`: it takes
    --minutes; `wrong`: what its figures show to be wrong, or ""."""

    shows: str
    share: float
    command: Callable[[Job], list[str] | str]
    timed: bool = False
    wrong: Callable[[list[dict[str, str]]], str] = lambda rows: ""


@dataclass
class Found:
    """What came of a part, as the page shows it."""

    name: str
    shows: str
    state: str = "skipped"  # or "done", "failed"
    why: str = ""
    seconds: float = 0.0
    told: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    text: str = ""


def _doctor(job: Job) -> list[str]:
    return ["-m", "dali_views", "doctor", "--timeout", f"{3 * job.minutes:g}"]


def _tests(job: Job) -> list[str] | str:
    if not (_ROOT / "pyproject.toml").is_file():
        return "the tests are in a checkout, not in an installed package"
    if find_spec("pytest") is None:
        return "pytest is not installed"
    if not job.gpu:
        return "CPU: no GPU"
    side_by_side = ["-n", "4", "--dist", "worksteal"] if find_spec("xdist") else []
    # A file of tests that cannot be imported here costs itself alone.
    alone = "--continue-on-collection-errors"
    return ["-m", "pytest", "-q", "-m", "gpu", alone, *side_by_side, str(_ROOT / "tests")]


def _training(job: Job) -> list[str]:
    models = ["resnet18", "resnet50"] if job.gpu else ["resnet18"]
    recipe = ["barlow_vit_s16"] if find_spec("timm") else []
    return job.turns("training", "--parts", "training", "--models", *models, *recipe)


def _memory(job: Job) -> list[str]:
    count, sizes = ("200", ["64", "256"]) if job.gpu else ("10", ["4"])
    return job.bench("memory", "--parts", "memory", "--batches", count, "--batch-sizes", *sizes)


def _steps(job: Job, part: str, *words: str) -> list[str] | str:
    """Training by the trainer, which this package does not import."""
    if find_spec("trainers") is None:
        return "the package trainers is not installed"
    return job.bench(part, "--steps", "20" if job.gpu else "2", *words, program="trainers")


def _methods(job: Job) -> list[str] | str:
    return _steps(job, "methods", "--backbones", "resnet50" if job.gpu else "resnet18")


def _guides(job: Job) -> list[str] | str:
    guides = ["--guides", "none", "contrastive_crop", "online_crop"]
    networks = ["resnet18", "resnet50"] if job.gpu else ["resnet18"]
    return _steps(job, "guides", "--methods", "moco", *guides, "--backbones", *networks)


def _unequal(rows: list[dict[str, str]]) -> str:
    """Pixels should be equal, but between decoders, and where a batch is divided between them."""
    names = [row["name"] for row in rows if float(row["value"])]
    return "; ".join(name for name in names if "0.65" not in name and "unlike" not in name)


PARTS = {
    "doctor": Part("what the machine can do", 0.5, _doctor),
    "tests": Part("the tests that need a GPU", 1.6, _tests),
    "pixels": Part(
        "whether pixels depend on batch size, hardware decoder or other work on the GPU", 0.6,
        lambda job: job.bench("pixels", "--parts", "pixels", "decoder"), wrong=_unequal,
    ),
    "loaders": Part(
        "speed of loading, beside limits and peers", 2.7,
        lambda job: job.turns("loaders", "--parts", "loaders"), timed=True,
    ),
    "training": Part("what loading costs a training in mixed precision", 1.4, _training, timed=True),
    "memory": Part("memory of the loader", 0.7, _memory),
    "methods": Part("every method trains, and no step waits for the GPU", 1.4, _methods, timed=True),
    "guides": Part("training with a guide", 1.1, _guides, timed=True),
}  # fmt: skip
"""By name, in the order in which they run."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("out", type=Path, help=f"folder for {PAGE}, a CSV file and a log per part")
    add("images", nargs="?", help="folder of photographs (default: scenes are generated)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (all)")
    add("--minutes", type=float, default=10.0, help="time for all parts (10)")
    options.add_device(parser)


def run(args: argparse.Namespace) -> Answer:
    """Runs the parts one after the other; exit code 1 if one of them fails."""
    if not args.minutes > 0:
        raise ValueError(f"--minutes is the time for all parts, above 0; got {args.minutes:g}.")
    end, device = time.monotonic() + 60 * args.minutes, options.device(args)
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job(args.images or _scenes(args.out, device), args.out, device, args.minutes)
    asked = {name: PARTS[name].command(job) for name in PARTS if name in args.parts}
    found = [Found(name, PARTS[name].shows) for name in asked]
    for number, one in enumerate(found):
        words = asked[one.name]
        if isinstance(words, str):
            one.why = words
        else:
            waiting = [PARTS[name].share for name in list(asked)[number:] if isinstance(asked[name], list)]
            left = end - time.monotonic()
            _carry_out(one, words, job, left * waiting[0] / sum(waiting), left)
        _write(job, found[: number + 1])  # after every part: the next may take the machine with it
        print(f"{one.state:8} {one.name:9} {one.seconds:5.0f} s  {one.why}".rstrip(), flush=True)
    failed = [one.name for one in found if one.state == "failed"]
    text = f"{args.out / PAGE}" + f": failed: {', '.join(failed)}" * bool(failed)
    parts = [{key: value for key, value in asdict(one).items() if key != "text"} for one in found]
    return Answer({"page": args.out / PAGE, "device": device, "parts": parts}, text, int(bool(failed)))


def _scenes(out: Path, device: str) -> str:
    """The folder of generated images; an earlier report's are kept."""
    from .scenes import make_scenes

    count, size = (512, (375, 500)) if device == "gpu" else (24, (72, 96))
    folder = out / f"{count}_scenes"
    if not (folder / "instances.json").is_file():  # which is written last
        make_scenes(folder, count, size)
    return str(folder / "images")


def _carry_out(one: Found, words: Sequence[str], job: Job, seconds: float, left: float) -> None:
    """Runs a part that should take `seconds`; half as much again, or what is `left`, is its limit."""
    if seconds < _LEAST:
        one.why = "no time left"
        return
    limit, began, log = min(1.5 * seconds, left), time.monotonic(), job.out / f"{one.name}.log"
    timed = ["--minutes", f"{0.75 * seconds / 60:.3f}"] if PARTS[one.name].timed else []
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    job.file(one.name).unlink(missing_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *words, *timed], env=variables,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            one.why = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            one.why = f"took longer than {limit:.0f} s and was ended"
        finally:  # also its workers, and if this process is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # what hangs in the driver cannot be killed
                process.wait(10)
    one.seconds = time.monotonic() - began
    lines = log.read_text(errors="replace").splitlines()
    if job.file(one.name).is_file():
        with job.file(one.name).open(newline="") as file:
            one.rows = list(csv.DictReader(file))
    one.why = one.why or PARTS[one.name].wrong(one.rows)
    one.state = "failed" if one.why else "done"
    shown = lines[-_TAIL:] if one.state == "failed" or not one.rows else []
    one.text = "\n".join(shown or ["The log is empty."] * (not one.rows))
    one.told = [line for line in lines if line.startswith(_TOLD) and line not in shown]


def _write(job: Job, found: Sequence[Found]) -> None:
    from .page import render

    title = f"{'GPU' if job.gpu else 'CPU: no GPU'}, {time.strftime('%Y-%m-%d %H:%M')}"
    page = render(
        Path(__file__).with_suffix(".html"), title=title, machine=machine(job.device), job=job, parts=found
    )
    (job.out / PAGE).write_text(page, encoding="utf-8")
