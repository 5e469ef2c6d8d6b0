"""From a configuration to data: the indexes of training and evaluation, and loaders over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dali_views import Batch, RegionTable, SampleIndex, View, ViewLoader, recipes
from dali_views.tools.command_line import counted

from . import config as cfg
from .engine import ranks
from .engine.setting import Setting

__all__ = [
    "DataSets", "evaluation_views", "loader_options", "open_data", "open_images", "plain_loader",
    "step_parts", "training_loader", "training_views",
]  # fmt: skip


@dataclass(frozen=True)
class DataSets:
    """What a run reads."""

    train: SampleIndex  # to pretrain on
    bank: SampleIndex  # labelled images whose features vote in kNN
    queries: SampleIndex | None  # labelled images to classify; None if there are no labels


def open_data(config: cfg.Data, seed: int = 0, kept: Path | None = None) -> DataSets:
    """Index the images of a run. Rank 0 scans first, the others then find its cache.

    Args:
        kept: file of the index that a run was begun with: read if it exists, else written. So a resumed run
            has the same samples although files have changed.

    Raises:
        FileNotFoundError, ValueError: as the constructors of SampleIndex, or if a part would be empty.
    """
    if not ranks.is_main():
        ranks.barrier()
    sets = _open(config, seed, kept)
    if ranks.is_main():
        ranks.barrier()
    return sets


def open_images(config: cfg.Data) -> SampleIndex:
    """Index the images of `path` alone, on rank 0 first; errors as by `open_data`. Not for archives."""
    if not ranks.is_main():
        ranks.barrier()
    index = _cached(_scanned(config, None), config)
    if ranks.is_main():
        ranks.barrier()
    return index


def _open(config: cfg.Data, seed: int, kept: Path | None) -> DataSets:
    match config.kind:
        case "cifar10" | "cifar100":
            train = from_torchvision(config.kind, config.path, train=True)
            return DataSets(train, train, from_torchvision(config.kind, config.path, train=False))
        case "stl10":
            train = from_torchvision("stl10", config.path, split="train+unlabeled")
            queries = from_torchvision("stl10", config.path, split="test")
            return DataSets(train, train.subset(train.labels >= 0), queries)
    classes = None if config.classes is None else class_names(config.classes)
    folder = partial(SampleIndex.from_folder, progress=ranks.is_main())
    if kept is not None and kept.is_file():
        whole = SampleIndex.load(kept)
    else:
        whole = _scanned(config, classes)
        if kept is not None and ranks.is_main():
            whole.save(kept)
            whole = SampleIndex.load(kept)  # a large one is mapped, and so shared with the other ranks
    whole = _cached(whole, config)
    if config.boxes is not None:
        whole = whole.with_boxes(config.boxes)
    bank = whole
    if config.eval_train is not None:
        bank = _cached(folder(config.eval_train, classes=classes), config)
    if config.eval_val is not None:
        # With the classes of the bank, so that a class has the same number in both.
        return DataSets(whole, bank, _cached(folder(config.eval_val, classes=bank.classes or None), config))
    rest, held = _split(bank, config.val_share, seed)
    # Images held out of the bank are trained on only if training has a set of its own.
    return DataSets(rest if config.eval_train is None else whole, rest, held)


def _scanned(config: cfg.Data, classes: Sequence[str] | None) -> SampleIndex:
    path, progress = config.path, ranks.is_main()
    match config.kind:
        case "folder":
            found = SampleIndex.from_folder(path, progress=progress, classes=classes)
        case "list":
            found = SampleIndex.from_list(path, config.root, progress=progress)
        case "shards":
            found = SampleIndex.from_shards(path, progress=progress)
        case "table":
            found = SampleIndex.from_table(path, config.image, config.label, progress=progress)
        case "lmdb":
            found = SampleIndex.from_lmdb(path, progress=progress)
        case _:
            found = SampleIndex.from_coco(path, config.instances, progress=progress)
    return found if config.leave_out is None else found.without(config.leave_out)


def _cached(index: SampleIndex, config: cfg.Data) -> SampleIndex:
    """The index with its reads kept in `data.cache_dir`, unless it reads local files."""
    if config.cache_dir is None or index.source is None:
        return index
    return index.cached(config.cache_dir, config.cache_gb)


def _split(index: SampleIndex, share: float, seed: int) -> tuple[SampleIndex, SampleIndex | None]:
    """The rest and `share` of the labelled images, drawn by the seed alone; None if that is no image."""
    labelled = np.flatnonzero(index.labels >= 0)
    # At least one if there are few, because an evaluation was asked for.
    count = max(round(share * len(labelled)), int(share > 0 and len(labelled) > 1))
    held = np.random.default_rng(seed).permutation(labelled)[:count]
    if not len(held):
        return index, None
    out = np.isin(np.arange(len(index)), held)
    if out.all():
        raise ValueError(f"data.val_share {share} leaves none of {len(index)} images to train on; lower it")
    return index.subset(~out), index.subset(out)


def class_names(file: str) -> list[str]:
    """The class folders that a text file names, one a line, without blank lines and comments (#)."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no class list {file}, named by data.classes; check the path")
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise ValueError(f"{file}, named by data.classes, names no class; write one class folder a line")
    return names


def from_torchvision(kind: Literal["cifar10", "cifar100", "stl10"], folder: str, **part: Any) -> SampleIndex:
    """One part of an archive in torchvision's layout, in memory; images without a label have -1.

    STL-10's 105,000 images of `train+unlabeled` take 3 GB, twice that while they are read. `part` is
    torchvision's argument that selects a part: `train` (CIFAR) or `split` (STL).
    """
    from torchvision import datasets

    name = kind.upper()
    try:
        archive = getattr(datasets, name)(folder, **part)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name} is not below {folder}; fetch it once with "
            f"torchvision.datasets.{name}({folder!r}, download=True)"
        ) from error
    if kind != "stl10":
        return SampleIndex.from_arrays(archive.data, archive.targets, archive.classes)
    # STL's planes lie apart, (N, 3, H, W); its class names are in a separate file, which may be missing.
    images = np.ascontiguousarray(archive.data.transpose(0, 2, 3, 1))
    return SampleIndex.from_arrays(images, archive.labels, getattr(archive, "classes", None))


