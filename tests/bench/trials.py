"""What was tried to make the loader faster on a CPU and did not pay, or paid: ratios within one run.

python tests/bench/trials.py FOLDER OUT.csv [--rounds 5] [--seconds 4] [--only WORD]

Each trial is what we do and what we could do instead, in turns; the ratio is the alternative's images/s over
ours, above 1 where it would be faster.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, math, types

from dali_views import SampleIndex, View, recipes
from dali_views.graph import build as pipeline
from dali_views.graph.decode import decode, read
from dali_views.plan.draw import Plan
from dali_views.system.machine import machine
from dali_views.tools.bench import loaders as ours
from dali_views.tools.bench.contest import Batches, Contender, Setup, take_turns

MEAN, STD = [124.0, 116.0, 104.0], [58.0, 57.0, 57.0]
MARGIN = 4  # pixels beyond a crop that the resize may look at


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", default="", metavar="WORD", help="trials whose name contains it")
    args = parser.parse_args()
    index = SampleIndex.from_folder(args.folder)
    repeated = index.subset(np.arange(50_000) % len(index))
    setup = Setup(repeated, recipes.moco_v2(), 64, "cpu", pipeline.default_threads())
    one_view = [View(size=224, scale=(0.08, 1.0))]
    small = [replace(view, crop="inside") for view in setup.views]

    def loading(setup: Setup, prefetch: int = pipeline.PREFETCH) -> Batches:
        before, pipeline.PREFETCH = pipeline.PREFETCH, prefetch
        try:
            yield from ours.batches(setup, setup.views)
        finally:
            pipeline.PREFETCH = before

    trials: dict[str, tuple[Callable[[], Batches], Callable[[], Batches]]] = {
        "decode only the box around both views": (
            lambda: decoding(setup, whole),
            lambda: decoding(setup, around_the_views),
        ),
        "decode only the crop of a single view": (
            lambda: decoding(replace(setup, views=one_view), whole),
            lambda: decoding(replace(setup, views=one_view), around_the_views),
        ),
        "decode only the box around views inside half boxes": (
            lambda: decoding(replace(setup, views=small), whole),
            lambda: decoding(replace(setup, views=small), around_the_views),
        ),
        "map files into memory": (
            lambda: decoding(setup, whole),
            lambda: decoding(setup, mapped),
        ),
        "DALI's operators instead of one compiled pass": (
            lambda: viewing(setup, compiled),
            lambda: viewing(setup, bytes_between),
        ),
        "DALI's operators with floats in between": (
            lambda: viewing(setup, bytes_between),
            lambda: viewing(setup, floats_between),
        ),
        "crops guided by boxes, and boxes written back": (
            lambda: loading(setup),
            lambda: ours.batches(setup, ours.guided(setup.views), regions=1),
        ),
        "three batches ahead instead of two": (lambda: loading(setup), lambda: loading(setup, 3)),
        "twice as many threads as cores": (
            lambda: loading(setup),
            lambda: loading(replace(setup, workers=2 * setup.workers)),
        ),
        "batches of 256 instead of 64": (
            lambda: loading(setup),
            lambda: loading(replace(setup, batch_size=256)),
        ),
    }
    rows = []
    for name, (now, instead) in trials.items():
        if args.only and args.only not in name:
            continue
        contenders = [Contender(key, "ours", "cpu", start, 0) for key, start in (("a", now), ("b", instead))]
        rates = take_turns(contenders, args.rounds, args.seconds)
        ratio = statistics.median(b / a for a, b in zip(rates["a"], rates["b"], strict=True))
        rows.append(
            {
                "trial": name,
                "ratio": round(ratio, 3),
                "images_per_second_now": round(statistics.median(rates["a"]), 1),
                "images_per_second_instead": round(statistics.median(rates["b"]), 1),
                "rounds": " ".join(f"{b / a:.3f}" for a, b in zip(rates["a"], rates["b"], strict=True)),
                "machine": machine("cpu"),
            }
        )
        print(f"{name:55s}{ratio:8.3f}", flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def decoding(setup: Setup, act: Callable[..., Any]) -> Batches:
    """A graph that decodes as `act` says, given paths and the box around a sample's views in pixels."""
    regions = ours.table_of_boxes(setup) if setup.views[0].crop != "random" else None
    loader = ours.loader_of(setup, setup.views, regions)

    def inputs(plan: Plan) -> list[Any]:
        sizes = setup.index.sizes[plan.index]
        low = np.floor(plan.crops[:, :, :2].min(1) * sizes).astype(np.int32) - MARGIN
        high = np.ceil(plan.crops[:, :, 2:].max(1) * sizes).astype(np.int32) + MARGIN
        low, high = low.clip(0), np.minimum(high, sizes)
        return [setup.index.path_rows(plan.index), low, high - low]

    yield from running(setup, loader.plan_at, inputs, act)


