"""The loader in the settings people use, beside the limits and the peers, on the same images in one run.

A limit is the graph cut short: the most that any loader on these readers and decoders could reach.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from ...graph.build import PREFETCH
from ...graph.decode import decode
from ...loader.batch import Batch
from ...loader.loader import ViewLoader
from ...plan import recipes
from ...plan.views import View
from ...regions.table import RegionTable
from .contest import OF_TIME, WARM_UP, Batches, Contender, Report, Row, Setup, speed_row, take_turns

GUIDED, DECODE = "dali_views, guided", "decode only"
_HARDWARE_LOADS = (0.0, 0.5, 0.8, 1.0)  # the best share differs between GPUs


def compare(
    setup: Setup,
    peers: Sequence[Contender],
    rounds: int,
    seconds: float,
    *,
    only: Sequence[str],
    cold: bool,
    report: Report = print,
    until: float = math.inf,
) -> list[Row]:
    """A row per limit, setting of our loader and peer whose name is, or else has, a word of `only`, if given.

    The first peer is the baseline. It, limits and ours come first, so what is missing at `until` is a peer.
    """
    enough = 8 * WARM_UP * setup.batch_size
    if cold and len(setup.index) < enough:
        raise ValueError(
            f"With a cold cache a turn reads every file once, and {len(setup.index)} files are too few for "
            f"batches of {setup.batch_size}; give at least {enough} files or lower --batch-size."
        )
    base, *others = peers
    kept = (base.name, DECODE)
    everyone = [base, *limits(setup), *ours(setup), *others]
    names = {each.name for each in everyone}
    contenders = [
        each
        for each in everyone
        if not only
        or each.name in (*kept, *only)
        or any(word in each.name for word in only if word not in names)
    ]
    indexes = [setup.index] if cold else []
    rates = take_turns(contenders, rounds, seconds, cold=indexes, report=report, until=until)
    rows = [speed_row("loaders", each, rates, *kept) for each in contenders if each.name in rates]
    return rows + ([_plan_row(setup, median(rates[GUIDED]))] if GUIDED in rates else [])


def compare_places(setups: Mapping[str, Setup], rounds: int, seconds: float, cold: bool) -> list[Row]:
    """Two rows per place where the images lie, with ratios to the first: our loader, and decoding alone."""
    pairs = []
    for name, setup in setups.items():
        loader = replace(ours(setup)[0], name=name)
        (decode,) = (limit for limit in limits(setup) if limit.name == DECODE)
        pairs.append((loader, replace(decode, name=f"{name}, {DECODE}")))
    indexes = [setup.index for setup in setups.values()]
    rates = take_turns([one for pair in pairs for one in pair], rounds, seconds, cold=indexes if cold else [])
    both = [(one, base.name) for pair in pairs for one, base in zip(pair, pairs[0], strict=True)]
    return [speed_row("sources", one, rates, base) for one, base in both]


def limits(setup: Setup) -> list[Contender]:
    """Reading alone; reading and decoding; both and one resize of the whole image to the view's size."""
    size = [setup.views[0].size] * 2
    decoded = partial(decode, device=setup.device, hw_decoder_load=setup.hw_decoder_load)
    stages: dict[str, Callable[[Any], Any]] = {
        "read only": lambda encoded: encoded,
        DECODE: decoded,
        "decode + one resize": lambda encoded: fn.resize(decoded(encoded), size=size),
    }
    for load in _HARDWARE_LOADS if setup.device == "gpu" else ():
        stages[f"{DECODE}, hardware {load:.0%}"] = partial(decoded, hw_decoder_load=load)
    return [
        Contender(name, "limit", "cpu" if name == "read only" else setup.device, partial(_cut, setup, act), 0)
        for name, act in stages.items()
    ]