def training_views(config: cfg.Views) -> list[View]:
    """The recipe's views with the configuration's changes, and a partner's last if it is added.

    Raises:
        ValueError: the recipe does not take one of the changes.
    """
    if config.name not in recipes.BY_NAME:
        raise ValueError(f"views.name {config.name!r} is none of {', '.join(recipes.BY_NAME)}")
    optional = (
        "scale", "blur", "vflip", "rotate90", "second_crop", "dilate", "joint", "locals", "local_size",
        "local_crop", "local_scale",
    )  # fmt: skip
    settings = {key: value for key in optional if (value := getattr(config, key)) is not None}
    settings |= {"crop": config.crop, "alpha": config.alpha}
    if strange := recipes.not_taken(config.name, settings):
        keys = ", ".join(f"views.{key}" for key in strange)
        raise ValueError(
            f"the recipe {config.name} does not take {keys}; leave it out, or choose another views.name"
        )
    return recipes.with_partner(recipes.BY_NAME[config.name](config.size, **settings), config.partner)


def evaluation_views(config: cfg.Views) -> list[View]:
    """The plain central view; small images, which have no border to spare, are taken whole."""
    return recipes.evaluation(config.size, centre_share=0.875 if config.size >= 128 else 1.0)


def training_loader(
    setting: Setting, views: cfg.Views, index: SampleIndex, regions: RegionTable, split_bn: int = 0
) -> ViewLoader:
    """The guided loader. A batch is this process's share of a part of `optim.batch`, see `step_parts`.

    Raises:
        ValueError: the batch does not divide, by `split_bn` either, or there are too few images for a step.
    """
    each, rest = divmod(setting.batch, ranks.world() * setting.parts)
    if rest:
        parts = "" if setting.parts == 1 else f" in {setting.parts} parts (optim.accumulate)"
        raise ValueError(
            f"optim.batch {setting.batch} does not divide over {ranks.world()} processes{parts}; "
            "start a number of processes that divides it"
        )
    if split_bn and each % split_bn:
        raise ValueError(
            f"method.split_bn {split_bn} does not divide the {each} samples of each of {ranks.world()} "
            "processes; choose a divisor, or another number of processes"
        )
    if len(index) < setting.batch:
        images = counted(len(index), "image")
        raise ValueError(f"{images} to train on cannot fill optim.batch {setting.batch}; lower optim.batch")
    return ViewLoader(index, training_views(views), each, regions=regions, **loader_options(setting, views))


def step_parts(loader: ViewLoader, parts: int) -> Iterator[Iterator[Batch]]:
    """The rest of the loader's epoch, step by step; each step gives its batches, which must all be taken.

    Steps have the images that batches `parts` times as large would have, and there are as many of them: the
    loader drops its last batches if they do not fill a step.
    """
    begun, whole, batches = loader.step // parts, len(loader) // parts, iter(loader)
    for _ in range(begun, whole):
        yield islice(batches, parts)


def plain_loader(
    setting: Setting, views: cfg.Views, index: SampleIndex, shown: Sequence[View], alone: bool = False
) -> ViewLoader:
    """Every image of an index once, in order, shared among the ranks, or all for this process `alone`.

    A batch has as many images as a process trains on, within 32 and 256, so that it fits the memory if
    training does. `run.max_bad_share` is not applied: among few images, one may be a large share.
    """
    rank, world = (0, 1) if alone else (ranks.rank(), ranks.world())
    trained = setting.batch // setting.parts // ranks.world()
    batch = min(256, max(32, trained), -(-len(index) // world))
    options = {**loader_options(setting, views), "rank": rank, "world": world, "max_bad_share": 1.0}
    return ViewLoader(index, shown, batch, shuffle=False, drop_last=False, **options)


def loader_options(setting: Setting, views: cfg.Views) -> dict[str, Any]:
    """What all loaders of a run have in common, as keyword arguments of ViewLoader."""
    half = setting.kind == "gpu" and setting.precision is not None
    return {
        "device": setting.kind, "seed": setting.seed, "threads": setting.threads,
        "dtype": "float16" if half else "float32", "mean": views.mean, "std": views.std,
        "on_bad_image": setting.on_bad_image, "max_bad_share": setting.max_bad_share,
        "hw_decoder_load": setting.hw_decoder_load,
    }  # fmt: skip
