"""Objects of a store (s3://, gs://, http://): listed, looked at, and read in parts with bounded patience."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from ..system.files import PathLike
from .remote_store import cause, changed, judged, open_store, patience
from .source import SourceGoneError

# `pathlib` makes one slash of two.
_URL = re.compile(r"(s3|gs|https?):/{1,2}(?=[^/])")
_SETTINGS = ("AWS_", "GOOGLE_", "DALI_VIEWS_RETRY_SECONDS")  # environment that shapes a store
_REQUESTS = 128  # of a process at a time: a store answers each after tens of milliseconds
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds

T = TypeVar("T")


def is_remote(path: PathLike) -> bool:
    """Whether a path is the URL of an object store or a web server."""
    return _URL.match(os.fspath(path)) is not None


def as_url(path: PathLike) -> str:
    """The URL with two slashes, of which `pathlib` leaves one, and without one at its end."""
    return _URL.sub(r"\1://", os.fspath(path), count=1).rstrip("/")


def absolute(path: PathLike) -> str:
    """A path from the root of the file system, or a URL."""
    return as_url(path) if is_remote(path) else os.path.abspath(os.fspath(path))


def below(path: str, root: str) -> str:
    """An absolute path or URL relative to the folder `root`, another path as it is; ".." leads out."""
    if is_remote(path):
        url, start = as_url(path), f"{root}/"
        return url.removeprefix(start) if url.startswith(start) else f"../{url}"
    return os.path.relpath(path, root) if os.path.isabs(path) else os.path.normpath(path)


def content(path: PathLike) -> bytes:
    """What a file or an object holds; FileNotFoundError, or see `Bucket`."""
    if not is_remote(path):
        return Path(path).read_bytes()
    bucket, key = bucket_of(path)
    return bucket.read(key)


class Entry(NamedTuple):
    """An object, as a listing tells of it."""

    name: str
    size: int
    """Bytes."""
    version: int
    """63 bits made of its ETag, else of when it was written; 0 if the store tells neither."""


class Part(NamedTuple):
    """What to read of which object."""

    key: str
    start: int | None = None
    """None: the whole object."""
    length: int | None = None
    """Bytes; None: to its end."""
    version: int | None = None
    """That the object must have, None for any."""


class Bucket:
    """One bucket or server. All methods raise alike:

    FileNotFoundError: The object is not there.
    SourceGoneError: The bucket is not there, may not be read, or did not answer for `patience()` seconds.
        Once it has been given up, one failure is enough, so that many readers do not wait in turn.
    OSError: The object is not as it was when it was indexed, or cannot be read for a reason of its own.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._bound = patience()
        self._store = open_store(url, self._bound)
        self._given_up = -float("inf")  # when, by the monotonic clock

    def entries(self, prefix: str = "") -> list[Entry]:
        """All objects below a folder ("" for the whole bucket), named relative to it and sorted by name.

        Raises:
            ValueError: An object has a name that cannot be asked for ("a//b", "..", control characters).
        """
        import obstore

        folder = prefix.strip("/")
        found: list[Entry] = []
        last: str | None = None

        def go_on() -> None:
            nonlocal last
            for chunk in obstore.list(self._store, folder or None, offset=last, chunk_size=1000):
                for meta in chunk:
                    last = str(meta["path"])
                    found.append(
                        Entry(last[len(folder) + 1 if folder else 0 :], meta["size"], _version(meta))
                    )

        try:
            self._ask(go_on, "", lambda: last)
        except SourceGoneError:
            raise
        except OSError as error:
            raise ValueError(f"{self.url}/{folder} cannot be listed: {error}; rename that object.") from error
        return sorted(found)

    def glob(self, pattern: str) -> list[Entry]:
        """The objects whose whole keys match; a wildcard stands for no slash. Named by their keys, sorted."""
        parts = pattern.split("/")
        fixed = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
        folder = "/".join(parts[:fixed])
        rest = parts[fixed:]
        return [
            one._replace(name=f"{folder}/{one.name}" if folder else one.name)
            for one in self.entries(folder)
            if len(names := one.name.split("/")) == len(rest) and all(map(fnmatch.fnmatchcase, names, rest))
        ]

    def stat(self, key: str) -> Entry:
        """An object by its key."""
        import obstore

        try:
            meta = self._ask(lambda: obstore.head(self._store, key), key)
        except FileNotFoundError:
            self.read(key, 0, 1)  # only the answer to this one tells a missing object from a missing bucket
            raise
        return Entry(key, meta["size"], _version(meta))

    def read(
        self, key: str, start: int | None = None, length: int | None = None, version: int | None = None
    ) -> bytes:
        """An object or a part of it; fewer bytes than asked for where it ends before.

        Args: See `Part`.
        """
        import obstore

        options: dict[str, Any] = {}
        if start is not None:
            options["range"] = {"offset": start} if length is None else (start, start + length)

        def get() -> Any:
            answer = obstore.get(self._store, key, options=options)  # type: ignore[arg-type]
            if version is not None and _version(answer.meta) != version:
                raise changed()
            return answer.bytes()

        if length == 0:
            return b""
        found: Any = self._ask(get, key).to_bytes()
        return found  # type: ignore[no-any-return]

    def read_parts(self, parts: Sequence[Part]) -> list[bytes]:
        """Many parts of many objects at a time, in the order asked for; the first failure ends them all."""
        if len(parts) == 1:
            return [self.read(*parts[0])]
        waiting = [_threads().submit(self.read, *part) for part in parts]
        try:
            return [one.result() for one in waiting]
        finally:
            for one in waiting:
                one.cancel()
            wait(waiting)  # what is under way ends by itself, and nothing goes on behind the caller's back

    def _ask(self, ask: Callable[[], T], key: str, progress: Callable[[], object] = lambda: None) -> T:
        """The answer, asked for again until the bound is over; it begins anew with any progress."""
        if _forked:
            raise SourceGoneError(
                f"{self.url} cannot be read, for this process was forked from one that reads object stores; "
                "spawn it instead."
            )
        from obstore.exceptions import BaseError

        began, pause, reached = time.monotonic(), _FIRST_WAIT, progress()
        while True:
            try:
                answer = ask()
            except (BaseError, FileNotFoundError, ValueError) as error:
                now = time.monotonic()
                if (meant := judged(error, self.url, key)) is not None:
                    raise meant from None
                if progress() != reached:
                    began, pause, reached = now, _FIRST_WAIT, progress()
                if now + pause > began + self._bound or began < self._given_up + self._bound:
                    self._given_up = now
                    raise SourceGoneError(
                        f"{self.url} did not answer for {self._bound:g} s ({cause(error)}); "
                        "check the network and the endpoint."
                    ) from None
                time.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _LONGEST_WAIT)
            else:
                self._given_up = -float("inf")
                return answer


