"""The one pass that makes views on the CPU, beside DALI's operators, which a GPU runs (docs/colour.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_views import SampleIndex, View, ViewLoader, recipes
from dali_views.graph import feed
from dali_views.graph.colour_cpu import _to_half

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
BORDER = 3  # pixels at a view's edge whose filter reaches beyond the crop, where the operators see the image


def made(index: SampleIndex, views: list[View], **options: object) -> list[torch.Tensor]:
    """V tensors (N, H, W, 3) of all images."""
    batches = [[view.clone() for view in batch.views] for batch in ViewLoader(index, views, 8, **options)]
    return [torch.cat(each) for each in zip(*batches, strict=True)]


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize(("interpolation", "most"), [("linear", 1), ("cubic", 24)])
def test_crops_are_the_operators_but_at_the_edge(photographs, monkeypatch, size, interpolation, most):
    """Cubic overshoots, and the one pass cuts that off after each of its two directions."""
    index = SampleIndex.from_folder(photographs, cache=False, progress=False)
    view = View(size=size, flip=0.5, interpolation=interpolation)
    (ours,) = made(index, [view], device="cpu", **RAW)
    monkeypatch.setattr(feed, "Views", lambda *_, **__: None)
    (theirs,) = made(index, [view], device="cpu", **RAW)
    difference = (ours - theirs).abs()
    inner = difference[:, :, BORDER:-BORDER, BORDER:-BORDER]
    assert inner.max() <= most
    assert np.quantile(inner.numpy(), 0.999) <= 2
    assert difference.mean() <= 0.3
    assert difference.max() > 0  # two ways were compared


@pytest.mark.parametrize("name", ["moco_v2", "simclr", "byol", "dino"])
def test_views_of_recipes_are_the_operators(photographs, monkeypatch, name):
    index = SampleIndex.from_folder(photographs, cache=False, progress=False)
    # Solarise turns the least difference at its threshold into the largest one.
    views = [replace(view, solarise=0.0) for view in getattr(recipes, name)(96)]
    ours = made(index, views, device="cpu", **RAW)
    monkeypatch.setattr(feed, "Views", lambda *_, **__: None)
    for mine, theirs in zip(ours, made(index, views, device="cpu", **RAW), strict=True):
        difference = (mine - theirs).abs()
        assert np.quantile(difference[:, :, BORDER:-BORDER, BORDER:-BORDER].numpy(), 0.999) <= 4
        assert difference.mean() <= 0.3


def test_half_precision_is_float32_rounded_once(photographs):
    index = SampleIndex.from_folder(photographs, cache=False, progress=False)
    views = recipes.byol(64)
    for single, half in zip(
        made(index, views, device="cpu"), made(index, views, device="cpu", dtype="float16"), strict=True
    ):
        assert torch.equal(half, single.half())
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, np.uint32)
    edges = np.float32([0, -0.0, 65504, 65519.99, 65520, 1e9, 2**-14, 6e-8, 2.0**-25, 2.99e-8])
    numbers = np.concatenate([bits.view(np.float32), edges, -edges])
    numbers = numbers[np.isfinite(numbers)]
    out = np.empty(len(numbers), np.uint16)
    _to_half(out, numbers, np.empty_like(numbers))
    with np.errstate(over="ignore"):
        assert np.array_equal(out.view(np.float16), numbers.astype(np.float16))


def test_memory_is_used_again_but_never_while_a_tensor_looks_at_it():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 40, 40, 3), dtype=np.uint8)
    index = SampleIndex.from_arrays(pixels)
    loader = ViewLoader(index, [View(size=32), View(size=16)], 4, device="cpu")
    kept, told = [], []
    for batch in loader:
        kept.append(batch.views[0][1:, :2, 3:])  # parts of two of three batches
        told.append(kept[-1].clone())
        if len(kept) % 3 == 0:
            del kept[-1], told[-1]
    assert all(torch.equal(part, was) for part, was in zip(kept, told, strict=True))
    del kept, batch
    for epoch in range(1, 5):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
    # All memory has come back: the first epoch kept parts of eleven batches, and a few are in progress.
    assert all(1 < len(free) <= 16 for free in loader._feed._coming.maker._free)


def test_a_processor_without_vector_units_makes_the_same_views(photographs: Path):
    """PyTorch chooses its kernels by the processor; the slow ones do the same sums."""
    code = (
        "import sys, zlib, torch; from dali_views import SampleIndex, View, ViewLoader; "
        "index = SampleIndex.from_folder(sys.argv[1], cache=False, progress=False); "
        "views = [View(size=size, interpolation=i) for size in (24, 96) for i in ('linear', 'cubic')]; "
        "print(torch.backends.cpu.get_cpu_capability(), "
        "*(zlib.crc32(view.contiguous().numpy().tobytes()) "
        "for batch in ViewLoader(index, views, 8, device='cpu') for view in batch.views))"
    )
    told = {}
    for capability in ("default", None):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        environment |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = subprocess.run(
            [sys.executable, "-c", code, photographs],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        told[capability] = done.stdout.split()
    assert told["default"][0] == "DEFAULT"
    assert told["default"][1:] == told[None][1:]
    assert len(told[None]) > 2
