"""Object stores (s3://, gs://, http://): their URLs, listings and objects, or parts of objects.

obstore repeats what may pass (5xx, 429, 408, a connection that breaks or is silent). What it lacks is here: a
listing resumes where its body broke off, an object must have the version that was indexed, and errors say
whether one object is bad or the whole store is away.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ..system.files import PathLike
from .source import GONE, SourceGoneError, Window, needs

_URL = re.compile(r"(s3|gs|https?):/{1,2}(?=[^/])")  # `pathlib` makes one slash of two
_SETTINGS = ("AWS_", "GOOGLE_", "DALI_VIEWS_RETRY_SECONDS")  # environment that configures a store
_REQUESTS = 128  # of a process at a time: a store answers each after tens of milliseconds
_SILENCE = 10.0  # seconds without a byte, or without a connection, after which obstore tries again
_REQUEST = 600.0  # seconds that a slow request may take
_PAGE = 1000  # objects of a listing that come at once, as S3 sends them
_LISTINGS = 3  # attempts without progress
_SINGLY = 1000  # so many objects are looked up one by one; for more, the folder above them is listed
_WALK = 4 << 20  # bytes of a request while the headers of a tar shard are read
ABSENT = (-1, -1)

T = TypeVar("T")


def is_remote(path: PathLike) -> bool:
    """Whether a path is the URL of an object store or a web server."""
    return _URL.match(os.fspath(path)) is not None


def as_url(path: PathLike) -> str:
    """The URL with two slashes after its scheme, and without one at its end."""
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
    """The content of a file or an object; for errors see `Bucket`."""
    if is_remote(path):
        bucket, key = bucket_of(path)
        return bucket.read(key)
    return Path(path).read_bytes()


class Entry(NamedTuple):
    """An object in a listing."""

    name: str
    size: int  # bytes
    version: int  # 63 bits of a hash of its ETag, else of its modification time; 0 if the store has neither


# Answers that no patience changes.
_DENIED = re.compile(r"code: (?!408|429)[34]|redirect|169\.254\.169\.254|metadata\.google")


def _settings(url: str) -> str:
    if url.startswith("gs:"):
        return "GOOGLE_APPLICATION_CREDENTIALS (a public bucket: GOOGLE_SKIP_SIGNATURE=true)"
    return "AWS_REGION"


class Bucket:
    """One bucket or server. All methods raise:

    FileNotFoundError: The object does not exist.
    SourceGoneError: The bucket does not exist, denies access, or did not answer until obstore gave up. Until
        a request succeeds, one failure is enough then, so that many readers do not wait in turn.
    OSError: The object is not as it was when it was indexed, or its name cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        told = os.environ.get("DALI_VIEWS_RETRY_SECONDS", "60")
        if not re.fullmatch(r"\d{1,6}(\.\d*)?", told):
            raise ValueError(
                f"DALI_VIEWS_RETRY_SECONDS={told!r} is not a number of seconds; fix or unset it."
            )
        self._seconds = float(told)
        self._patient, self._impatient = (_open(url, self._seconds, tries) for tries in (10_000, 0))
        self._gone = False
        self._answered = False

    def entries(self, prefix: str = "") -> list[Entry]:
        """All objects below a folder ("" for the whole bucket), named relative to it and sorted by name.

        A ValueError if an object has a name that cannot be used ("a//b", "..", control characters).
        """
        if self.url.startswith("http"):
            raise SourceGoneError(f"{self.url} is a web server, which cannot be listed; name its files.")
        folder = prefix.strip("/")
        start = len(folder) + bool(folder)

        def every(store: Any) -> list[Entry]:
            found: list[Entry] = []
            last, failures = None, 0
            while True:
                before = last
                try:
                    for chunk in store.list(folder or None, offset=last, chunk_size=_PAGE):
                        found += [Entry(meta["path"][start:], meta["size"], _version(meta)) for meta in chunk]
                        last = chunk[-1]["path"] if chunk else last
                    return sorted(found)
                except Exception as error:  # obstore does not repeat a page whose body broke off
                    failures = failures + 1 if last == before else 1
                    if failures == _LISTINGS or "list response body" not in str(error):
                        raise

        try:
            return self._ask(every)
        except GONE:
            raise
        except OSError as error:
            raise ValueError(f"{self.url}/{folder} cannot be listed: {error}; rename that object.") from error

    def glob(self, pattern: str) -> list[Entry]:
        """The objects whose whole keys match; a wildcard matches no slash. Named by their keys, sorted."""
        folder = re.split(r"[^/]*[*?[]", pattern)[0]
        found = [one._replace(name=folder + one.name) for one in self.entries(folder)]
        # Where slashes are equally many, each of the name matches one of the pattern.
        same = [one for one in found if one.name.count("/") == pattern.count("/")]
        return [one for one in same if fnmatch.fnmatchcase(one.name, pattern)]

    def stat(self, key: str) -> Entry:
        """An object by its key."""
        try:
            meta = self._ask(lambda store: store.head(key), key)
        except FileNotFoundError:
            self.read(key, 0, 1)  # only this answer has a body, which says whether the bucket is missing
            raise
        return Entry(key, meta["size"], _version(meta))

    def read(self, key: str, start: int = 0, length: int | None = None, version: int = 0) -> bytes:
        """`length` bytes of an object (None: all) from `start` on, fewer where it ends before.

        The object must have this version, unless it is 0.
        """
        if length == 0:
            return b""
        options = {} if length is None else {"range": (start, start + length)}

        def get(store: Any) -> bytes | None:
            answer = store.get(key, options=options)
            return bytes(answer.bytes()) if version in (0, _version(answer.meta)) else None

        found = self._ask(get, key)
        if found is None:
            raise OSError("it has changed since it was indexed; index the images again")
        return found

    def read_parts(self, parts: Iterable[tuple[str, int, int | None, int]]) -> list[bytes]:
        """Many parts at a time, in order, each the arguments of `read`; a failure cancels the rest."""
        return list(_threads().map(lambda part: self.read(*part), parts))

    def _ask(self, ask: Callable[[Any], T], key: str = "") -> T:
        try:
            answer = self._first(ask) if not (self._answered or self._gone) else None
            if answer is None:
                answer = ask(self._impatient if self._gone else self._patient)
        except Exception as error:  # the classes of obstore have no useful base
            meant = self._meaning(error, key)
            self._gone = isinstance(meant, SourceGoneError)
            raise meant from None
        self._answered, self._gone = True, False
        return answer

    def _first(self, ask: Callable[[Any], T]) -> T | None:
        """The answer to the first request; None if it is worth waiting for.

        Without credentials obstore asks Google's metadata server for some, as patiently as for an object.
        """
        try:
            return ask(self._impatient)
        except Exception as error:
            if _DENIED.search(str(error)):
                raise
        return None

    def _meaning(self, error: Exception, key: str) -> OSError:
        """What an error of obstore means to the reader of an object."""
        words = str(error).strip()
        cause = re.split(r": <|\n", words)[0].rpartition(" - ")[2].rpartition("status code: ")[2].rstrip(":")
        if "NoSuchBucket" in words:
            return SourceGoneError(f"There is no bucket {self.url}; check its name.")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}/{key}")
        if type(error).__name__ in ("InvalidPathError", "ValueError"):
            return OSError(f"its name cannot be used ({cause})")
        if "416 Range" in cause:
            return OSError("it is shorter than it was when it was indexed")
        if _DENIED.search(words):
            told = f"may not be read ({cause}); check its name, the credentials and {_settings(self.url)}."
        else:
            told = f"did not answer for {self._seconds:g} s ({cause}); check the network and the endpoint."
        return SourceGoneError(f"{self.url} {told}")


