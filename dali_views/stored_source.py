"""Which code reads the images of an index that is stored with where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from .ranges import RangeSource
from .source import Source

if TYPE_CHECKING:
    from .index import SampleIndex

Holder: TypeAlias = Literal["", "ranges"]
"""What holds the images of an index, and so what its `places` (N, 3) say:

- "": local files of their own, arrays, or a source of one's own; there are no places;
- "ranges": pieces of container files, as tar shards are: file, offset, bytes.
"""

PLACED: Mapping[str, Mapping[str, bool]] = {
    "": {"files": False, "places": False},
    "ranges": {"paths": True, "files": True, "places": True},
}
"""What an index with this holder stores."""


def open_source(index: SampleIndex) -> Source:
    """What reads the images of an index that has a holder; no file is opened yet."""
    assert index.file_stamps is not None
    assert index.places is not None
    return RangeSource(index.root, index.files, index.file_stamps, index.places)
