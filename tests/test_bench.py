"""The bench: fair turns, figures with their configuration, costs of training and memory, honest peers."""

from __future__ import annotations

import csv
import multiprocessing
import pickle
import random
import shutil
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_views import SampleIndex, View, recipes
from dali_views.tools import cli
from dali_views.tools.bench import contest, costs, gpu_peers, peers, pixels, published
from dali_views.tools.bench import dataloaders as dl
from dali_views.tools.bench.contest import Batches, Contender, Setup, rate, take_turns

PLAIN = [View(size=24, crop="whole"), View(size=28, crop="centre", centre_share=0.8, interpolation="cubic")]
MULTI_CROP = recipes.dino(32, local_size=16, locals=2)


@pytest.fixture
def setup(small_index: SampleIndex) -> Setup:
    return Setup(small_index, recipes.moco_v2(32), batch_size=8, device="cpu", workers=1)


def test_contenders_take_turns_and_exist_only_during_their_own_and_a_peer_that_fails_leaves():
    log: list[str] = []

    def batches(name: str) -> Batches:
        log.append(f"{name} begins")
        try:
            yield 8
            if name == "broken":
                raise OSError("its file is gone")
            while True:
                yield 8
        finally:
            log.append(f"{name} ends")

    def turns(kind: str, *names: str) -> list[Contender]:
        return [Contender(name, kind, "cpu", lambda name=name: batches(name), 2) for name in names]

    told: list[str] = []
    contenders = turns("peer", "broken") + turns("ours", "a", "b")
    rates = take_turns(contenders, rounds=2, seconds=0.01, report=told.append)
    assert log == ["broken begins", "broken ends"] + ["a begins", "a ends", "b begins", "b ends"] * 2
    assert {name: len(values) for name, values in rates.items()} == {"a": 2, "b": 2}
    assert min(rates["a"] + rates["b"]) > 0
    length, *told = told
    assert length.startswith("3 loaders x 2 rounds x 0.01 s: about 0.0 minutes")
    assert [line.partition(":")[0] for line in told] == ["left out", "a", "b", "a", "b"]
    assert told[0] == "left out: broken failed (its file is gone)"
    with pytest.raises(OSError, match="gone"):
        take_turns(turns("ours", "broken"), rounds=1, seconds=0.01)
    # Without time, ours are measured once, and peers are left out by name.
    late = take_turns(contenders, rounds=9, seconds=0.01, report=told.append, until=0.0)
    assert {name: len(values) for name, values in late.items()} == {"a": 1, "b": 1}
    assert told[-3] == "left out: broken (no time left)"


def test_a_rate_is_images_over_the_time_after_the_warm_up(monkeypatch):
    clock = iter([float(second) for second in range(100)])
    monkeypatch.setattr(contest.time, "perf_counter", lambda: next(clock))
    # One second a batch: 4 batches to warm up, then 5 measured ones.
    sizes = iter([1000] * 4 + [10] * 5)
    assert rate((size for size in sizes), seconds=5) == 10
    # A turn ends before a batch that would read an image twice.
    assert rate((size for size in [30] * 7), seconds=100, most=30 * 7 + 29) == 30


def bench(images: SampleIndex, *options: object) -> int:
    """The command on a few small views, in one short round."""
    settings = {"device": "cpu", "size": 32, "batch-size": 4, "workers": 1, "rounds": 1, "seconds": 0.05}
    words = [f"--{name}={value}" for name, value in settings.items()]
    return cli.main(["bench", images.root, *words, *map(str, options)])


def lines_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_figures_carry_their_configuration_into_the_file_and_back(small_index, tmp_path, capsys):
    assert bench(small_index, "--only", "guided", "--csv", tmp_path / "run.csv") == 0
    lines = lines_of(tmp_path / "run.csv")
    shown = capsys.readouterr().out
    names = ["torchvision PIL", "decode only", "dali_views, guided", "plan of a guided batch"]
    assert [line["name"] for line in lines] == names
    for line in lines:
        assert float(line["value"]) > 0
        assert not line["rounds"] or float(line["rounds"]) == pytest.approx(float(line["value"]), rel=0.01)
        assert (line["recipe"], line["batch_size"], line["cache"]) == ("moco_v2", "4", "warm")
        assert "DALI" in line["machine"]
        assert line["name"] in shown
    assert float(lines[-1]["value"]) < 1
    assert (lines[0]["ratio"], lines[1]["of_limit"]) == ("1.0", "1.0")