def bucket_of(url: PathLike) -> tuple[Bucket, str]:
    """The bucket of a URL, one per process, and the key in it.

    A SourceGoneError without credentials or in a process that was forked from one that uses obstore; a
    ValueError if obstore is not installed or the settings are wrong.
    """
    global _process
    scheme, _, rest = as_url(url).partition("://")
    name, _, key = rest.partition("/")
    _process = _process or os.getpid()
    if _process != os.getpid():
        # The threads of obstore stay with the parent; a request of the child would never return.
        words = "because this process was forked from one that reads object stores; spawn it instead."
        raise SourceGoneError(f"{scheme}://{name} cannot be read, {words}")
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS)))
    with _OPENING:
        bucket = _opened(f"{scheme}://{name}", settings)
    return bucket, unquote(key) if scheme.startswith("http") else key


def keys_below(root: str, names: Sequence[str]) -> tuple[Bucket, list[str]]:
    """The bucket of a URL, and the keys of objects that are named relative to it, as `below` names them."""
    bucket, folder = bucket_of(root)
    quoted = root.startswith("http")
    return bucket, [os.path.join(folder, unquote(name) if quoted else name) for name in names]


def object_stamps(root: str, names: Sequence[str]) -> list[tuple[int, int]]:
    """(bytes, version) of objects below a URL, (-1, -1) of those that do not exist; raises as `Bucket`."""
    bucket, keys = keys_below(root, names)
    if len(names) > _SINGLY and not root.startswith("http"):  # a web server cannot list
        there = {name: stamp for name, *stamp in bucket.entries(bucket_of(root)[1])}
        return [(size, version) for size, version in (there.get(name, ABSENT) for name in names)]

    def look(key: str) -> tuple[int, int]:
        try:
            return bucket.stat(key)[1:]
        except GONE:
            raise
        except OSError:
            return ABSENT

    return list(_threads().map(look, keys))


