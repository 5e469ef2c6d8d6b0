"""From a configuration to data: the indexes of training and evaluation, and loaders over them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dali_views import RegionTable, SampleIndex, View, ViewLoader, recipes

from . import config as cfg
from .engine import ranks as distributed
from .engine.amp import device_kind, precision

__all__ = [
    "DataSets",
    "evaluation_views",
    "loader_options",
    "open_data",
    "plain_loader",
    "training_loader",
    "training_views",
]


@dataclass(frozen=True)
class DataSets:
    """What a run reads."""

    train: SampleIndex
    """Images to pretrain on; their labels are not used for that."""
    bank: SampleIndex
    """Labelled images whose features vote in kNN."""
    queries: SampleIndex | None
    """Labelled images to classify; None if there are no labels."""


def open_data(config: cfg.Data, seed: int = 0, kept: Path | None = None) -> DataSets:
    """Index the images of a run. Rank 0 scans first, the others then find its cache.

    Args:
        kept: file of the index that a run was begun with, which is read if it is there, else written. So a
            resumed run has the same samples although files have vanished or come since.

    Raises:
        FileNotFoundError, ValueError: as by the constructors of SampleIndex, or if a part would be empty.
    """
    if not distributed.is_main():
        distributed.barrier()
    sets = _open(config, seed, kept)
    if distributed.is_main():
        distributed.barrier()
    return sets


def _open(config: cfg.Data, seed: int, kept: Path | None) -> DataSets:
    progress = distributed.is_main()
    classes = None if config.classes is None else class_names(config.classes)
    match config.kind:
        case "cifar10" | "cifar100":
            train, queries = (
                from_torchvision(config.kind, config.path, train=part) for part in (True, False)
            )
            return DataSets(train, train, queries)
        case "stl10":
            train = from_torchvision("stl10", config.path, split="train+unlabeled")
            queries = from_torchvision("stl10", config.path, split="test")
            return DataSets(train, train.subset(train.labels >= 0), queries)
    if kept is not None and kept.is_file():
        whole = SampleIndex.load(kept)
    else:
        whole = _scanned(config, classes)
        if kept is not None and distributed.is_main():
            whole.save(kept)
            whole = SampleIndex.load(kept)  # a large one is mapped, and so shared with the other ranks
    whole = _cached(whole, config)
    if config.boxes is not None:
        whole = whole.with_boxes(config.boxes)
    bank = whole
    if config.eval_train is not None:
        bank = _cached(SampleIndex.from_folder(config.eval_train, progress=progress, classes=classes), config)
    if config.eval_val is not None:
        # The training set's classes, so that a class has the same number in both.
        val = SampleIndex.from_folder(config.eval_val, progress=progress, classes=bank.classes or None)
        return DataSets(whole, bank, _cached(val, config))
    rest, held = _split(bank, config.val_share, seed)
    # What is held out of the bank is trained on only if training has a set of its own.
    return DataSets(rest if config.eval_train is None else whole, rest, held)


def _scanned(config: cfg.Data, classes: Sequence[str] | None) -> SampleIndex:
    progress = distributed.is_main()
    match config.kind:
        case "folder":
            found = SampleIndex.from_folder(config.path, progress=progress, classes=classes)
        case "list":
            found = SampleIndex.from_list(config.path, config.root, progress=progress)
        case "shards":
            found = SampleIndex.from_shards(config.path, progress=progress)
        case "table":
            found = SampleIndex.from_table(config.path, config.image, config.label, progress=progress)
        case "lmdb":
            found = SampleIndex.from_lmdb(config.path, progress=progress)
        case _:
            found = SampleIndex.from_coco(config.path, config.instances, progress=progress)
    return found if config.leave_out is None else found.without(config.leave_out)


def _cached(index: SampleIndex, config: cfg.Data) -> SampleIndex:
    """The index with what it reads kept in `data.cache_dir`; local files of their own are at hand already."""
    if config.cache_dir is None or index.source is None:
        return index
    return index.cached(config.cache_dir, config.cache_gb)


def _split(index: SampleIndex, share: float, seed: int) -> tuple[SampleIndex, SampleIndex | None]:
    """The rest and `share` of the labelled images, drawn by the seed alone; None if that is no image."""
    labelled = np.flatnonzero(index.labels >= 0)
    # Of a few images at least one, or there would be nothing to measure by although it was asked for.
    count = max(round(share * len(labelled)), int(share > 0 and len(labelled) > 1))
    held = np.random.default_rng(seed).permutation(labelled)[:count]
    if not len(held):
        return index, None
    out = np.zeros(len(index), bool)
    out[held] = True
    if out.all():
        raise ValueError(f"data.val_share {share} leaves none of {len(index)} images to train on; lower it")
    return index.subset(~out), index.subset(out)


def class_names(file: str) -> list[str]:
    """The class folders that a text file names, one a line; blank lines and lines of # are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no class.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no class list {file}, named by data.classes; check the path"
        ) from None
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise ValueError(f"{file}, named by data.classes, names no class; write one class folder a line")
    return names


