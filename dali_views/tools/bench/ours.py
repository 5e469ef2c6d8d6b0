"""This package's loader in the settings people use it in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ...loader.batch import Batch
from ...loader.loader import ViewLoader
from ...plan import recipes
from ...plan.views import View
from ...regions.table import RegionTable
from .contender import Batches, Contender, Setup

PLAIN, GUIDED = "dali_views", "dali_views, guided"


def contenders(setup: Setup) -> list[Contender]:
    """Unguided, guided by live boxes and weights, with partner views, in half precision, multi-crop."""
    views = setup.views
    partners = [*views[:-1], replace(views[-1], source="partner")]
    multi_crop = recipes.dino(views[0].size, local_size=max(1, round(views[0].size * 96 / 224)))

    def contender(name: str, views: Sequence[View], regions: int = 0, dtype: str = "float32") -> Contender:
        return Contender(
            name, "ours", setup.device, lambda: batches(setup, views, regions, dtype), len(views)
        )

    return [
        contender(PLAIN, views),
        contender(GUIDED, guided(views), regions=1),
        contender("dali_views, one of 4 boxes by weight", guided(views), regions=4),
        contender("dali_views, partner view", partners, regions=1),
        contender("dali_views, float16", views, dtype="float16"),
        contender("dali_views, multi-crop 2 + 8", multi_crop),
    ]


def batches(setup: Setup, views: Sequence[View], regions: int = 0, dtype: str = "float32") -> Batches:
    """Batches of the loader; with `regions` boxes per sample, each batch's rows are written back."""
    table = table_of_boxes(len(setup.index), regions, setup.seed) if regions else None
    for batch in endless(loader(setup, views, table, dtype)):
        if setup.device == "gpu":
            torch.cuda.synchronize()
        if table is not None:
            table.update(batch.index, batch.boxes, batch.weights)
        yield len(batch)


def guided(views: Sequence[View]) -> list[View]:
    """The same views, cropped about the samples' boxes."""
    return [replace(view, crop="contrastive") for view in views]


def loader(
    setup: Setup, views: Sequence[View], table: RegionTable | None = None, dtype: str = "float32"
) -> ViewLoader:
    """The loader on the setup's device, by itself whatever other ranks there are."""
    return ViewLoader(
        setup.index,
        views,
        setup.batch_size,
        regions=table,
        device=setup.device,
        dtype=dtype,
        threads=setup.workers,
        hw_decoder_load=setup.hw_decoder_load,
        seed=setup.seed,
        rank=0,
        world=1,
    )


def endless(loader: ViewLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def table_of_boxes(length: int, regions: int, seed: int) -> RegionTable:
    """A table whose rows are all written: boxes of half a side, random weights and partners."""
    draw = np.random.default_rng(seed)
    table = RegionTable(length, regions)
    low = draw.uniform(0.0, 0.4, (length, regions, 2))
    boxes = np.concatenate([low, low + 0.5], axis=2)
    weights = draw.uniform(0.1, 1.0, (length, regions))
    table.update(np.arange(length), boxes, weights, draw.permutation(length))
    return table
