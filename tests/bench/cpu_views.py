"""Where the time of a view goes on a CPU, stage by stage, beside DALI's operators for the same.

python tests/bench/cpu_views.py FOLDER OUT.csv
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from dali_views import SampleIndex, View, ViewLoader, recipes
from dali_views.graph import build, views_cpu
from dali_views.graph.decode import decoder
from dali_views.plan.draw import ViewPlan
from dali_views.system.machine import machine

IMAGES, ROUNDS, SIZE = 64, 9, 224
FORM: dict[str, Any] = {"threads": 1, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def one_pass(view: View, plan: ViewPlan, images: list[Any], dtype: str = "float32") -> Callable[[], object]:
    maker = views_cpu.Views([view], dtype=dtype, **FORM)

    def act() -> None:
        maker.expect([plan])
        maker(images)
        maker.take()

    return act


def operators(view: View, plan: ViewPlan, pixels: list[Any]) -> Callable[[], object]:
    """The same by DALI's operators, from images that are decoded already."""
    given = build.inputs([pixels], [], [view], [plan])
    options = {
        "device": "cpu",
        "device_id": None,
        "form": "pixels",
        "dtype": "float32",
        "hw_decoder_load": 1.0,
    }
    graph = build.build([view], lambda: given, batch_size=len(pixels), **options, **FORM)
    return graph.run


def scaled(encoded: list[bytes]) -> Callable[[], object]:
    """Pillow's decoder at half the size, which libjpeg-turbo reaches without the full image."""

    def act() -> None:
        for each in encoded:
            image = Image.open(io.BytesIO(each))
            image.draft("RGB", (image.width // 2, image.height // 2))
            image.convert("RGB")

    return act


def stages(folder: str) -> Iterator[tuple[str, Callable[[], object]]]:
    index = SampleIndex.from_folder(folder, progress=False)
    view = recipes.moco_v2(SIZE)[0]
    plain = View(size=SIZE, scale=view.scale)
    loader = ViewLoader(index, [view, plain, replace(plain, interpolation="cubic")], IMAGES, device="cpu")
    drawn = loader.plan_at(0)
    coloured, bare, cubic = drawn.views
    encoded = [index.encoded(int(row)) for row in drawn.index]
    images = [np.array(Image.open(io.BytesIO(each)).convert("RGB")) for each in encoded]
    graph = decoder(IMAGES, 1, "cpu", None)
    views = [np.ascontiguousarray(image[:SIZE, :SIZE]) for image in images if min(image.shape[:2]) >= SIZE]
    views = [views[number % len(views)] for number in range(IMAGES)]
    still = ViewPlan(*(np.array(part) for part in vars(coloured).values()))
    still.start[:], still.end[:] = 0.0, SIZE
    sharp = replace(still, window=np.ones_like(still.window))
    yield "read", lambda: [index.encoded(int(row)) for row in drawn.index]
    yield "decode (DALI)", lambda: graph.run(images=[np.frombuffer(each, np.uint8) for each in encoded])
    yield "decode at half the size (Pillow; not used)", scaled(encoded)
    yield "crop, resize (linear), normalise", one_pass(plain, bare, images)
    yield "crop, resize (cubic), normalise", one_pass(loader.views[2], cubic, images)
    yield "colour and normalise alone", one_pass(view, sharp, views)
    yield "colour, blur of half the views, normalise alone", one_pass(view, still, views)
    yield "the whole pass, float32", one_pass(view, coloured, images)
    yield "the whole pass, float16", one_pass(view, coloured, images, "float16")
    yield "DALI's operators: crop, resize (linear), normalise", operators(plain, bare, images)
    yield "DALI's operators: crop, resize (cubic), normalise", operators(loader.views[2], cubic, images)
    yield "DALI's operators: the whole pass, float32", operators(view, coloured, images)


def main(folder: str, out: str) -> None:
    times: dict[str, list[float]] = {}
    # One after the other: DALI's graphs work ahead, and would do so in the turns of others.
    for name, act in stages(folder):
        for _ in range(3):
            act()
        times[name] = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            act()
            times[name].append(1e3 * (time.perf_counter() - began) / IMAGES)
    with Path(out).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["operator", "core_ms_per_view", "rounds", "size", "threads", "machine"])
        for name, taken in times.items():
            told = " ".join(f"{value:.3f}" for value in taken)
            writer.writerow([name, round(median(taken), 3), told, SIZE, 1, machine("cpu")])
            print(f"{name:60} {median(taken):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
