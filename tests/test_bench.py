"""The bench: fair turns, figures with their configuration, costs of training and memory, honest peers."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import shutil
import threading
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dali_views import SampleIndex, View, recipes
from dali_views.tools import cli
from dali_views.tools.bench import checks, contest, peers, training
from dali_views.tools.bench.contest import Batches, Contender, Setup, rate, take_turns
from dali_views.tools.bench.peers import dataloaders, solo_learn, spdl

PLAIN = [View(size=24, crop="whole"), View(size=28, crop="centre", centre_share=0.8, interpolation="cubic")]
MULTI_CROP = recipes.dino(32, local_size=16, locals=2)


@pytest.fixture
def setup(small_index: SampleIndex) -> Setup:
    return Setup(small_index, recipes.moco_v2(32), batch_size=8, device="cpu", workers=1)


def contender(name: str, batches, kind: str = "ours") -> Contender:
    return Contender(name, kind, "cpu", batches, 2)


def test_contenders_take_turns_and_exist_only_during_their_own():
    log: list[str] = []

    def batches(name: str) -> Batches:
        log.append(f"{name} begins")
        try:
            while True:
                yield 8
        finally:
            log.append(f"{name} ends")

    rates = take_turns([contender(n, lambda n=n: batches(n)) for n in "ab"], rounds=3, seconds=0.01)
    assert log == ["a begins", "a ends", "b begins", "b ends"] * 3
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}
    assert min(rates["a"] + rates["b"]) > 0


def test_a_rate_is_images_over_the_time_after_the_warm_up(monkeypatch):
    clock = iter([float(second) for second in range(100)])
    monkeypatch.setattr(contest.time, "perf_counter", lambda: next(clock))
    # One second a batch: 4 batches to warm up, then 5 measured ones.
    sizes = iter([1000] * 4 + [10] * 5)
    assert rate((size for size in sizes), seconds=5) == 10
    # A turn ends before a batch that would read an image twice.
    assert rate((size for size in [30] * 7), seconds=100, most=30 * 7 + 29) == 30


def test_a_peer_that_fails_leaves_the_comparison_and_is_named():
    def broken() -> Batches:
        yield 8
        raise OSError("its file is gone")

    def sound() -> Batches:
        while True:
            yield 8

    told: list[str] = []
    turns = [contender("theirs", broken, "peer"), contender("ours", sound)]
    rates = take_turns(turns, rounds=2, seconds=0.01, report=told.append)
    assert list(rates) == ["ours"]
    assert told == ["left out: theirs failed (its file is gone)"]
    with pytest.raises(OSError, match="gone"):
        take_turns([contender("ours", broken)], rounds=1, seconds=0.01)


def bench(images: SampleIndex, *options: object) -> int:
    """The command on a few small views, in one short round."""
    settings = {"device": "cpu", "size": 32, "batch-size": 4, "workers": 1, "rounds": 1, "seconds": 0.05}
    words = [f"--{name}={value}" for name, value in settings.items()]
    return cli.main(["bench", images.root, *words, *map(str, options)])


def test_figures_carry_their_configuration_into_the_file_and_back(small_index, tmp_path, capsys):
    assert bench(small_index, "--only", "guided", "--csv", tmp_path / "run.csv") == 0
    lines = contest.read_csv(tmp_path / "run.csv")
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
    options = ["--cold", "--only", "read only", "--csv", tmp_path / "run.csv", "--seconds", "60"]
    assert bench(small_index, *options) == 2
    assert "lower --batch-size" in capsys.readouterr().err
    # It ends with its images, warm-up included, long before its minute is over.
    assert bench(small_index, *options, "--batch-size", "1") == 0
    assert [line["cache"] for line in contest.read_csv(tmp_path / "run.csv")] == ["cold"] * 3


@pytest.mark.slow
def test_training_costs_are_shares_of_a_step(setup):
    rows = training.measure(replace(setup, batch_size=4), "resnet18", 1, 0.1, str)
    figures = {row.name.removeprefix("resnet18: "): row for row in rows}
    assert {"model alone", "loader alone", "both", "localisation pass", "updating rows"} <= set(figures)
    for row in rows:
        assert row.value > 0 if row.measure == "images/s" else row.value < 1
    assert 0 < figures["updating rows"].value < figures["boxes off maps"].value


def test_training_on_a_single_view_is_refused(setup):
    with pytest.raises(ValueError, match="two views"):
        training.measure(replace(setup, views=recipes.evaluation(32)), "resnet18", 1, 0.1, str)


@pytest.mark.slow
def test_memory_is_read_in_a_process_of_its_own(setup):
    before = multiprocessing.active_children()
    imported, peak, host, _ = checks.in_new_process(setup, 20)
    assert multiprocessing.active_children() == before
    assert peak >= max(host) > imported > 0
    assert len(host) == 20
    rows = checks.memory(setup, 20, [4], str)
    names = {row.name.partition(": ")[2] for row in rows}
    assert names == {"peak on the host", "of it the loader's", "growth on the host"}


def test_growth_tells_a_leak_from_a_level_that_is_reached_once():
    level = [100.0, 300.0] + [310.0, 305.0] * 10
    leak = [100.0 + 5.0 * number for number in range(20)]
    assert checks.growth(level) == 0
    assert checks.growth(leak) >= 40


def test_decoding_gives_the_same_pixels_while_the_machine_is_busy(setup, device):
    setup = replace(setup, device=device)
    assert len(set(checks.checksums(setup, setup.index, 0.0))) == len(setup.index)
    rows = checks.decoder(setup, passes=2, report=str)
    assert [row.value for row in rows if "busy" in row.name] == [0] * (2 if device == "gpu" else 1)


def test_places_of_one_name_are_all_measured(small_index, tmp_path, capsys):
    for other in ("one", "two"):
        shutil.copytree(small_index.root, tmp_path / other / "photos")
    first, second = (str(tmp_path / other / "photos") for other in ("one", "two"))
    assert bench(replace(small_index, root=first), "--source", second, "--source", f"{first}/") == 0
    told = capsys.readouterr().out
    assert all(f"\n{place} " in told for place in ("photos", first, second))


def needs(name: str) -> None:
    """Skips where a peer cannot run."""
    for module in peers.PEERS[name][1]:
        pytest.importorskip(module)
    if name == "spdl":
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


def ended(threads: set[threading.Thread]) -> bool:
    """Whether no other thread is left, but for those that need a moment to see that they are closed."""
    for _ in range(100):
        if set(threading.enumerate()) <= threads:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_batches_arrive_and_nothing_stays(name, setup):
    needs(name)
    for contender in peers.PEERS[name][0](setup):
        children, threads = multiprocessing.active_children(), set(threading.enumerate())
        batches = contender.start()
        assert list(islice(batches, 3)) == [8, 8, 8]
        batches.close()
        assert multiprocessing.active_children() == children
        assert ended(threads)
        assert (contender.kind, contender.views) == ("peer", 2)


def test_an_absent_peer_gives_a_line(setup, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    lines: list[str] = []
    assert peers.installed(setup, lines.append)[0].name == peers.BASE
    absent = [name for name, (_, modules) in peers.PEERS.items() if modules]
    assert [line.split()[2] for line in lines] == absent


def test_views_that_are_not_cropped_at_random_are_compared_with_the_baseline_alone(setup):
    lines: list[str] = []
    (only,) = peers.installed(replace(setup, views=PLAIN), lines.append)
    assert (only.name, len(lines)) == (peers.BASE, 1)
    for views in (recipes.byol(32), MULTI_CROP, recipes.moco_v2(32, scale=(0.2, 0.5))):
        assert dataloaders.lightly(replace(setup, views=views)) == []


@pytest.mark.parametrize("views", [recipes.moco_v2(32), MULTI_CROP], ids=["moco_v2", "dino"])
@pytest.mark.parametrize(
    ("peer", "opened", "transform"),
    [
        ("torchvision", dataloaders.pil_image, dataloaders.pil_view),
        ("torchvision", dataloaders.pil_image, dataloaders.boxed_view),
        ("torchvision", dataloaders.tensor_image, dataloaders.tensor_view),
        ("albumentations", dataloaders.cv2_image, dataloaders.albumented),
    ],
    ids=["pil", "boxed", "tensors", "cv2"],
)
def test_transforms_make_the_views(peer, opened, transform, views, setup):
    needs(peer)
    dataset = dataloaders.Views(setup, opened, [transform(view) for view in views])
    dataset = pickle.loads(pickle.dumps(dataset))  # as on its way to a worker
    for row in range(0, 40, 7):
        check(views, dataset[row])


def test_v2_tensors_and_pil_agree_where_nothing_is_random(setup):
    for view in PLAIN:
        for row in range(5):
            path = setup.index.path(row)
            pil = dataloaders.pil_view(view)(dataloaders.pil_image(path))
            tensor = dataloaders.tensor_view(view)(dataloaders.tensor_image(path))
            assert (pil - tensor).abs().mean() < 0.05


@pytest.mark.parametrize("views", [recipes.moco_v2(32), MULTI_CROP], ids=["moco_v2", "dino"])
def test_solo_learn_makes_the_views(views, setup, device):
    graph = solo_learn.graph(replace(setup, views=views, device=device))
    outputs = [np.stack([np.asarray(image) for image in part.as_cpu()]) for part in graph.run()]
    check(views, [torch.from_numpy(output) for output in outputs])
    assert not np.allclose(outputs[0], outputs[1])


def test_spdl_makes_the_views(setup):
    needs("spdl")
    check(setup.views, spdl.stacked([spdl.views(setup, row) for row in range(8)]))


def test_boxes_hold_the_centres_of_contrastive_crops_and_a_small_alpha_spreads_them(monkeypatch):
    image, box = Image.new("RGB", (400, 300)), (0.3, 0.3, 0.7, 0.7)
    taken: list[tuple[int, ...]] = []
    resized_crop = dataloaders.v2.functional.resized_crop

    def seen(image, top, left, h, w, *rest):
        taken.append((top, left, h, w))
        return resized_crop(image, top, left, h, w, *rest)

    monkeypatch.setattr(dataloaders.v2.functional, "resized_crop", seen)
    random.seed(0)
    spread = {}
    for alpha in (0.1, 1.0, 10.0):
        taken.clear()
        view = View(size=8, crop="contrastive", scale=(0.02, 0.2), alpha=alpha)
        for _ in range(300):
            dataloaders.boxed_crop(view, image, box)
        top, left, h, w = np.array(taken).T
        for start, part, whole in ((top, h, 300), (left, w, 400)):
            assert (start >= 0).all()
            assert (start + part <= whole).all()
            centre = start + part // 2
            assert ((centre >= int(0.3 * whole)) | (start + part == whole)).all()
            assert ((centre <= int(0.7 * whole)) | (start == 0)).all()
        spread[alpha] = np.std((top + h / 2) / 300)
    assert spread[0.1] > 1.2 * spread[1.0] > 1.5 * spread[10.0]


def test_gpu_decoding_uses_the_cpu_for_files_that_it_refuses(small_index, monkeypatch):
    cpu = torch.device("cpu")
    paths = [small_index.path(row) for row in range(3)]
    files = [dataloaders.read_file(path) for path in paths]
    for refuse in (False, True):
        if refuse:
            monkeypatch.setattr(dataloaders, "decode_jpeg", lambda *_: (_ for _ in ()).throw(RuntimeError()))
        images = dataloaders.decoded(files, cpu)
        assert all(map(torch.equal, images, map(dataloaders.tensor_image, paths)))


@pytest.mark.slow
def test_gpu_batches_run_on_any_device(setup):
    threads = set(threading.enumerate())
    batches = dataloaders.gpu_batches(replace(setup, views=MULTI_CROP), torch.device("cpu"))
    assert list(islice(batches, 7)) == [8] * 7
    batches.close()
    assert ended(threads)