def test_a_cold_turn_reads_no_file_twice(small_index, capsys, tmp_path):
    # An exact name is that loader alone, and not all whose names it is a part of.
    options = ["--cold", "--only", "dali_views", "--csv", tmp_path / "run.csv", "--seconds", "60"]
    assert bench(small_index, *options) == 2
    assert "lower --batch-size" in capsys.readouterr().err
    # It ends with its images, warm-up included, long before its minute is over.
    assert bench(small_index, *options, "--batch-size", "1") == 0
    assert [line["cache"] for line in lines_of(tmp_path / "run.csv")] == ["cold"] * 3


@pytest.mark.slow
def test_training_costs_are_shares_of_a_step(setup):
    rows = costs.training(replace(setup, batch_size=4), "resnet18", 1, 0.1, str)
    figures = {row.name.removeprefix("resnet18: "): row for row in rows}
    speeds, shares = ["model alone", "loader alone", "both"], ["host waiting for a batch", "updating rows"]
    assert list(figures) == [*speeds, *shares, "lost to loading"]
    assert min(figures[name].value for name in speeds) > 0
    assert all(0 < figures[name].value < 1 for name in shares)
    with pytest.raises(ValueError, match="two views"):
        costs.training(replace(setup, views=recipes.evaluation(32)), "resnet18", 1, 0.1, str)


@pytest.mark.slow
def test_the_published_recipe_trains_on_our_loader_and_on_that_of_peers(setup):
    rows = costs.training(replace(setup, batch_size=4), published.NAME, 1, 0.1, str)
    figures = {row.name.removeprefix(f"{published.NAME}: "): row for row in rows}
    peers = ["torchvision in workers"] + ["Kornia on the device"] * (find_spec("kornia") is not None)
    assert list(figures)[:3] == ["model alone", "loader alone", "both"]
    assert list(figures)[3:-3] == peers
    assert all("published" in figures[name].note and figures[name].value > 0 for name in peers)
    first, second = torch.randn(2, 64, 8)
    # Equal embeddings without correlations between their parts cost next to nothing.
    whitened = torch.linalg.svd(first - first.mean(0), full_matrices=False)[0]
    assert published.loss(whitened, whitened) < 0.01 < 1 < published.loss(first, second)


@pytest.mark.slow
def test_memory_is_read_in_a_process_of_its_own(setup):
    before = multiprocessing.active_children()
    imported, peak, host, _ = costs.in_new_process(setup, 20)
    assert multiprocessing.active_children() == before
    assert peak >= max(host) > imported > 0
    assert len(host) == 20
    rows = costs.memory(setup, 20, [4], str)
    names = {row.name.partition(": ")[2] for row in rows}
    assert names == {"peak on the host", "of it the loader's", "growth on the host"}


def test_growth_tells_a_leak_from_a_level_that_is_reached_once():
    level = [100.0, 300.0] + [310.0, 305.0] * 10
    leak = [100.0 + 5.0 * number for number in range(20)]
    assert costs.growth(level) == 0
    assert costs.growth(leak) >= 40


def test_decoding_gives_the_same_pixels_while_the_machine_is_busy(setup, device):
    setup = replace(setup, device=device)
    assert len(set(pixels.checksums(setup, setup.index, 0.0))) == len(setup.index)
    rows = pixels.decoder(setup, passes=2, report=str)
    assert [row.value for row in rows] == [0] * (2 if device == "gpu" else 1)


def test_pixels_depend_neither_on_the_batch_nor_on_its_size(setup, device):
    rows = pixels.pixels(replace(setup, device=device), str)
    assert {row.measure for row in rows} == {"of 40"}
    assert [row.value for row in rows if "depend" in row.name] == [0] * (6 if device == "gpu" else 2)


def test_places_of_one_name_are_all_measured(small_index, tmp_path, capsys):
    for other in ("one", "two"):
        shutil.copytree(small_index.root, tmp_path / other / "photos")
    first, second = (str(tmp_path / other / "photos") for other in ("one", "two"))
    assert bench(replace(small_index, root=first), "--source", second, "--source", f"{first}/") == 0
    told = capsys.readouterr().out
    assert all(f"\n{place} " in told for place in ("photos", first, second))


