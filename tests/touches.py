"""Packing that kills itself at its n-th write to the disk, for every n until one run completes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A touch is before a file is synced or renamed or a folder is made, and after a file is opened for writing.
_CHILDREN = """
import builtins, io, os, pathlib, signal, sys
from dali_views import SampleIndex
from dali_views.tools.pack import pack_shards

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

source = SampleIndex.from_folder(sys.argv[2], cache=False, progress=False)
for n in range(1, 400):
    out = f"{sys.argv[3]}/{n}"
    child = os.fork()
    if child == 0:
        left[0] = n
        for name in ("fsync", "replace", "mkdir"):
            setattr(os, name, before(getattr(os, name)))
        for module in (builtins, io):
            module.open = after(module.open)
        accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps the functions that it found
        if accessor is not None:
            accessor.open = staticmethod(io.open)
            accessor.replace, accessor.mkdir = staticmethod(os.replace), staticmethod(os.mkdir)
        exec(sys.argv[1])
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(n, int(killed), flush=True)
    if not killed:
        break
"""


def killed_at_every_touch(call: str, source: Path, folder: Path) -> list[Path]:
    """The folders that killed children of `call` leave; it packs the index `source` to `out` in `folder`."""
    command = [sys.executable, "-c", _CHILDREN, call, str(source), str(folder)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    return [folder / line.split()[0] for line in lines if line.endswith(" 1")]