def bucket_of(url: PathLike) -> tuple[Bucket, str]:
    """The bucket of a URL, one per process, and the key in it.

    Raises:
        SourceGoneError: There are no credentials for it.
        ValueError: obstore is not installed, or the settings are wrong.
    """
    scheme, _, rest = as_url(url).partition("://")
    name, _, key = rest.partition("/")
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS)))
    with _OPENING:
        bucket = _opened(f"{scheme}://{name}", settings)
    return bucket, unquote(key) if scheme.startswith("http") else key


def keys_below(root: str, names: Sequence[str]) -> tuple[Bucket, list[str]]:
    """The bucket of a URL, and the keys of objects named relative to it, as `below` names them."""
    bucket, folder = bucket_of(root)
    quoted = root.startswith("http")
    return bucket, [os.path.join(folder, unquote(name) if quoted else name) for name in names]


_OPENING = threading.Lock()
_forked = False


@lru_cache(64)
def _opened(url: str, settings: tuple[tuple[str, str], ...]) -> Bucket:
    return Bucket(url)


def _after_fork() -> None:
    """The threads of obstore stay with the parent; a request of the child would wait for them for ever."""
    global _forked
    _forked = _forked or _opened.cache_info().currsize > 0


os.register_at_fork(after_in_child=_after_fork)


@lru_cache(1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, "dali_views fetch")


def _version(meta: Mapping[str, Any]) -> int:
    # A weak ETag is of the same content; a proxy may add or take away the mark.
    told = (meta.get("e_tag") or "").removeprefix("W/").strip('"')
    if not told and meta.get("last_modified"):
        told = meta["last_modified"].isoformat()
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1 if told else 0
