"""What each operator of a view costs on a CPU: milliseconds of one core per view, medians of turns.

python tests/bench/operators.py FOLDER OUT.csv [--threads 2] [--size 224] [--rounds 5]

Views are resized from the folder's photographs beforehand, so that an operator is measured apart; the cost
of a graph that only hands its input on is taken off.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types

from dali_views import SampleIndex, ViewLoader, recipes
from dali_views.graph.colour_cpu import Photometric
from dali_views.graph.decode import decode, read
from dali_views.system.machine import machine

BATCH = 64
MEAN, STD = (124.0, 116.0, 104.0), (58.0, 57.0, 57.0)
NAMES = ("matrix", "pivot", "sigma", "window", "solarise")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    index = SampleIndex.from_folder(args.folder)
    index = index.subset(np.arange(BATCH) % len(index))
    loader = ViewLoader(index, recipes.moco_v2(args.size), BATCH, device="cpu", shuffle=False)
    drawn = loader.plan_at(0).views[0]
    paths = index.path_rows(np.arange(BATCH))
    views = _views(paths, drawn.start, drawn.end, args)
    given = [getattr(drawn, name) for name in NAMES]
    float_views = views.astype(np.float32)
    rois = (drawn.start[:, 0], drawn.end[:, 0], *(np.sort([drawn.start[:, 1], drawn.end[:, 1]], axis=0)))
    start = np.stack([rois[0], rois[2]], 1).astype(np.int32)
    shape = np.stack([rois[1] - rois[0], rois[3] - rois[2]], 1).astype(np.int32)
    sharp = [given[0], given[1], given[2], np.ones(BATCH, np.int32), given[4]]

    def resized(**options: Any) -> Callable[..., Any]:
        size = [args.size, args.size]
        return lambda image, start, end: fn.resize(image, size=size, roi_start=start, roi_end=end, **options)

    def normalised(**options: Any) -> Callable[..., Any]:
        return lambda image: fn.crop_mirror_normalize(image, mean=MEAN, std=STD, **options)

    def fused(image: Any, *nodes: Any) -> Any:
        return fn.python_function(
            image, *nodes, function=Photometric(NAMES, args.threads, MEAN, STD), batch_processing=True,
            output_layouts="HWC",
        )  # fmt: skip

    def grey_mean(image: Any) -> Any:
        grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        return fn.reductions.mean(grey)

    decoded = [np.array(image) for image in _decoded(paths, args)]
    linear, cubic = types.INTERP_LINEAR, types.INTERP_CUBIC
    byte, float32, float16 = types.UINT8, types.FLOAT, types.FLOAT16
    # name: what the graph is given, and what it does with it
    operators: dict[str, tuple[list[Any], Callable[..., Any]]] = {
        "read": ([paths], read),
        "read by mapping into memory": ([paths], fn.io.file.read),
        "read and decode": ([paths], lambda path: decode(read(path), "cpu", 0.0)),
        "read and decode the crop only": (
            [paths, start, shape],
            lambda path, start, shape: fn.decoders.image_slice(
                read(path), start=start, shape=shape, axis_names="HW", adjust_orientation=False
            ),
        ),
        "resize, linear": ([decoded, drawn.start, drawn.end], resized(interp_type=linear)),
        "resize, linear, no antialias": (
            [decoded, drawn.start, drawn.end],
            resized(interp_type=linear, antialias=False),
        ),
        "resize, cubic": ([decoded, drawn.start, drawn.end], resized(interp_type=cubic)),
        "coord_transform, bytes to bytes": (
            [views, given[0]],
            lambda image, matrix: fn.coord_transform(image, M=matrix, dtype=byte),
        ),
        "coord_transform, floats to floats": (
            [float_views, given[0]],
            lambda image, matrix: fn.coord_transform(image, M=matrix, dtype=float32),
        ),
        "hsv, bytes to bytes": ([views], lambda image: fn.hsv(image, hue=10.0, saturation=0.8, value=1.1)),
        "grey mean": ([views], grey_mean),
        "gaussian_blur, half of the views, window by sigma": (
            [views, given[2], given[3]],
            lambda image, sigma, window: fn.gaussian_blur(image, sigma=sigma, window_size=window),
        ),
        "gaussian_blur, all views, 23 taps": (
            [views, given[2]],
            lambda image, sigma: fn.gaussian_blur(image, sigma=sigma, window_size=23),
        ),
        "crop_mirror_normalize, float32": ([views], normalised(dtype=float32, output_layout="HWC")),
        "crop_mirror_normalize, float16": ([views], normalised(dtype=float16, output_layout="HWC")),
        "cast, float32 to float16": ([float_views], lambda image: fn.cast(image, dtype=float16)),
        "compiled: colour, blur of half the views, normalisation": ([views, *given], fused),
        "compiled: colour and normalisation": ([views, *sharp], fused),
    }
    # What handing the input on costs is measured too, once per kind of input.
    plain = {id(inputs[0]): (inputs, lambda *nodes: nodes[0]) for inputs, _ in operators.values()}
    graphs = {name: _graph(inputs, act, args.threads) for name, (inputs, act) in operators.items()}
    graphs |= {key: _graph(inputs, act, args.threads) for key, (inputs, act) in plain.items()}
    costs: dict[Any, list[float]] = {key: [] for key in graphs}
    for _ in range(args.rounds):
        for key, graph in graphs.items():
            costs[key].append(_cost(graph, args.threads))
    rows = []
    for name, (inputs, _) in operators.items():
        apart = [a - b for a, b in zip(costs[name], costs[id(inputs[0])], strict=True)]
        rows.append({"operator": name, "core_ms_per_view": round(statistics.median(apart), 3),
                     "rounds": " ".join(f"{value:.3f}" for value in apart), "size": args.size,
                     "threads": args.threads, "machine": machine("cpu")})  # fmt: skip
        print(f"{name:58s}{rows[-1]['core_ms_per_view']:8.3f}")
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _graph(inputs: list[Any], act: Callable[..., Any], threads: int) -> Pipeline:
    graph = Pipeline(BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=2, seed=0)
    with graph:
        nodes = fn.external_source(lambda: inputs, num_outputs=len(inputs), batch=True)
        if inputs[0][0].ndim == 3:
            nodes[0] = fn.reshape(nodes[0], layout="HWC")
        graph.set_outputs(act(*nodes))
    graph.build()
    return graph


def _cost(graph: Pipeline, threads: int, runs: int = 6) -> float:
    """Milliseconds of one core per image: time of both threads, as if both had worked all along."""
    for _ in range(2):
        graph.run()
    began = time.perf_counter()
    for _ in range(runs):
        graph.run()
    return (time.perf_counter() - began) / (runs * BATCH) * 1e3 * threads


def _decoded(paths: np.ndarray, args: argparse.Namespace) -> list[np.ndarray]:
    (images,) = _graph([paths], lambda path: decode(read(path), "cpu", 0.0), args.threads).run()
    return [images.at(i) for i in range(BATCH)]


def _views(paths: np.ndarray, start: np.ndarray, end: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    def cut(path: Any, start: Any, end: Any) -> Any:
        image = decode(read(path), "cpu", 0.0)
        return fn.resize(image, size=[args.size, args.size], roi_start=start, roi_end=end)

    (views,) = _graph([paths, start, end], cut, args.threads).run()
    return np.array(views.as_tensor())


if __name__ == "__main__":
    main()
