"""Tries docker/Dockerfile without Docker: its own lines in a clean Debian, then what the image promises.

    sudo python tests/docker/image.py --root /var/tmp/image --cache /var/tmp/pip [--build-arg EXTRAS=timm]

FROM is stood in for by a minimal Debian with its python3. Needs root, debootstrap, a network and 20 GB. Tried
of the result: `dali-views doctor --quick`, CMD, and a part of the tests, as the image's user and as a user
without a name, on a file system of which nothing but /workspace can be written.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import dockerfile
from rootfs import PATH, Report, Root, host_environment, make

REPOSITORY = Path(__file__).resolve().parents[2]
# The loader from index to batch, and the doctor: what a broken library or a read-only folder would stop.
TESTS = ["test_doctor.py", "test_index.py", "test_loader.py", "test_plan.py"]
GB = 1e9
_FOR_TESTS = "pytest 'moto[s3,server]' lmdb"
_COMPILED = "import torch; f = torch.compile(lambda x: x.sin() + 1); assert f(torch.zeros(9)).sum() == 9"


@dataclass
class Image:
    """State of a build: what later instructions and the container find."""

    root: Root
    arguments: dict[str, str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "0:0"
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    _declared: dict[str, str] = field(default_factory=dict)

    def carry_out(self, name: str, rest: str) -> bool:
        """One instruction; whether it went well.

        Raises:
            SystemExit: for an instruction that is not known here.
        """
        known = {**self._declared, **self.env}
        if name == "ARG":
            argument, _, default = rest.partition("=")
            self._declared[argument] = self.arguments.get(argument, default.strip('"'))
        elif name == "ENV":
            pairs = (word.split("=", 1) for word in shlex.split(rest))
            self.env |= {key: dockerfile.fill_in(value, {"PATH": PATH, **known}) for key, value in pairs}
        elif name == "WORKDIR":
            self.cwd = dockerfile.fill_in(rest, known)
            (self.root.folder / self.cwd.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            self.user = rest
        elif name == "CMD":
            self.command = json.loads(rest)
        elif name == "HEALTHCHECK":
            self.health = json.loads(dockerfile.options(rest)[1].removeprefix("CMD"))
        elif name == "COPY":
            self._copy(*dockerfile.fill_in(rest, known).split())
        elif name == "RUN":
            return self._run(rest)
        elif name == "FROM":
            print(f"FROM {dockerfile.fill_in(rest, known)}: a minimal Debian with python3 instead")
        else:
            raise SystemExit(f"{name} is not known to this script: add it, or do without it.")
        return True

    def _run(self, rest: str) -> bool:
        mounts, line = dockerfile.options(rest)
        if set(mounts) - {"mount"}:
            raise SystemExit(f"RUN with {sorted(mounts)} is not known to this script.")
        mount = dict(part.split("=", 1) for part in mounts.get("mount", "").split(",") if part)
        env = {**host_environment(), **self._declared, **self.env}
        code, _ = self.root.run(f"{{ {line}; }}", env, self.user, cwd=self.cwd, cache_at=mount.get("target"))
        return code == 0

    def _copy(self, *words: str) -> None:
        *sources, target = words
        to = self.root.folder / self.cwd.lstrip("/") / target
        for source in sources:
            files = dockerfile.context_files(REPOSITORY, source)
            if not files:
                raise SystemExit(f"COPY {source}: there is no such file that .dockerignore lets through.")
            for file in files:
                folder = (REPOSITORY / source).is_dir()
                out = to / file.relative_to(REPOSITORY / source) if folder else to / file.name
                out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, out)


def build(image: Image, report: Report) -> bool:
    """Carries out the Dockerfile up to the first step that fails."""
    text = (REPOSITORY / "docker/Dockerfile").read_text(encoding="utf-8")
    before = image.root.size()
    for name, rest in dockerfile.instructions(text):
        began = time.monotonic()
        ok = image.carry_out(name, rest)
        if name in ("RUN", "COPY"):
            size = image.root.size()
            report.step(f"{name} {rest[:70]} ({(size - before) / GB:+.2f} GB)", ok, time.monotonic() - began)
            before = size
        if not ok:
            return False
    print(f"The file system has {before / GB:.2f} GB.")
    return True


def examine(image: Image, report: Report) -> None:
    """What the image promises, to its own user and to one without a name, each with a folder of their own."""
    shutil.copytree(REPOSITORY / "tests", image.root.folder / "app/tests")
    install = f"pip install -q --target /app/pytest --constraint /app/docker/constraints.txt {_FOR_TESTS}"
    code, took = image.root.run(install, {**host_environment(), **image.env}, cache_at="/root/.cache/pip")
    report.step("what the tests need, beside the image", code == 0, took)
    tried = {
        shlex.join(image.health): image.health,
        shlex.join(image.command): image.command,
        "torch.compile": ["python", "-c", _COMPILED],
        f"tests {' '.join(TESTS)}": [
            *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/app/pyproject.toml"),
            *(f"/app/tests/{name}" for name in TESTS),
        ],
    }
    for user in (image.user, "54321:54321"):
        with tempfile.TemporaryDirectory() as work:
            os.chown(work, *map(int, user.split(":")))
            for name, command in tried.items():
                env = {**image.env, "PYTHONPATH": "/app/pytest"}
                writable = {"/workspace": Path(work)}
                code, took = image.root.run(command, env, user, image.cwd, writable=writable)
                report.step(f"{name} as {user}, only /workspace can be written", code == 0, took)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="new folder for the file system")
    parser.add_argument("--cache", type=Path, required=True, help="folder of pip's cache, kept between runs")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    report = Report()
    root = make(args.root, args.cache, report)
    code, took = root.run(
        "apt-get -q update && apt-get -q install --yes --no-install-recommends python3-dev python3-venv"
    )
    report.step("python3, in place of the base image", code == 0, took)
    image = Image(root, dict(word.split("=", 1) for word in args.build_arg))
    if build(image, report):
        examine(image, report)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
