"""A clean Debian in a folder, and commands in it: what Docker does, by debootstrap, unshare and chroot.

Needs root and a network. How this machine reaches its packages is taken over: the sources and settings of
apt, the settings of pip, its certificates.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["PATH", "Report", "Root", "host_environment", "make"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_CERTIFICATES_INSIDE = "/etc/host-certificates.crt"  # where no package writes
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass
class Report:
    """What was done, with seconds and outcome; printed as it happens, and once more as a table at the end."""

    rows: list[tuple[bool, float, str]] = field(default_factory=list)

    def step(self, name: str, ok: bool, seconds: float) -> None:
        self.rows.append((ok, seconds, name))
        print(f"== {'ok' if ok else 'FAILED'} after {seconds:.0f} s: {name}", flush=True)

    def end(self) -> int:
        """Prints the table; exit code 1 if a step has failed."""
        failed = sum(not ok for ok, _, _ in self.rows)
        print("\nSummary")
        for ok, seconds, name in self.rows:
            print(f"{'ok' if ok else 'FAILED':8}{seconds:6.0f} s  {name}")
        print(f"{len(self.rows)} steps, {failed} failed")
        return int(failed > 0)


@dataclass
class Root:
    """A root file system below `folder`; `cache` is seen in it as pip's cache of root."""

    folder: Path
    cache: Path
    binds: dict[str, Path] = field(default_factory=dict)
    """Folders of this machine, seen inside under the given paths, read-only."""

    def run(
        self,
        command: str | Sequence[str],
        env: Mapping[str, str] | None = None,
        user: str = "0:0",
        cwd: str = "/",
        cache_at: str | None = None,
        writable: Mapping[str, Path] | None = None,
    ) -> tuple[int, float]:
        """Runs a command, or a line of shell, as a container would; tells exit code and seconds.

        Args:
            env: all variables that it finds, but for PATH where it is not given.
            user: numbers of user and group; no user needs to have them.
            cache_at: path at which it finds the cache of pip.
            writable: makes the file system read-only but for these folders, which lie outside of it.
        """
        line = command if isinstance(command, str) else shlex.join(command)
        print(f"$ {line}", flush=True)
        began = time.monotonic()
        script = self._mounts(cache_at, writable)
        variables = {"PATH": PATH, **(env or {})}
        given = [f"{name}={value}" for name, value in variables.items()]
        words = ["chroot", f"--userspec={user}", "--groups=", str(self.folder)]
        words += ["/usr/bin/env", "-i", *given, "/bin/sh", "-c", f"cd {shlex.quote(cwd)} && {line}"]
        script += f"\nexec {shlex.join(words)}"
        unshared = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-ec", script]
        done = subprocess.run(unshared, stdin=subprocess.DEVNULL, check=False)
        return done.returncode, time.monotonic() - began

    def size(self) -> int:
        """Bytes that its files take on the disk."""
        told = subprocess.run(["du", "-sx", "--block-size=1", self.folder], capture_output=True, check=True)
        return int(told.stdout.split()[0])

    def _mounts(self, cache_at: str | None, writable: Mapping[str, Path] | None) -> str:
        """Lines of shell; the mounts are seen by the command alone and go with it."""
        root = shlex.quote(str(self.folder))
        lines = [f"mount --bind {root} {root}"]
        for inside, outside in self.binds.items():
            (self.folder / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
            lines.append(f"mount --bind -o ro {shlex.quote(str(outside))} {root}{shlex.quote(inside)}")
        if cache_at is not None:
            (self.folder / cache_at.lstrip("/")).mkdir(parents=True, exist_ok=True)
            lines.append(f"mount --bind {shlex.quote(str(self.cache))} {root}{shlex.quote(cache_at)}")
        if writable is not None:
            lines.append(f"mount -o remount,bind,ro {root}")
            for inside, outside in writable.items():
                lines.append(f"mount --bind {shlex.quote(str(outside))} {root}{shlex.quote(inside)}")
        lines += [
            f"mount -t proc proc {root}/proc",
            f"mount -t tmpfs -o mode=755 tmpfs {root}/dev",
            f"mkdir -m 1777 {root}/dev/shm",
            f"mount -t tmpfs -o size=1g,mode=1777 tmpfs {root}/dev/shm",
        ]
        for name in _DEVICES:
            lines.append(f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}")
        lines.append(f"ln -s /proc/self/fd {root}/dev/fd")
        return "\n".join(lines)


def make(folder: Path, cache: Path, report: Report) -> Root:
    """A new minimal Debian of this machine's release in `folder`, which must not exist.

    Raises:
        SystemExit: if this is not root, debootstrap is missing, the folder exists, or debootstrap fails.
    """
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise SystemExit("This needs root and debootstrap (apt-get install debootstrap).")
    if folder.exists():
        raise SystemExit(f"{folder} exists: remove it, or name another folder by --root.")
    cache.mkdir(parents=True, exist_ok=True)
    suite, mirror = _release()
    began = time.monotonic()
    command = ["debootstrap", "--variant=minbase", suite, str(folder)]
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run([*command, *mirror], stdout=subprocess.DEVNULL, check=False)
    report.step("a minimal Debian", done.returncode == 0, time.monotonic() - began)
    if done.returncode:
        raise SystemExit(report.end())
    root = Root(folder.resolve(), cache.resolve())
    _take_over_apt(root)
    _take_over_pip(root)
    return root


def host_environment() -> dict[str, str]:
    """Variables by which this machine reaches its packages; for steps that install, and no other."""
    named = re.compile(r"(PIP_(?!CERT)\w+|\w+_proxy)", re.IGNORECASE)
    taken = {name: value for name, value in os.environ.items() if named.fullmatch(name)}
    if CERTIFICATES.exists():
        taken |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), _CERTIFICATES_INSIDE)
    return taken


