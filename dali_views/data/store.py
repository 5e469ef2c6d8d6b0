"""Which code reads the images of an index that is stored with where they lie."""

from __future__ import annotations

from .extras import needs
from .objects import ObjectSource
from .ranges import RangeSource
from .remote import is_remote
from .scan import Scan
from .source import Source


def open_source(index: Scan) -> Source:
    """What reads the images of an index that has a holder; no file is opened yet.

    Raises:
        ValueError: The package that reads them is not installed.
    """
    assert index.places is not None
    if index.holder == "objects":
        assert index.paths is not None
        return ObjectSource(index.root, index.paths, None, index.places)
    assert index.file_stamps is not None
    if index.holder == "groups":
        with needs("pyarrow"):
            from .group_source import GroupSource

        return GroupSource(index.root, index.files, index.file_stamps, index.places, index.column)
    if is_remote(index.root):
        return ObjectSource(index.root, index.files, index.file_stamps, index.places)
    return RangeSource(index.root, index.files, index.file_stamps, index.places)