def whole(path: Any, start: Any, shape: Any) -> Any:
    return decode(read(path), "cpu", 0.0), start, shape


def mapped(path: Any, start: Any, shape: Any) -> Any:
    image = fn.decoders.image(fn.io.file.read(path), output_type=types.RGB, adjust_orientation=False)
    return image, start, shape


def around_the_views(path: Any, start: Any, shape: Any) -> Any:
    return fn.decoders.image_slice(
        read(path), start=start, shape=shape, axis_names="HW", adjust_orientation=False
    )


def viewing(setup: Setup, act: Callable[..., Any]) -> Batches:
    """A graph that makes one view, with the photometric operators that `act` chooses."""
    loader = ours.loader_of(setup, setup.views[:1])
    names = ("start", "end", "matrix", "pivot", "sigma", "window")

    def inputs(plan: Plan) -> list[Any]:
        return [setup.index.path_rows(plan.index), *(getattr(plan.views[0], name) for name in names)]

    def graph(path: Any, start: Any, end: Any, *given: Any) -> Any:
        image = decode(read(path), "cpu", 0.0)
        image = fn.resize(image, size=[224, 224], roi_start=start, roi_end=end)
        return act(image, *given, threads=setup.workers)

    yield from running(setup, loader.plan_at, inputs, graph)


def compiled(image: Any, matrix: Any, pivot: Any, sigma: Any, window: Any, threads: int) -> Any:
    from dali_views.graph.colour_cpu import Photometric

    act = Photometric(("matrix", "pivot", "sigma", "window"), threads, MEAN, STD)
    return fn.python_function(
        image, matrix, pivot, sigma, window, function=act, batch_processing=True, output_layouts="HWC"
    )


def bytes_between(image: Any, matrix: Any, pivot: Any, sigma: Any, window: Any, threads: int) -> Any:
    shift = pivot * _grey(image)
    image = fn.reshape(fn.coord_transform(image, M=matrix, T=shift, dtype=types.UINT8), layout="HWC")
    image = fn.gaussian_blur(image, sigma=sigma, window_size=window)
    return fn.crop_mirror_normalize(image, dtype=types.FLOAT, output_layout="HWC", mean=MEAN, std=STD)


def floats_between(image: Any, matrix: Any, pivot: Any, sigma: Any, window: Any, threads: int) -> Any:
    image = fn.coord_transform(image, M=matrix, T=pivot * _grey(image), dtype=types.FLOAT)
    image = fn.reshape(math.clamp(image, 0.0, 255.0), layout="HWC")
    image = fn.gaussian_blur(image, sigma=sigma, window_size=window, dtype=types.FLOAT)
    return fn.crop_mirror_normalize(image, dtype=types.FLOAT, output_layout="HWC", mean=MEAN, std=STD)


def _grey(image: Any) -> Any:
    return fn.reductions.mean(fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY))


def running(
    setup: Setup,
    plan_at: Callable[[int], Plan],
    inputs: Callable[[Plan], list[Any]],
    act: Callable[..., Any],
) -> Batches:
    """Batches of a graph over the plans of a loader, made beforehand so that only the graph is measured."""
    plans = [inputs(plan_at(number * setup.batch_size)) for number in range(16)]
    turn = 0

    def source() -> list[Any]:
        nonlocal turn
        turn += 1
        return plans[turn % len(plans)]

    graph = Pipeline(
        setup.batch_size, num_threads=setup.workers, device_id=None, prefetch_queue_depth=2, seed=0
    )
    with graph:
        found = act(*fn.external_source(source, num_outputs=len(plans[0]), batch=True))
        graph.set_outputs(*(found if isinstance(found, tuple) else (found,)))
    graph.build()
    while True:
        graph.run()
        yield setup.batch_size


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s")
