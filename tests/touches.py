"""A call that is killed at its n-th touch of the disk, for every n until one call completes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# A touch is before a file is synced, renamed, linked or removed, or a folder is made, and after one is opened
# for writing.
_CHILDREN = """
import builtins, io, os, pathlib, signal, sys

left = [0]

def touch():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def before(call):
    def wrapped(*args, **keys):
        touch()
        return call(*args, **keys)
    return wrapped

def after(call):
    def wrapped(file, mode="r", *args, **keys):
        opened = call(file, mode, *args, **keys)
        if "w" in mode:
            touch()
        return opened
    return wrapped

for n in range(1, 400):
    out = f"{sys.argv[3]}/{n}"
    exec(sys.argv[1])
    child = os.fork()
    if child == 0:
        left[0] = n
        for name in ("fsync", "replace", "mkdir", "link", "unlink"):
            setattr(os, name, before(getattr(os, name)))
        for module in (builtins, io):
            module.open = after(module.open)
        accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps the functions that it found
        if accessor is not None:
            accessor.open = staticmethod(io.open)
            accessor.replace, accessor.mkdir = staticmethod(os.replace), staticmethod(os.mkdir)
        exec(sys.argv[2])
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(n, int(killed), flush=True)
    if not killed:
        break
"""


def killed_at_every_touch(before: str, call: str, folder: Path) -> list[Path]:
    """The folders `out` in `folder` that killed children of `call` leave; `before` is run before each."""
    command = [sys.executable, "-c", _CHILDREN, before, call, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [folder / line.split()[0] for line in done.stdout.split("\n") if line.endswith(" 1")]
