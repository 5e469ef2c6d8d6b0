"""Which tar shards or tables are meant: by paths, lists of them, globs and brace patterns."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice, product

from ..system.files import PathLike
from .listing import EXTENSIONS
from .remote import absolute, as_url, bucket_of, content, is_remote

_MOST = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
SHARD = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2|txz)\*?$")
TABLE = re.compile(r"\.(parquet|pq|arrow|feather)\*?$")
_KINDS = {SHARD: ("shard", "*.tar"), TABLE: ("table", "*.parquet")}

_LIST_ENDINGS = (".txt", ".tsv", ".lst")


def is_list(path: PathLike) -> bool:
    """Whether the name is one of a text file; in a store, which has no folders, by its ending."""
    return os.path.isfile(path) or (is_remote(path) and os.fspath(path).lower().endswith(_LIST_ENDINGS))


def names_shards(path: PathLike, ending: re.Pattern[str] = SHARD) -> bool:
    """Whether the name is one of a tar, of several, or of a list of them, rather than of images."""
    if os.path.isdir(path):
        return False
    if ending.search(os.path.basename(path)):
        return True
    return is_list(path) and any(ending.search(line) for line in islice(_lines(path), 1))


def names_tables(path: PathLike) -> bool:
    """Whether the name is one of a table, of several, of a list of them, or of a folder with nothing else."""
    if not os.path.isdir(path):
        return names_shards(path, TABLE)
    with os.scandir(path) as entries:
        # What writers of tables leave beside them begins so: _SUCCESS, .part-0.parquet.crc.
        names = [entry.name for entry in entries if entry.name[0] not in "._"]
    others = any(os.path.splitext(name)[1].lower() in (*EXTENSIONS, "") for name in names)
    return not others and any(map(TABLE.search, names))


def list_shards(pattern: PathLike | Sequence[PathLike], ending: re.Pattern[str] = SHARD) -> list[str]:
    """Absolute paths of the shards in the order given, each once; see `SampleIndex.from_shards`.

    Args:
        ending: What a shard's name ends with: `SHARD` or `TABLE`. A file of another name lists them.

    Raises:
        FileNotFoundError: No shard is there.
        IsADirectoryError: A folder is named instead of what lies in it.
        ValueError: A pattern stands for more than a million shards.
    """
    given = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    found = dict.fromkeys(absolute(path) for one in given for path in _expand(os.fspath(one), ending))
    kind, example = _KINDS[ending]
    for path in found:
        if os.path.isdir(path) and not ending.search(os.path.basename(path)):
            raise IsADirectoryError(
                f"{path!r} is a folder; name the {kind}s in it, as {os.path.join(path, example)!r}."
            )
    if not any(is_remote(path) or os.path.exists(path) for path in found):
        told = ", ".join(repr(os.fspath(one)) for one in given[:3])
        raise FileNotFoundError(
            f"There is no {kind} {told}; check the path or the pattern. A file whose name does not end as "
            f"{example!r} does is read as a list of {kind}s."
        )
    return list(found)


def _expand(pattern: str, ending: re.Pattern[str]) -> Iterator[str]:
    if is_list(pattern) and not ending.search(os.path.basename(pattern)):
        for line in _lines(pattern):
            yield from _named(line if is_remote(line) else os.path.join(os.path.dirname(pattern), line))
    else:
        yield from _named(pattern)


def _lines(path: PathLike) -> Iterator[str]:
    """Paths that a text file names."""
    with io.BytesIO(content(path)) if is_remote(path) else open(path, "rb") as file:
        for line in file:
            if (text := os.fsdecode(line).strip()) and not text.startswith("#"):
                yield text


def _named(pattern: str) -> Iterator[str]:
    """The paths that a name with braces and wildcards stands for; without wildcards they need not exist."""
    if is_remote(pattern):
        pattern = as_url(pattern)
    if os.path.exists(pattern):
        yield pattern
        return
    parts = _BRACES.split(pattern)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for each in choices:
        count *= len(each)
    if count > _MOST:
        raise ValueError(f"The pattern {pattern!r} stands for more than {_MOST} shards; check its numbers.")
    for words in product(*choices):
        path = "".join(words)
        yield from _matches(path) if glob.has_magic(path) else [path]


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    bucket, key = bucket_of(pattern)
    return [f"{bucket.url}/{one.name}" for one in bucket.glob(key)]


def _choices(inside: str) -> Sequence[str]:
    """What one pair of braces stands for: numbers from .. to, as wide as they are written, or words."""
    match = _RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",")
    first, last = int(match[1]), int(match[2])
    padded = any(len(word) > 1 and word[0] == "0" for word in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    if abs(last - first) >= _MOST:
        raise ValueError(f"The pattern {{{inside}}} stands for more than {_MOST} shards; check its numbers.")
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
