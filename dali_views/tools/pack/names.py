"""Names in packed shards: the key of each image, and the text of its label."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...data.index import SampleIndex
from ...data.listing import EXTENSIONS, number_labels
from ...data.names import unpack_names

_SHARD = re.compile(r".*?\.tar/")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def image_names(index: SampleIndex) -> list[str]:
    """The name of each image in its index; the row's number where there are none, as in arrays."""
    if index.paths is None:
        width = len(str(len(index) - 1))
        return [f"{row:0{width}d}" for row in range(len(index))]
    return [os.fsdecode(name) for name in unpack_names(index.paths)]


def shard_keys(names: Sequence[str]) -> list[str]:
    """The key of each image: its name without the ending, and a number if two would be equal.

    A key leads nowhere out of its folder, and has no dot after its last slash, where WebDataset would end it.
    A member of another shard loses the shard's name, if no two are equal then.
    """
    short = [_SHARD.sub("", name, count=1) for name in names]
    if len(set(short)) == len(names):
        names = short
    taken: set[str] = set()
    number: Counter[str] = Counter()
    keys = []
    for name in names:
        steps = _CONTROL.sub("_", name).split("/")
        *folders, last = [step for step in steps if step not in ("", ".", "..")] or ["_"]
        stem, ending = os.path.splitext(last)
        base = stem if ending.lower() in EXTENSIONS else last
        base = key = "/".join([*folders, base.replace(".", "_")])
        while key in taken:
            number[base] += 1
            key = f"{base}_{number[base]}"
        taken.add(key)
        keys.append(key)
    return keys


def label_words(labels: NDArray[np.int32], classes: Sequence[str] | None) -> dict[int, str]:
    """The text of each label in (N,) `labels` but -1, such that a reader of the shards numbers them as here.

    It is the name of the class; or, for all labels, the number if there are no `classes`, or if names would
    be numbered differently (they are not sorted, one has no image, they look like numbers) or are no text.
    """
    used = [label for label in np.unique(labels).tolist() if label >= 0]
    try:
        names = [] if classes is None else [classes[label] for label in used]
        read = [name.encode().decode().strip() for name in names]
        if names and read == names and all(names) and number_labels(names)[0] == used:
            return dict(zip(used, names, strict=True))
    except ValueError:
        pass  # no UTF-8, or names that look like numbers and are too large
    return {label: str(label) for label in used}
