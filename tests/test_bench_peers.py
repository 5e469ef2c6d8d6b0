"""The peers of the speed comparison do the task they are measured at, and leave nothing running."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dali_views import SampleIndex, View, recipes
from dali_views.tools.bench import peers
from dali_views.tools.bench.contender import Setup
from dali_views.tools.bench.peers import (
    contrastive_crop,
    ffmpeg_filters,
    lightly_moco,
    solo_learn,
    torchvision_gpu,
    torchvision_pil,
    torchvision_v2,
)
from dali_views.tools.bench.peers.data_loader import Views, endless_rows
from dali_views.tools.bench.peers.random_crop import draw_crop

PLAIN = [View(size=24, crop="whole"), View(size=28, crop="centre", centre_share=0.8, interpolation="cubic")]
TASKS = {
    "moco_v2": recipes.moco_v2(32),
    "dino": recipes.dino(32, local_size=16, locals=2),
    "plain": PLAIN,
}


def setup_of(index: SampleIndex, views: list[View], device: str = "cpu") -> Setup:
    return Setup(index=index, views=views, batch_size=8, device=device, workers=1)


def needs(name: str) -> Any:
    """The peer's module; skips where it cannot run."""
    peer = import_module(f"dali_views.tools.bench.peers.{name}")
    for module in peer.NEEDS:
        pytest.importorskip(module)
    if name == "spdl_pipeline":
        try:
            pytest.importorskip("spdl.io").utils.get_ffmpeg_versions()
        except RuntimeError:
            pytest.skip("SPDL finds no FFmpeg")
    return peer


def check(views: Sequence[View], tensors: Sequence[torch.Tensor]) -> None:
    """Normalised float32 of the views' sizes, neither empty nor constant."""
    for view, tensor in zip(views, tensors, strict=True):
        assert tensor.shape[-3:] == (3, view.size, view.size)
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert -2.2 < tensor.min() < tensor.max() < 2.7


def ended(threads: set[threading.Thread]) -> bool:
    """Whether no other thread is left, but for those that need a moment to see that they are closed."""
    for _ in range(100):
        if set(threading.enumerate()) <= threads:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", peers.NAMES)
def test_batches_arrive_and_nothing_stays(name: str, small_index: SampleIndex) -> None:
    setup = setup_of(small_index, recipes.moco_v2(32))
    found = needs(name).contenders(setup)
    if not found:
        pytest.skip("not on this machine")
    for contender in found:
        children, threads = multiprocessing.active_children(), set(threading.enumerate())
        batches = contender.start()
        assert list(islice(batches, 3)) == [8, 8, 8]
        batches.close()
        assert multiprocessing.active_children() == children
        assert ended(threads)
        assert (contender.kind, contender.views) == ("peer", 2)


def test_an_absent_peer_tells_a_line(small_index: SampleIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    lines: list[str] = []
    found = peers.found(setup_of(small_index, recipes.moco_v2(32)), lines.append)
    assert found[0].name == torchvision_pil.NAME
    absent = [name for name in peers.NAMES if import_module(f"{peers.__name__}.{name}").NEEDS]
    assert len(lines) == len(absent) > 0
    assert all(name in line for name, line in zip(absent, lines, strict=True))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["torchvision_pil", "torchvision_v2", "albumentations_cv2"])
def test_transforms_make_the_views(name: str, task: str, small_index: SampleIndex) -> None:
    peer, views = needs(name), TASKS[task]
    transform = getattr(peer, "Transform", None) or peer.transform
    dataset = Views(small_index, peer.opened, [transform(view) for view in views])
    dataset = pickle.loads(pickle.dumps(dataset))  # as on its way to a worker
    for row in range(0, 40, 7):
        check(views, dataset[row])


def test_v2_tensors_and_pil_agree_where_nothing_is_random(small_index: SampleIndex) -> None:
    for view in PLAIN:
        for row in range(5):
            pil, tensor = (
                peer.transform(view)(peer.opened(small_index.path(row)))
                for peer in (torchvision_pil, torchvision_v2)
            )
            assert (pil - tensor).abs().mean() < 0.05


def test_lightly_makes_the_views_it_can(small_index: SampleIndex) -> None:
    for views in (recipes.byol(32), recipes.dino(32), recipes.moco_v2(32, scale=(0.2, 0.5)), PLAIN):
        assert lightly_moco.contenders(setup_of(small_index, views)) == []
    peer, views = needs("lightly_moco"), recipes.moco_v2(32)
    dataset = pickle.loads(pickle.dumps(peer.TwoViews(small_index, peer.transform(views[0]))))
    for row in range(0, 40, 7):
        check(views, dataset[row])


@pytest.mark.parametrize("task", ["moco_v2", "dino"])
def test_solo_learn_makes_the_views(task: str, small_index: SampleIndex, device: str) -> None:
    views = TASKS[task]
    graph = solo_learn.graph(setup_of(small_index, views, device))
    outputs = [np.stack([np.asarray(image) for image in part.as_cpu()]) for part in graph.run()]
    check(views, [torch.from_numpy(output) for output in outputs])
    assert not np.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("task", TASKS)
