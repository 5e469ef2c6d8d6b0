"""Builds docker/Dockerfile with a real engine and runs it as another user, read-only, without a network.

    python tests/docker/image.py [--build-arg NAME=VALUE ...]
    sudo python tests/docker/image.py --engine /var/tmp/engine --base-archive base.tar

Tried in the image: the health check, the command, `torch.compile`, steps of pretraining, a stop and a resume,
and a part of the fast tests. Needs 40 GB of disk.

`--engine DIR` starts an engine with its files in DIR where none runs (Debian's docker.io, as root).
`--base-archive FILE` stands for the base image where none can be pulled: a root file system with Python, its
headers (for `torch.compile`) and the settings of apt and pip that the network needs, for instance

    debootstrap --variant=minbase --include=python3,python3-venv,python3-dev,ca-certificates bookworm root
    tar -C root -c . > base.tar
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE, TESTED = "dali-views:trial", "dali-views:trial-tests"
USER = "54321:54321"  # a user without a name
GB = 1e9
FOR_TESTS = ["pytest", "moto[s3,server]", "matplotlib"]
# What a broken library or a read-only folder would stop: from index to batch, and the doctor.
TESTS = ["test_plan.py", "test_order.py", "test_index.py", "test_loader.py"]
COMPILED = "import torch; f = torch.compile(lambda x: x.sin() + 1); assert f(torch.zeros(9)).sum() == 9"
SCENES = """
from pathlib import Path
from dali_views.tools.scenes import make_scenes
make_scenes(Path("scenes"), 16, size=48)
"""
# Two steps an epoch; stopped by a signal once there is a checkpoint, then resumed.
PRETRAIN = """
set -e
train="python -W ignore -m trainers pretrain configs/demo.yaml run.out=runs/trial run.epochs=3 run.device=cpu
    data.path=scenes/images data.instances=scenes/instances.json views.size=32 localise.size=32 guide.size=32
    optim.batch=6 guide.warmup=1 guide.interval=1 run.evaluate_every=1"
$train & trainer=$!
while [ ! -e runs/trial/last.pt ]; do kill -0 $trainer; sleep 1; done
kill -TERM $trainer; wait $trainer || echo "stopped with exit code $?"
$train --resume
test -e runs/trial/report.html
"""


@dataclass
class Report:
    """What was done, with seconds and outcome; printed as it happens, and once more as a table at the end."""

    rows: list[tuple[str, float, str]] = field(default_factory=list)

    def step(self, name: str, command: Sequence[str | Path], **options: object) -> bool:
        """Run a command; whether it exits with 0."""
        print(f"$ {shlex.join(map(str, command))}", flush=True)
        began = time.monotonic()
        done = subprocess.run(list(map(str, command)), check=False, **options)  # type: ignore[call-overload]
        self.rows.append(("FAILED" if done.returncode else "ok", time.monotonic() - began, name))
        print("== {} after {:.0f} s: {}".format(*self.rows[-1]), flush=True)
        return bool(done.returncode == 0)

    def end(self) -> int:
        """Print the table; exit code 1 if a step has failed or none was done."""
        print("\n".join(["", *(f"{outcome:8}{took:6.0f} s  {name}" for outcome, took, name in self.rows)]))
        return int(not self.rows or any(outcome != "ok" for outcome, _, _ in self.rows))


@contextlib.contextmanager
def engine(folder: Path | None) -> Iterator[None]:
    """The engine that runs here, or one with all its files in `folder`, which is stopped at the end.

    Raises:
        SystemExit: there is none, or it does not start.
    """
    if folder is None:
        if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
            raise SystemExit(
                "No Docker engine answers; start one, or let this script do it with --engine DIR."
            )
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["DOCKER_HOST"] = f"unix://{folder.resolve()}/sock"
    places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
    command = ["dockerd", "-H", os.environ["DOCKER_HOST"], "--bridge=none", "--iptables=false"]
    command += ["--ip-forward=false", *(f"--{name}={folder.resolve() / at}" for name, at in places.items())]
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(60):
            if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(1)
        else:
            raise SystemExit(f"The engine does not answer; its log is {folder / 'log'}.")
        yield
    finally:
        daemon.terminate()
        daemon.wait()


def base_of(dockerfile: str) -> str:
    """Name of the base image, with the default of its argument."""
    defaults = dict(re.findall(r"^ARG (\w+)=\"?([^\"\n]*)", dockerfile, re.MULTILINE))
    (name,) = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    return re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], name)


def build(report: Report, arguments: Sequence[str], archive: Path | None) -> bool:
    """The image as users build it, and one on top of it with what the tests import."""
    text = (REPOSITORY / "docker/Dockerfile").read_text(encoding="utf-8")
    if archive is not None:
        if not report.step("import of the base image", ["docker", "import", archive, base_of(text)]):
            return False
        text = re.sub(r"^# syntax=.*\n", "", text)  # it would pull a frontend
    os.environ["DOCKER_BUILDKIT"] = "1"
    words = [word for argument in arguments for word in ("--build-arg", argument)]
    command = ["docker", "build", "--network", "host", *words, "--tag", IMAGE, "--file", "-", REPOSITORY]
    if not report.step("build", command, input=text, text=True):
        return False
    told = subprocess.run(
        ["docker", "image", "inspect", "-f", "{{.Size}}", IMAGE], capture_output=True, check=True
    )
    print(f"The image has {int(told.stdout) / GB:.1f} GB.")
    pins = "--constraint /app/docker/constraints.txt"
    tested = f"FROM {IMAGE}\nUSER 0:0\nRUN pip install -q {pins} {shlex.join(FOR_TESTS)}\nUSER 1000:1000\n"
    command = ["docker", "build", "--network", "host", "--tag", TESTED, "-"]
    return report.step("what the tests need", command, input=tested, text=True)


def inside(work: Path, *command: str, image: str = IMAGE) -> list[str]:
    """A command in a container as docs/docker.md starts one; only /workspace and /tmp can be written."""
    words = ["docker", "run", "--rm", "--init", "--network", "none", "--read-only", "--tmpfs", "/tmp:exec"]
    words += ["--user", USER, "--shm-size", "1g", "--volume", f"{work}:/workspace"]
    return [*words, "--volume", f"{REPOSITORY / 'tests'}:/app/tests:ro", image, *command]


def examine(report: Report, work: Path) -> None:
    """What the image promises."""
    report.step("dali-views doctor", inside(work, "dali-views", "doctor", "--quick"))
    report.step("the image's command", inside(work))
    report.step("torch.compile", inside(work, "python", "-c", COMPILED))
    report.step("scenes", inside(work, "python", "-c", SCENES))
    report.step("pretraining, a stop and a resume", inside(work, "sh", "-c", PRETRAIN))
    pytest = ["python", "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    tests = [f"/app/tests/{name}" for name in TESTS]
    report.step("fast tests", inside(work, *pytest, "-c", "/app/pyproject.toml", *tests, image=TESTED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--engine", type=Path, metavar="DIR", help="start an engine with its files in this folder"
    )
    parser.add_argument(
        "--base-archive", type=Path, metavar="FILE", help="root file system for the base image"
    )
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    report = Report()
    with engine(args.engine), tempfile.TemporaryDirectory() as work:
        os.chown(work, *map(int, USER.split(":")))
        if build(report, args.build_arg, args.base_archive):
            examine(report, Path(work))
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