def _cut(setup: Setup, act: Callable[[Any], Any]) -> Batches:
    order = np.random.default_rng(setup.seed).permutation(len(setup.index))
    firsts = count(0, setup.batch_size)
    rows = (np.take(order, first + np.arange(setup.batch_size), mode="wrap") for first in firsts)
    graph = short_graph(setup, rows, act)
    while True:
        graph.run()
        yield setup.batch_size


def short_graph(
    setup: Setup, rows: Iterator[Any], act: Callable[[Any], Any], depth: int = PREFETCH
) -> Pipeline:
    """A built graph that reads the images of each batch of rows and applies `act` to the encoded bytes."""
    gpu = setup.device == "gpu"
    graph = Pipeline(setup.batch_size, setup.workers, 0 if gpu else None, seed=0, prefetch_queue_depth=depth)
    with graph:
        source = map(setup.index.inputs, rows)
        images = fn.external_source(lambda: next(source), batch=True, dtype=types.UINT8, ndim=1)
        graph.set_outputs(act(images))
    graph.build()
    return graph


def ours(setup: Setup) -> list[Contender]:
    """Unguided, guided by live boxes and weights, with partner views, in half precision, multi-crop."""
    views = setup.views
    partners = [*views[:-1], replace(views[-1], partner=True)]
    multi_crop = recipes.dino(views[0].size, local_size=max(1, round(views[0].size * 96 / 224)))
    settings: dict[str, tuple[Sequence[View], int, str]] = {
        "dali_views": (views, 0, "float32"),
        GUIDED: (guided(views), 1, "float32"),
        "dali_views, one of 4 boxes by weight": (guided(views), 4, "float32"),
        "dali_views, partner view": (partners, 1, "float32"),
        "dali_views, float16": (views, 0, "float16"),
        "dali_views, multi-crop 2 + 8": (multi_crop, 0, "float32"),
    }
    return [
        Contender(name, "ours", setup.device, partial(batches, setup, *setting), len(setting[0]))
        for name, setting in settings.items()
    ]


def batches(setup: Setup, views: Sequence[View], regions: int = 0, dtype: str = "float32") -> Batches:
    """Batches of the loader; with `regions` boxes per sample, each batch's rows are written back."""
    table = table_of_boxes(setup, regions) if regions else None
    for batch in endless(loader_of(setup, views, table, dtype)):
        if setup.device == "gpu":
            torch.cuda.synchronize()
        if table is not None:
            table.update(batch.index, batch.boxes, batch.weights)
        yield len(batch)


def guided(views: Sequence[View]) -> list[View]:
    """The same views, with crops guided by the samples' boxes."""
    return [replace(view, crop="contrastive") for view in views]


def loader_of(
    setup: Setup,
    views: Sequence[View],
    table: RegionTable | None = None,
    dtype: str = "float32",
    drop_last: bool = True,
) -> ViewLoader:
    """The loader on the setup's device."""
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
        drop_last=drop_last,
    )


def endless(loader: ViewLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def table_of_boxes(setup: Setup, regions: int = 1) -> RegionTable:
    """A table whose rows are all written: boxes of half a side, random weights and partners."""
    length, draw = len(setup.index), np.random.default_rng(setup.seed)
    table = RegionTable(length, regions)
    low = draw.uniform(0.0, 0.4, (length, regions, 2))
    weights = draw.uniform(0.1, 1.0, (length, regions))
    table.update(np.arange(length), np.concatenate([low, low + 0.5], 2), weights, draw.permutation(length))
    return table


def _plan_row(setup: Setup, images_per_second: float) -> Row:
    """How much of a guided batch's time goes into drawing its plan, which happens on one thread."""
    loader = loader_of(setup, guided(setup.views), table_of_boxes(setup))
    positions = count(0, setup.batch_size)
    seconds = timeit.repeat(lambda: loader.plan_at(next(positions)), repeat=50, number=1)
    share = median(seconds) * images_per_second / setup.batch_size
    return Row("loaders", "plan of a guided batch", OF_TIME, round(share, 5), kind="ours")
