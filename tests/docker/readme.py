"""Tries the README in a clean Debian with python3, python3-venv and make, as a user who is not root.

    sudo python tests/docker/readme.py --root /var/tmp/readme --cache /var/tmp/pip [--tests "-k plan"]

`make demo`, `make test` and then each command of the README that calls the environment's programs, in its
order, on small images; recipes of days are shortened as tests/test_readme_commands.py does. Tried is what git
holds at HEAD. Needs root, debootstrap, a network and 20 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rootfs import Report, Root, host_environment, make

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKOUT = "/home/user/dali_views"
USER = 1000
ENV = {"HOME": "/home/user", "USER": "user", "LANG": "C.UTF-8"}
# Makes the images that the README's commands speak of, and prints the commands, those of days shortened.
PREPARE = """
import json, shlex, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_readme_commands import commands, lay_out, shortened
lay_out(Path())
Path("commands.json").write_text(json.dumps([shlex.join(shortened(line)) for line in commands()]))
"""


def check_out(root: Root) -> None:
    """HEAD's files, owned by the user."""
    folder = root.folder / CHECKOUT.lstrip("/")
    folder.mkdir(parents=True)
    (folder.parent / ".cache/pip").mkdir(parents=True)  # else root would make it, to bind pip's cache there
    packed = subprocess.run(["git", "-C", REPOSITORY, "archive", "HEAD"], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    for path in [folder.parent, *folder.parent.rglob("*")]:
        os.chown(path, USER, USER, follow_symlinks=False)


def as_user(root: Root, report: Report, command: str, installs: bool = False) -> bool:
    """One command of the user in the checkout; whether it went well."""
    env = {**ENV, **(host_environment() if installs else {})}
    code, took = root.run(
        command, env, f"{USER}:{USER}", cwd=CHECKOUT, cache_at="/home/user/.cache/pip" if installs else None
    )
    report.step(command if len(command) < 150 else command[:147] + "...", code == 0, took)
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="new folder for the file system")
    parser.add_argument("--cache", type=Path, required=True, help="folder of pip's cache, kept between runs")
    parser.add_argument("--tests", default="", metavar="OPTIONS", help="for pytest, to run a part: '-k plan'")
    args = parser.parse_args()
    report = Report()
    root = make(args.root, args.cache, report)
    code, took = root.run(
        "apt-get -q update && apt-get -q install --yes --no-install-recommends python3 python3-venv make"
        f" && useradd --uid {USER} --create-home user"
    )
    report.step("python3, python3-venv, make and a user", code == 0, took)
    check_out(root)
    for path in (args.cache, *args.cache.rglob("*")):
        os.chown(path, USER, USER)  # pip takes no cache of another user
    if as_user(root, report, "make demo", installs=True):
        print(f"The file system has {root.size() / 1e9:.2f} GB.")
        tests = f"PYTEST_ADDOPTS={args.tests!r} make test" if args.tests else "make test"
        as_user(root, report, tests, installs=True)
        (root.folder / CHECKOUT.lstrip("/") / "prepare.py").write_text(PREPARE, encoding="utf-8")
        if as_user(root, report, ".venv/bin/python prepare.py"):
            told = root.folder / CHECKOUT.lstrip("/") / "commands.json"
            for command in json.loads(told.read_text(encoding="utf-8")):
                as_user(root, report, command)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