def test_spdl_makes_the_views(task: str, small_index: SampleIndex) -> None:
    peer, views = needs("spdl_pipeline"), TASKS[task]
    setup = setup_of(small_index, views)
    made = peer.TorchvisionViews(setup)
    check(views, peer.stacked([made(row) for row in range(8)]))
    if task == "plain":
        assert len(peer.contenders(setup)) == 1
        return
    filtered = peer.FilteredViews(setup)
    check(views, peer.normalised([filtered(row) for row in range(8)]))


def test_spdl_levels_are_brightness_then_contrast() -> None:
    draw = random.Random(0)
    for _ in range(200):
        brightness, contrast = draw.uniform(0, 1.8), draw.uniform(0, 1.8)
        numbers = dict(re.findall(r"r(\w+)=([\d.]+)", ffmpeg_filters.levels(brightness, contrast)))
        low, high, first, last = (float(numbers[key]) for key in ("imin", "imax", "omin", "omax"))
        values = np.linspace(0, 1, 50)
        wanted = np.clip(contrast * (brightness * values - 0.5) + 0.5, 0, 1)
        within = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
        np.testing.assert_allclose(first + within * (last - first), wanted, atol=2e-3)


def test_centres_of_contrastive_crops_lie_in_the_box() -> None:
    draw = np.random.default_rng(0)
    random.seed(0)
    for _ in range(500):
        size, low = draw.integers(200, 400, 2), draw.uniform(0, 0.4, 2)
        box = [*low, *(low + draw.uniform(0, 0.6, 2))]
        view = View(size=32, crop="contrastive", alpha=float(draw.uniform(0.1, 2)))
        top, left, *extent = draw_crop(int(size[0]), int(size[1]), view, box)
        for axis, start in enumerate((top, left)):
            whole, part = int(size[axis]), extent[axis]
            centre = start + part // 2
            assert 0 <= start <= whole - part
            assert centre >= int(whole * box[axis]) or start == whole - part  # else the border pushed it
            assert centre <= int(whole * box[axis + 2]) or start == 0


def test_random_crops_keep_scale_and_ratio() -> None:
    view = View(size=32, scale=(0.2, 0.5), ratio=(0.5, 2.0))
    for box in (None, (0.2, 0.2, 0.7, 0.7)):
        for _ in range(200):
            _, _, h, w = draw_crop(300, 400, view, box)
            assert 0.19 < h * w / (300 * 400) < 0.51
            assert 0.49 < w / h < 2.05
    assert draw_crop(10, 400, view) == (0, 190, 10, 20)  # no crop of that area and ratio fits


def test_a_small_alpha_drives_crops_to_the_borders_of_the_box() -> None:
    view = View(size=32, crop="contrastive", scale=(0.1, 0.1), ratio=(1, 1))
    spread = {}
    for alpha in (0.1, 1.0, 10.0):
        tops = [draw_crop(400, 400, replace(view, alpha=alpha), (0.3, 0.3, 0.7, 0.7))[0] for _ in range(400)]
        spread[alpha] = np.std(tops)
    assert spread[0.1] > 1.2 * spread[1.0] > 1.5 * spread[10.0]


def test_contrastive_views(small_index: SampleIndex) -> None:
    views = recipes.moco_v2(32)
    boxes = contrastive_crop.random_boxes(len(small_index))
    assert boxes.shape == (40, 4)
    assert 0 <= boxes.min() < boxes.max() <= 1
    dataset = pickle.loads(pickle.dumps(contrastive_crop.BoxedViews(small_index, boxes, views)))
    for row in range(0, 40, 7):
        check(views, dataset[row])
    assert contrastive_crop.contenders(setup_of(small_index, PLAIN)) == []


def test_gpu_decoding_takes_other_formats_and_refused_files(
    small_index: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg, png = Path(small_index.path(0)), tmp_path / "a.png"
    Image.open(jpeg).save(png)
    cpu = torch.device("cpu")
    files = [torchvision_gpu.read(str(path)) for path in (png, jpeg, png)]
    wanted = torchvision_v2.opened(str(jpeg))
    for image in torchvision_gpu.decoded(files, cpu):
        assert torch.equal(image, wanted)

    def refuse(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(torchvision_gpu, "decode_jpeg", refuse)
    for image in torchvision_gpu.decoded(files, cpu):
        assert torch.equal(image, wanted)
    with pytest.raises(RuntimeError):  # a device that decodes nothing is no contender
        next(torchvision_gpu.batches(setup_of(small_index, recipes.moco_v2(32)), cpu))


def test_gpu_batches_run_on_any_device(small_index: SampleIndex) -> None:
    threads = set(threading.enumerate())
    batches = torchvision_gpu.batches(setup_of(small_index, recipes.dino(32)), torch.device("cpu"))
    assert list(islice(batches, 7)) == [8] * 7
    batches.close()
    assert ended(threads)


def test_endless_rows_visit_all_before_any_again(small_index: SampleIndex) -> None:
    rows = list(islice(endless_rows(setup_of(small_index, PLAIN)), 120))
    rounds = [rows[:40], rows[40:80], rows[80:]]
    assert all(sorted(part) == list(range(40)) for part in rounds)
    assert rounds[0] != rounds[1]
