"""Tries the README in a container of the base image as a plain user: `make demo`, `make test`, commands.

    python tests/docker/readme.py [--engine DIR] [--base-archive FILE] [--tests "-k plan"]

The commands run in the README's order on small images; recipes of days are shortened as
tests/test_readme_commands.py does. Tried is what git holds at HEAD. Needs a network and 20 GB; --base-archive
as for image.py, with make.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from image import REPOSITORY, Report, base_of, engine

# Makes the images that the README's commands speak of, and prints the commands, those of days shortened.
PREPARE = """
import json, shlex, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_readme_commands import commands, lay_out, shortened
lay_out(Path())
print(json.dumps([shlex.join(shortened(line)) for line in commands()]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--engine", type=Path, metavar="DIR", help="start an engine with its files in this folder"
    )
    parser.add_argument(
        "--base-archive", type=Path, metavar="FILE", help="root file system for the base image"
    )
    parser.add_argument("--tests", default="", metavar="OPTIONS", help="for pytest, to run a part: '-k plan'")
    args = parser.parse_args()
    report = Report()
    base = base_of((REPOSITORY / "docker/Dockerfile").read_text(encoding="utf-8"))
    with engine(args.engine):
        if args.base_archive is not None:
            report.step("import of the base image", ["docker", "import", args.base_archive, base])
        user = [
            "--user",
            "1000:1000",
            "--env",
            "HOME=/home/user",
            "--env",
            "USER=user",
            "--workdir",
            "/home/user",
        ]
        run = ["docker", "run", "--rm", "--detach", "--init", "--network", "host", *user, "--volume"]
        done = subprocess.run([*run, "/home/user", base, "sleep", "infinity"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        try:
            inside = ["docker", "exec", "--interactive", done.stdout.strip()]
            subprocess.run(
                [*inside[:2], "--user", "0", inside[-1], "chown", "1000:1000", "/home/user"], check=True
            )
            packed = subprocess.run(
                ["git", "-C", REPOSITORY, "archive", "HEAD"], capture_output=True, check=True
            )
            report.step("check-out", [*inside, "tar", "-x"], input=packed.stdout)
            if report.step("make demo", [*inside, "make", "demo"]):
                report.step("make test", [*inside, "env", f"PYTEST_ADDOPTS={args.tests}", "make", "test"])
                told = subprocess.run(
                    [*inside, ".venv/bin/python", "-c", PREPARE], capture_output=True, check=True
                )
                for command in json.loads(told.stdout):
                    report.step(command, [*inside, "sh", "-c", command])
        finally:
            subprocess.run(["docker", "rm", "--force", done.stdout.strip()], capture_output=True, check=False)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