_OPENING = threading.Lock()
_process: int | None = None


@lru_cache(64)
def _opened(url: str, settings: tuple[tuple[str, str], ...]) -> Bucket:
    return Bucket(url)


@lru_cache(1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, "dali_views fetch")


def _version(meta: Mapping[str, Any]) -> int:
    # A weak ETag means the same content; a proxy may add or remove the mark.
    words = (meta.get("e_tag") or "").removeprefix("W/").strip('"') or str(meta.get("last_modified") or "")
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1 if words else 0


def open_object(
    url: PathLike, stamp: tuple[int, int] | None = None, block: int = _WALK
) -> tuple[io.BufferedReader, tuple[int, int]]:
    """An object as a file that can be sought in, `block` bytes a request, and its (bytes, version).

    Without a stamp from a listing, the store is queried. Errors, also of reading, are those of `Bucket`.
    """
    bucket, key = bucket_of(url)
    size, version = stamp or bucket.stat(key)[1:]

    def read_at(buffer: memoryview, at: int) -> int:
        found = bucket.read(key, at, len(buffer), version)
        if len(found) < len(buffer):
            raise OSError("it is shorter than it was when it was listed")
        buffer[:] = found
        return len(found)

    return io.BufferedReader(Window(read_at, 0, size), block), (size, version)


@dataclass(frozen=True, eq=False)
class ObjectSource:
    """Whole objects, or ranges of objects (tar shards), as a `Source`. They must be as they were scanned."""

    root: str  # URL that the names start from
    names: NDArray[np.uint8] | Sequence[str]  # (N, L) of the images, or of the S objects that hold them
    stamps: NDArray[np.int64] | None  # (S, 2) bytes and version of those; None for whole objects
    places: NDArray[np.int64]  # (N, 3) object, offset and bytes; of whole objects 0, version and bytes

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; FileNotFoundError for an object that is gone, OSError for one that has changed."""
        places = self.places[rows].tolist()
        if self.stamps is None:
            names = [os.fsdecode(self.names[row].tobytes().rstrip(b"\0")) for row in rows.tolist()]
            what = [(0, None, version) for _, version, _ in places]
        else:
            names = [str(self.names[number]) for number, _, _ in places]
            what = [(offset, size, int(self.stamps[number, 1])) for number, offset, size in places]
        bucket, keys = keys_below(self.root, names)
        found = bucket.read_parts([(key, *part) for key, part in zip(keys, what, strict=True)])
        if [len(one) for one in found] != [size for _, _, size in places]:
            raise OSError("its size has changed since it was indexed; index the images again")
        return found


def _open(url: str, seconds: float, retries: int) -> Any:
    """obstore's store of a bucket ("s3://bucket", "gs://bucket") or a server ("https://host")."""
    with needs("obstore"):
        from obstore.store import from_url
    silence = timedelta(seconds=min(_SILENCE, max(seconds / 4, 0.5)))  # so that there is a second attempt
    timeouts = {"connect_timeout": silence, "read_timeout": silence, "timeout": timedelta(seconds=_REQUEST)}
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5)}
    retry = {"max_retries": retries, "retry_timeout": timedelta(seconds=seconds), "backoff": backoff}
    more = _credentials(url) if url.startswith("s3:") else {}
    try:
        return from_url(url, client_options={"allow_http": True, **timeouts}, retry_config=retry, **more)
    except Exception as error:  # obstore's own about a setting, a file of credentials, a name
        words = str(error).strip().partition("\n")[0]
        raise ValueError(f"{url} cannot be opened ({words}); check the settings.") from error


def _credentials(url: str) -> dict[str, Any]:
    """boto3's, which knows profiles and single sign-on, where the environment has none."""
    anonymous = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "on", "yes")
    if anonymous or os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        provider = Boto3CredentialProvider()
        provider()
    except ImportError:
        return {}
    except Exception as error:  # botocore's own about a missing profile or an expired sign-on
        words = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or AWS_SKIP_SIGNATURE=true"
        raise SourceGoneError(f"No credentials for {url} ({error}); {words}.") from error
    return {"credential_provider": provider}
