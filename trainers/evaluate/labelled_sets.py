"""Labelled sets that an encoder is transferred to: named in a YAML file, read from torchvision's layouts."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dali_views import SampleIndex

from .. import config as cfg
from ..config import file as config_file
from ..data import from_torchvision, open_data

__all__ = ["KNOWN", "LabelledSet", "open_set", "read_sets"]

_ONE, _SEVERAL = ("top1", "mean_per_class"), ("map", "map_voc", "map_voc07")
_KEYS = ("torchvision", "root", "data", "detect", "measure")


class _Known(NamedTuple):
    """How a class of torchvision's is split, and what is reported of it."""

    train: tuple[dict[str, Any], ...]  # arguments of each part that is learnt from
    test: dict[str, Any] | None  # None: it has no split, and images are drawn
    measure: str = "top1"
    drawn: int = 0  # images of each class to learn from
    tested: int | None = None  # and most of them to test on


def _known(*train: str, measure: str = "top1") -> _Known:
    return _Known(tuple({"split": part} for part in train), {"split": "test"}, measure)


KNOWN: dict[str, _Known] = {
    "Food101": _known("train"),
    "CIFAR10": _Known(({"train": True},), {"train": False}),
    "CIFAR100": _Known(({"train": True},), {"train": False}),
    "SUN397": _Known(({},), None, drawn=50, tested=50),
    "StanfordCars": _known("train"),
    "FGVCAircraft": _known("trainval", measure="mean_per_class"),
    "DTD": _known("train", "val"),
    "OxfordIIITPet": _known("trainval", measure="mean_per_class"),
    "Caltech101": _Known(({},), None, "mean_per_class", drawn=30),
    "Flowers102": _known("train", "val", measure="mean_per_class"),
}
"""Classes of torchvision.datasets with their official splits and measures (arXiv 1805.08974, table 1). SUN397
has official splits that torchvision lacks."""


@dataclass(frozen=True)
class LabelledSet:
    """One set of a file."""

    torchvision: str | None  # a name in `KNOWN`, or
    root: str  # where the files of that are
    config: cfg.Config  # the run's, with the set's sections `data` and `detect`
    measure: str  # a name in `_ONE` or `_SEVERAL`
    several: bool  # whether images show several classes, by `detect`'s objects


def read_sets(file: str | Path, config: cfg.Config) -> dict[str, LabelledSet]:
    """The sets that a YAML file names, in its order; a ConfigError names what is wrong with it.

    A set has either `torchvision`, a name in `KNOWN`, and its `root`; or `data`, the section of a run, of
    which the held-out images are tested on, and for images that show several classes `detect`, as the command
    of that name has it. `measure` overrides what is reported.
    """
    found = {}
    for name, keys in config_file.plain(file).items():
        try:
            found[str(name)] = _set(keys, config)
        except cfg.ConfigError as error:
            raise cfg.ConfigError(f"{file}, {name}: {error}") from None
    if not found:
        raise cfg.ConfigError(f"{file} names no set; write NAME: {{torchvision: CLASS, root: FOLDER}}")
    return found


def _set(keys: Any, config: cfg.Config) -> LabelledSet:
    if not isinstance(keys, dict) or not set(keys) <= set(_KEYS):
        odd = sorted(set(map(str, keys)) - set(_KEYS)) if isinstance(keys, dict) else [repr(keys)]
        raise cfg.ConfigError(f"{odd[0]} is none of a set's keys; valid here: {', '.join(_KEYS)}")
    kind, several = keys.get("torchvision"), "detect" in keys
    if (kind is None) == ("data" not in keys):
        raise cfg.ConfigError("a set has either torchvision or data; write one of them")
    if kind is not None and (several or str(kind) not in KNOWN):
        told = f"torchvision {kind} is not read; known: {', '.join(KNOWN)}"
        raise cfg.ConfigError(f"{told}; give VOC by data and detect")
    if kind is None:
        sections = {key: keys.get(key) or {} for key in ("data", "detect")}
        config = config_file.override(config, [], afresh=sections)
    files = config.detect.instances
    voc = bool(files) and all(file.endswith(".txt") for file in files)
    usual = ("map_voc07" if voc else "map") if several else KNOWN[str(kind)].measure if kind else "top1"
    measure, choices = str(keys.get("measure", usual)), _SEVERAL if several else _ONE
    if measure not in choices:
        raise cfg.ConfigError(f"measure should be one of {', '.join(choices)}, not {measure}")
    return LabelledSet(kind, str(keys.get("root", ".")), config, measure, several)


