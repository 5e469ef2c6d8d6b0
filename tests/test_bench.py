"""The bench: fair turns, figures with their configuration, costs of training and of memory."""

from __future__ import annotations

import multiprocessing
import shutil

import numpy as np
import pytest

from dali_views import SampleIndex, recipes
from dali_views.tools import bench, cli
from dali_views.tools.bench import decoder, memory, training
from dali_views.tools.bench.contender import Batches, Contender, Setup
from dali_views.tools.bench.turns import rate, take_turns


@pytest.fixture
def setup(small_index: SampleIndex) -> Setup:
    return Setup(small_index, recipes.moco_v2(32), batch_size=4, device="cpu", workers=1)


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
    monkeypatch.setattr("dali_views.tools.bench.turns.time.perf_counter", lambda: next(clock))
    # One second a batch: 4 batches to warm up, then 5 measured ones.
    sizes = iter([1000] * 4 + [10] * 5)
    assert rate((size for size in sizes), seconds=5) == 10
    # A turn also ends with the images it may use.
    assert rate((size for size in [10] * 4 + [30] * 3), seconds=100, most=40 + 90) == 30


def test_a_peer_that_fails_leaves_the_comparison_and_is_named():
    def broken() -> Batches:
        yield 8
        raise OSError("its file is gone")

    def sound() -> Batches:
        while True:
            yield 8

    told: list[str] = []
    turns = [contender("theirs", broken, "peer"), contender("ours", sound)]
    rates = take_turns(turns, rounds=2, seconds=0.01, told=told.append)
    assert list(rates) == ["ours"]
    assert told == ["left out: theirs failed (its file is gone)"]
    with pytest.raises(OSError, match="gone"):
        take_turns([contender("ours", broken)], rounds=1, seconds=0.01)


def test_figures_carry_their_configuration_into_the_file_and_back(small_index, tmp_path):
    rows = bench.run(
        small_index,
        recipes.moco_v2(32),
        batch_size=4,
        device="cpu",
        workers=1,
        rounds=1,
        seconds=0.05,
        only=["guided"],
        recipe="moco_v2",
        told=lambda line: None,
    )
    bench.write_csv(rows, tmp_path / "run.csv")
    lines = bench.read_csv(tmp_path / "run.csv")
    names = ["torchvision PIL", "decode only", "dali_views, guided", "plan of a guided batch"]
    assert [line["name"] for line in lines] == names
    for line, row in zip(lines, rows, strict=True):
        assert float(line["value"]) == row.value > 0
        assert not line["rounds"] or float(line["rounds"]) == pytest.approx(row.value, rel=0.01)
        assert (line["recipe"], line["batch_size"], line["cache"]) == ("moco_v2", "4", "warm")
        assert "DALI" in line["machine"]
        assert row.name in bench.table(rows)
    assert 0 < rows[-1].value < 1
    assert lines[0]["ratio"] == "1.0"
    assert lines[1]["of_limit"] == "1.0"


def test_an_index_without_files_and_an_unknown_part_are_refused(small_index):
    options = {"batch_size": 4, "device": "cpu", "workers": 1}
    with pytest.raises(ValueError, match="loaders, training"):
        bench.run(small_index, recipes.moco_v2(32), parts=["speed"], **options)
    pixels = SampleIndex.from_arrays(np.zeros((8, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="reads files"):
        bench.run(pixels, recipes.moco_v2(32), **options)


def test_a_cold_turn_reads_no_file_twice(small_index):
    options = {
        "parts": ["loaders"],
        "device": "cpu",
        "workers": 1,
        "rounds": 1,
        "seconds": 60.0,
        "cold": True,
    }
    options |= {"only": ["read only"], "told": lambda line: None}
    with pytest.raises(ValueError, match="lower --batch-size"):
        bench.run(small_index, recipes.moco_v2(32), batch_size=4, **options)
    rows = bench.run(small_index, recipes.moco_v2(32), batch_size=1, **options)
    assert [row.setting["cache"] for row in rows] == ["cold"] * 3
    # The turn ends with its images, warm-up included, long before its minute is over.
    taken: list[int] = []

    def counted() -> Batches:
        while True:
            taken.append(1)
            yield 1

    take_turns([contender("ours", counted)], rounds=1, seconds=60, images=40)
    assert len(taken) == 40


def test_training_costs_are_shares_of_a_step(setup):
    rows = training.measure(setup, rounds=1, seconds=0.1, models=["resnet18"])
    figures = {row.name.removeprefix("resnet18: "): row for row in rows}
    assert {"model alone", "loader alone", "both", "localisation pass", "updating rows"} <= set(figures)
    for row in rows:
        if row.measure == "images/s":
            assert row.value > 0
        else:
            assert row.value < 1
    assert 0 < figures["updating rows"].value < figures["boxes off maps"].value


def test_training_on_a_single_view_is_refused(small_index):
    one = Setup(small_index, recipes.evaluation(32), batch_size=4, device="cpu", workers=1)
    with pytest.raises(ValueError, match="two views"):
        training.measure(one, rounds=1, seconds=0.1)


def test_memory_is_read_in_a_process_of_its_own(setup):
    before = multiprocessing.active_children()
    reading = memory.apart(setup, 20)
    assert multiprocessing.active_children() == before
    assert reading.peak_host >= max(reading.host) > reading.imported > 0
    assert len(reading.host) == 20


def test_growth_tells_a_leak_from_a_level_that_is_reached_once():
    level = [100.0, 300.0] + [310.0, 305.0] * 10
    leak = [100.0 + 5.0 * number for number in range(20)]
    assert memory.growth(level) == 0
    assert memory.growth(leak) >= 40


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_decoding_gives_the_same_pixels_while_the_machine_is_busy(small_index, where):
    setup = Setup(small_index, recipes.moco_v2(32), batch_size=16, device=where, workers=2)
    sums = decoder.checksums(setup, small_index, 0.0)
    assert len(set(sums)) == len(small_index)
    rows = decoder.check(setup, passes=2, told=lambda line: None)
    assert [row.value for row in rows if "busy" in row.name] == [0] * (2 if where == "gpu" else 1)


def test_places_of_one_name_are_all_measured(small_index, tmp_path, capsys):
    for other in ("one", "two"):
        shutil.copytree(small_index.root, tmp_path / other / "photos")
    first, second = (str(tmp_path / other / "photos") for other in ("one", "two"))
    settings = {"device": "cpu", "batch-size": 4, "size": 16, "rounds": 1, "seconds": 0.05, "workers": 1}
    options = [f"--{name}={value}" for name, value in settings.items()]
    assert cli.main(["bench", first, "--source", second, "--source", f"{first}/", *options]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{place} " in told for place in ("photos", first, second))