def needs(name: str) -> None:
    """Skips where a peer cannot run."""
    for module in peers.NEEDS.get(name, ()):
        pytest.importorskip(module)
    if name.startswith("SPDL"):
        try:
            pytest.importorskip("spdl.io").utils.get_ffmpeg_versions()
        except RuntimeError:
            pytest.skip("SPDL finds no FFmpeg")


def check(views, tensors) -> None:
    """Normalised float32 of the views' sizes, neither empty nor constant."""
    for view, tensor in zip(views, tensors, strict=True):
        assert tensor.shape[-3:] == (3, view.size, view.size)
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert -2.2 < tensor.min() < tensor.max() < 2.7


@pytest.mark.slow
@pytest.mark.parametrize("number", range(11))
def test_batches_arrive_and_nothing_stays(number, setup):
    contender = peers.contenders(setup)[number]
    needs(contender.name)
    children, threads = multiprocessing.active_children(), set(threading.enumerate())
    batches = contender.start()
    assert list(islice(batches, 3)) == [8, 8, 8]
    batches.close()
    assert multiprocessing.active_children() == children
    for _ in range(100):  # threads may need a moment to see that they are closed
        if set(threading.enumerate()) <= threads:
            break
        time.sleep(0.05)
    assert set(threading.enumerate()) <= threads
    assert (contender.kind, contender.views) == ("peer", 0 if contender.name == peers.DECODE else 2)


def test_an_absent_peer_gives_a_line_and_plain_views_are_compared_with_the_baseline_alone(setup, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    lines: list[str] = []
    assert peers.installed(setup, lines.append)[0].name == peers.BASE
    assert [name in line for name, line in zip(peers.NEEDS, lines, strict=True)] == [True] * 7
    (only,) = peers.installed(replace(setup, views=PLAIN), lines.append)
    assert (only.name, len(lines)) == (peers.BASE, 8)
    for views in (recipes.byol(32), MULTI_CROP, recipes.moco_v2(32, scale=(0.2, 0.5))):
        assert not [p for p in peers.contenders(replace(setup, views=views)) if "lightly" in p.name]


@pytest.mark.parametrize("views", [recipes.moco_v2(32), MULTI_CROP], ids=["moco_v2", "dino"])
def test_peers_make_the_views(views, setup, device):
    setup = replace(setup, views=views, device=device)
    for peer in peers.installed(setup, str):
        if peer.start.func is dl.batches and "lightly" not in peer.name:
            _, opened, transform = peer.start.args
            dataset = dl.Views(setup, opened, [transform(view) for view in views])
            dataset = pickle.loads(pickle.dumps(dataset))  # as on its way to a worker
            for row in range(0, 40, 7):
                check(views, dataset[row])
    if find_spec("kornia") is not None:
        images = [torch.randint(256, (4, 3, view.size, view.size), dtype=torch.uint8) for view in views]
        where = "cuda" if device == "gpu" else "cpu"
        first, second, *_ = gpu_peers.kornia_views(setup, cropped=True)([each.to(where) for each in images])
        check(views[:2], [first.cpu(), second.cpu()])
        assert not torch.equal(first, second)
    graph = peers.solo_learn_graph(setup)
    outputs = [np.stack([np.asarray(image) for image in part.as_cpu()]) for part in graph.run()]
    check(views, [torch.from_numpy(output) for output in outputs])
    assert not np.allclose(outputs[0], outputs[1])


def test_boxes_hold_the_centres_of_contrastive_crops(monkeypatch):
    image, box = Image.new("RGB", (400, 300)), (0.3, 0.3, 0.7, 0.7)
    taken: list[tuple[int, ...]] = []
    monkeypatch.setattr(dl.v2.functional, "resized_crop", lambda image, *where: taken.append(where[:4]))
    random.seed(0)
    view = View(size=8, crop="contrastive", scale=(0.02, 0.2), alpha=0.1)
    for _ in range(300):
        dl.boxed_crop(view, image, box)
    top, left, h, w = np.array(taken).T
    for start, part, whole in ((top, h, 300), (left, w, 400)):
        centre = start + part // 2
        assert ((start >= 0) & (start + part <= whole)).all()
        assert ((centre >= int(0.3 * whole)) | (start + part == whole)).all()
        assert ((centre <= int(0.7 * whole)) | (start == 0)).all()