def open_set(each: LabelledSet, seed: int) -> tuple[SampleIndex, SampleIndex]:
    """The labelled images to learn from and to be tested on, of a set with one class an image.

    Raises:
        FileNotFoundError: the set is not on disk.
        ValueError: it is damaged, or has no labels.
    """
    if each.torchvision is None:
        data = open_data(each.config.data, seed)
        if data.queries is None:
            raise ValueError("no image has a label; name labelled folders by data.path and data.eval_val")
        return data.bank, data.queries
    known = KNOWN[each.torchvision]
    if each.torchvision.startswith("CIFAR"):
        kind: Any = each.torchvision.lower()
        train, tests = ({"train": part} for part in (True, False))
        return from_torchvision(kind, each.root, **train), from_torchvision(kind, each.root, **tests)
    parts = [_files(each.torchvision, each.root, part) for part in known.train]
    files, labels = [name for names, _ in parts for name in names], np.concatenate([of for _, of in parts])
    if known.test is not None:
        return _index(files, labels), _index(*_files(each.torchvision, each.root, known.test))
    order = np.random.default_rng(seed).permutation(len(files))
    place = np.zeros(len(files), np.int64)  # of an image among those of its class, in a drawn order
    for label in range(labels.max() + 1):
        mine = order[labels[order] == label]
        place[mine] = np.arange(len(mine))
    most = np.inf if known.tested is None else known.drawn + known.tested
    sides = place < known.drawn, (place >= known.drawn) & (place < most)
    picked = [np.flatnonzero(side) for side in sides]
    train_index, test_index = (_index([files[row] for row in rows], labels[rows]) for rows in picked)
    return train_index, test_index


def _files(kind: str, root: str, part: dict[str, Any]) -> tuple[list[str], NDArray[np.int64]]:
    """Paths and labels of one part, as torchvision's class lists them."""
    from torchvision import datasets

    missing = FileNotFoundError(f"torchvision's {kind} is not in {root}")
    if kind == "Caltech101" and not Path(root, "caltech101").is_dir():
        raise missing  # torchvision would make the folder
    try:
        found = getattr(datasets, kind)(root, download=False, **part)
    except RuntimeError:
        raise missing from None
    if kind == "Caltech101":
        home = Path(found.root, "101_ObjectCategories")
        names: Iterable[Any] = (
            home / found.categories[label] / f"image_{number:04d}.jpg"
            for label, number in zip(found.y, found.index, strict=True)
        )
        labels = found.y
    elif hasattr(found, "_samples"):
        names, labels = zip(*found._samples, strict=True)
    else:
        names, labels = getattr(found, "_image_files", None) or found._images, found._labels
    return [os.path.abspath(name) for name in names], np.asarray(labels, np.int64)


def _index(files: list[str], labels: NDArray[np.int64]) -> SampleIndex:
    """An index of labelled files, by way of a list; those that cannot be used are left out with a warning."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as lines:
        lines.writelines(f"{name}\t{label}\n" for name, label in zip(files, labels, strict=True))
        lines.flush()
        index = SampleIndex.from_list(
            lines.name,
            os.path.commonpath([os.path.dirname(name) for name in files]),
            cache=False,
            progress=False,
        )
    if index.left_out:
        path, reason = index.left_out[0]
        warnings.warn(
            f"{len(index.left_out)} images are left out; the first is {path}: {reason}", stacklevel=2
        )
    return index