def _release() -> tuple[str, list[str]]:
    """Name of this machine's release of Debian, and its mirror, where apt's sources name one."""
    told = Path("/etc/os-release").read_text(encoding="utf-8")
    suite = re.search(r"^VERSION_CODENAME=(\w+)", told, re.MULTILINE)
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("debian*.sources"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    mirror = re.search(r"^(?:URIs:|deb(?: \[.*?\])?)\s+(\S+/debian)/?\s", text, re.MULTILINE)
    return (suite[1] if suite else "bookworm"), ([mirror[1]] if mirror else [])


def _take_over_apt(root: Root) -> None:
    apt = root.folder / "etc/apt"
    for name in ("sources.list", "sources.list.d"):
        source = Path("/etc/apt") / name
        if source.is_dir():
            shutil.copytree(source, apt / name, dirs_exist_ok=True)
            (apt / "sources.list").unlink(missing_ok=True)  # debootstrap's own, the same once more
        elif source.is_file():
            shutil.copy(source, apt / name)
    settings = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    kept = [line for line in settings.splitlines() if line.startswith("Acquire::")]
    (apt / "apt.conf.d/99host").write_text("\n".join(kept) + "\n", encoding="utf-8")
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc") / name, root.folder / "etc" / name)


def _take_over_pip(root: Root) -> None:
    """pip's settings as one file; folders that they name are bound, and files copied, at the same paths."""
    settings = configparser.RawConfigParser()
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "debug"], capture_output=True, text=True, check=True
    ).stdout
    settings.read(re.findall(r"^\s+(/\S+), exists: True$", listed, re.MULTILINE), encoding="utf-8")
    with (root.folder / "etc/pip.conf").open("w", encoding="utf-8") as file:
        settings.write(file)
    for section in settings.sections():
        for name, value in settings.items(section):
            for scheme, word in re.findall(r"(file://)?(/\S+)", value if name != "cert" else ""):
                # An index in files leads to archives beside it.
                path = Path(word).parent if scheme else Path(word)
                if path.is_dir():
                    root.binds[str(path)] = path
                elif path.is_file():
                    (root.folder / str(path.parent).lstrip("/")).mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, root.folder / str(path).lstrip("/"))
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, root.folder / _CERTIFICATES_INSIDE.lstrip("/"))