def from_torchvision(kind: Literal["cifar10", "cifar100", "stl10"], folder: str, **part: Any) -> SampleIndex:
    """One part of an archive in torchvision's layout, in memory; what has no label there has -1.

    STL-10's 105,000 images of `train+unlabeled` take 3 GB, and as much again while they are read.

    Args:
        kind: which archive.
        folder: where its folder or files lie.
        part: torchvision's argument that selects it: `train` (CIFAR) or `split` (STL).

    Raises:
        FileNotFoundError: the archive is not there, or not whole.
    """
    from torchvision import datasets

    archive_of = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[kind]
    try:
        archive: Any = archive_of(folder, **part)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{archive_of.__name__} is not below {folder}; fetch it once with "
            f"torchvision.datasets.{archive_of.__name__}({folder!r}, download=True)"
        ) from error
    if kind != "stl10":
        return SampleIndex.from_arrays(archive.data, archive.targets, archive.classes)
    # STL's planes lie apart, (N, 3, H, W); its names stand in a file of their own, which may be missing.
    images = np.ascontiguousarray(archive.data.transpose(0, 2, 3, 1))
    return SampleIndex.from_arrays(images, archive.labels, getattr(archive, "classes", None))


def training_views(config: cfg.Views) -> list[View]:
    """The recipe's views with the configuration's changes.

    Raises:
        ValueError: the recipe is unknown, or does not take one of the settings.
    """
    if config.name not in recipes.BY_NAME:
        raise ValueError(f"views.name {config.name!r} is none of {', '.join(recipes.BY_NAME)}")
    settings: dict[str, Any] = {"crop": config.crop, "alpha": config.alpha}
    for key in ("scale", "blur", "locals", "local_size", "local_scale"):
        if getattr(config, key) is not None:
            settings[key] = getattr(config, key)
    recipe = recipes.BY_NAME[config.name]
    known = list(inspect.signature(recipe).parameters)
    if strange := [f"views.{key}" for key in settings if key not in known]:
        raise ValueError(
            f"the recipe {config.name} does not take {', '.join(strange)}, only {', '.join(known)}; "
            "leave it out, or choose another views.name"
        )
    views = recipe(config.size, **settings)
    if config.partner:
        views[1] = replace(views[1], source="partner")
    return views


def evaluation_views(config: cfg.Views) -> list[View]:
    """The plain central view; small images, which have no border to spare, are taken whole."""
    return recipes.evaluation(config.size, centre_share=0.875 if config.size >= 128 else 1.0)


def training_loader(config: cfg.Config, index: SampleIndex, regions: RegionTable) -> ViewLoader:
    """The guided loader. Each rank takes its share of `optim.batch`.

    Raises:
        ValueError: the ranks do not divide the batch, or the images do not fill one.
    """
    world = distributed.world()
    if config.optim.batch % world:
        raise ValueError(
            f"optim.batch {config.optim.batch} does not divide over {world} processes; "
            "start a number of processes that divides it"
        )
    splits = config.method.split_bn if isinstance(config.method, cfg.MoCo) else 0
    each = config.optim.batch // world
    if splits and each % splits:
        raise ValueError(
            f"method.split_bn {splits} does not divide the {each} samples of each of {world} processes; "
            "choose a divisor, or another number of processes"
        )
    views = training_views(config.views)
    return ViewLoader(index, views, each, regions=regions, **loader_options(config))


def plain_loader(
    config: cfg.Config, index: SampleIndex, views: Sequence[View], alone: bool = False
) -> ViewLoader:
    """Every image of an index once, in order, shared out over the ranks, or for this process `alone`.

    A batch has as many images as a process trains on, within 32 and 256, so that what fits the memory in
    training fits it here. How many may be unreadable is judged in training: of a few images, one may be a
    large share.
    """
    rank, world = (0, 1) if alone else (distributed.rank(), distributed.world())
    trained = config.optim.batch // distributed.world()
    batch = min(256, max(32, trained), -(-len(index) // world))
    options = {**loader_options(config), "rank": rank, "world": world, "max_bad_share": 1.0}
    return ViewLoader(index, views, batch, shuffle=False, drop_last=False, **options)


def loader_options(config: cfg.Config) -> dict[str, Any]:
    """What all loaders of a run have in common, as keyword arguments of ViewLoader."""
    device = device_kind(config)
    half = device == "gpu" and precision(config) is not None
    return {
        "device": device,
        "seed": config.run.seed,
        "dtype": "float16" if half else "float32",
        "mean": config.views.mean,
        "std": config.views.std,
        "threads": config.run.threads,
        "on_bad_image": config.run.on_bad_image,
        "max_bad_share": config.run.max_bad_share,
    }
