"""Which code reads the images of an index that is stored with where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from .extras import needs
from .objects import ObjectSource, RemoteRangeSource
from .ranges import RangeSource
from .remote import is_remote
from .source import Source

if TYPE_CHECKING:
    from .index import SampleIndex

Holder: TypeAlias = Literal["", "ranges", "groups", "objects"]
"""What holds the images of an index, and so what its `places` (N, 3) say:

- "": local files of their own, arrays, or a source of one's own; there are no places;
- "ranges": pieces of container files, as tar shards are: file, offset, bytes;
- "groups": values of a column in Parquet or compressed Arrow files: file, group in it, row in that;
- "objects": whole objects in a store: 0, version, bytes.

The root of ranges and objects may be a URL.
"""

PLACED: Mapping[str, Mapping[str, bool]] = {
    "": {"files": False, "places": False, "column": False},
    "ranges": {"paths": True, "files": True, "places": True, "column": False},
    "groups": {"paths": True, "files": True, "places": True, "column": True},
    "objects": {"paths": True, "files": False, "places": True, "column": False},
}
"""What an index with this holder stores."""


def open_source(index: SampleIndex) -> Source:
    """What reads the images of an index that has a holder; no file is opened yet.

    Raises:
        ValueError: The package that reads them is not installed.
    """
    assert index.places is not None
    if index.holder == "objects":
        assert index.paths is not None
        return ObjectSource(index.root, index.paths, index.places)
    assert index.file_stamps is not None
    if index.holder == "groups":
        with needs("pyarrow"):
            from .group_source import GroupSource

        return GroupSource(index.root, index.files, index.file_stamps, index.places, index.column)
    if is_remote(index.root):
        return RemoteRangeSource(index.root, index.files, index.file_stamps, index.places)
    return RangeSource(index.root, index.files, index.file_stamps, index.places)
