"""Unreadable images: each costs itself, is named, is replaced by rule, on every rank and after a resume."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recorded
import torch
from by_hand import finish, start
from conftest import noise_images
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from runs import write_config
from test_loader import rows_of

from dali_views import BadImageError, RegionTable, SampleIndex, View, ViewLoader, bad_list, recipes
from dali_views.graph import decode
from dali_views.plan import order
from dali_views.plan.epoch import Epoch
from dali_views.tools import cli
from dali_views.tools.scenes import make_scenes
from trainers.config import file as config_file
from trainers.encoders.backbones import build_backbone
from trainers.engine import checkpoint, ranks
from trainers.engine.setting import join
from trainers.guides.encoder_maps import EncoderMaps
from trainers.pretrain import pretrain

VIEWS = [View(size=8), View(size=8)]
CUT, GONE = "0007.jpg", "0019.jpg"
MANY = 2000

# Each image left out causes a warning; the tests that are about these record them anew.
pytestmark = pytest.mark.filterwarnings("ignore:Left out while running")


def bad_folder(folder: Path) -> SampleIndex:
    """Thirty images, two of which break after they were indexed."""
    noise_images(folder, 30)
    index = SampleIndex.from_folder(folder, cache=False, progress=False)
    good = (folder / CUT).read_bytes()
    (folder / CUT).write_bytes(good[: len(good) // 3])
    (folder / GONE).unlink()
    return index


def names(paths: Iterable[str]) -> set[str]:
    return {Path(path).name for path in paths}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two thousand good images, to be copied before they are broken."""
    return noise_images(tmp_path_factory.mktemp("many"), MANY, sizes=(16, 32))


def break_in_seven_ways(folder: Path) -> set[str]:
    """Break 1 % of the images in a folder; the names of those that nobody could decode any more."""
    files = sorted(folder.iterdir())[:: MANY // 20]
    assert len(files) == 20
    undecodable = set()
    for number, file in enumerate(files):
        content, way = file.read_bytes(), number % 7
        if way == 0:
            file.write_bytes(b"")
        elif way == 1:
            file.write_bytes(content[: len(content) // 3])
        elif way == 2:  # a bit of the compressed pixels, which decoders forgive with a stain
            middle = len(content) * 2 // 3
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            Image.open(file).load()
            continue
        elif way == 3:
            file.write_text("this is no image\n")
        elif way == 4:  # a wrong extension, which does not matter
            Image.open(file).save(file, format="PNG")
            continue
        elif way == 5:
            file.unlink()
        else:  # 65,500 x 65,500 pixels, says the header
            start = content.index(b"\xff\xc0") + 5
            file.write_bytes(content[:start] + struct.pack(">HH", 65_500, 65_500) + content[start + 4 :])
        undecodable.add(file.name)
    return undecodable


def epoch_as_expected(loader: ViewLoader, rows: list[int], bad: set[str]) -> None:
    """Every good image of the epoch in its place exactly once, and for each bad one a good one by rule."""
    index = loader.index
    planned = order.rows(np.arange(len(index)), len(index), loader.seed, loader.epoch)
    is_bad = {row for row in range(len(index)) if Path(index.path(row)).name in bad}
    for row, place in zip(rows, planned.tolist(), strict=True):
        assert row == place or (place in is_bad and row not in is_bad)
    # Known from the start, they are replaced by the same images as found one by one.
    known = replace(index, quarantine={index.path(row): "known" for row in is_bad})
    informed = ViewLoader(known, VIEWS, len(index), device="cpu", seed=loader.seed, max_bad_share=1.0)
    informed.set_epoch(loader.epoch)
    assert rows == informed.plan_at(0).index.tolist()


def test_a_run_over_images_broken_in_seven_ways_loses_exactly_those_that_cannot_be_decoded(
    many, tmp_path, device
):
    folder = Path(shutil.copytree(many, tmp_path / "images"))
    index = SampleIndex.from_folder(folder, cache=False, progress=False)
    bad = break_in_seven_ways(folder)
    assert len(bad) == 14
    loader = ViewLoader(index, VIEWS, 50, device=device, threads=4)
    for epoch in range(2):
        loader.set_epoch(epoch)
        epoch_as_expected(loader, rows_of(loader), bad)
        assert names(loader.index.quarantine) == bad
        assert loader.stats.bad_images == len(bad)
    assert all("pixels" in index.quarantine[str(folder / name)] for name in ("0600.jpg", "1300.jpg"))


@pytest.mark.parametrize("factor", [0.1, 0.6, 2.0])
def test_images_of_another_size_than_indexed_are_replaced_and_nothing_is_read_beside_them(
    tmp_path, device, factor
):
    index = SampleIndex.from_folder(noise_images(tmp_path / "images", 40), cache=False, progress=False)
    changed = set()
    for row in range(0, 40, 13):
        path = Path(index.path(row))
        image = Image.open(path)
        image.resize([round(side * factor) for side in image.size]).save(path)
        changed.add(path.name)
    loader = ViewLoader(index, recipes.moco_v2(32), 8, device=device)
    epoch_as_expected(loader, rows_of(loader), changed)
    assert names(index.quarantine) == changed
    assert all("pixels, and indexed as" in reason for reason in index.quarantine.values())


def damage_a_png(file: Path) -> None:
    """Zeros among its pixels; header and end stay in order, so that only decoding tells."""
    Image.open(file).resize((40, 40)).save(file, format="PNG")
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(1000) + content[1100:])


def read_on_one_rank(rank: int, meeting: str) -> int:
    ranks.init("cpu")
    index = SampleIndex.load(f"{meeting}/index.safetensors")
    loader = ViewLoader(index, VIEWS, 25, device="cpu", threads=1)
    batches = [batch.index.tolist() for batch in loader]
    own = sorted(index.quarantine)
    loader.sync()
    torch.save({"batches": batches, "own": own, "all": sorted(index.quarantine)}, f"{meeting}/{rank}.pt")
    loader.max_bad_share = 0.005
    with pytest.raises(BadImageError, match=f"14 of {MANY} images cannot be read"):
        loader.sync()
    ranks.cleanup()
    return 0


def test_two_ranks_stay_in_step_and_share_what_they_find(many, tmp_path):
    folder = Path(shutil.copytree(many, tmp_path / "images"))
    index = SampleIndex.from_folder(folder, cache=False, progress=False)
    index.save(tmp_path / "index.safetensors")
    bad = break_in_seven_ways(folder)
    processes = start(2, tmp_path, read_on_one_rank, lambda rank: (rank, str(tmp_path)))
    assert finish(processes) == [0, 0], (tmp_path / "0.log").read_text()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    steps = zip(*(each["batches"] for each in found), strict=True)
    whole = ViewLoader(index, VIEWS, 50, device="cpu")
    epoch_as_expected(whole, [row for step in steps for part in step for row in part], bad)
    own = [names(each["own"]) for each in found]
    assert own[0] | own[1] == bad
    assert own[0] != bad != own[1]
    assert [names(each["all"]) for each in found] == [bad, bad]


def test_an_image_that_cannot_be_read_costs_that_image_and_is_named_once_for_all_loaders(tmp_path, device):
    index = bad_folder(tmp_path)
    loader = ViewLoader(index, VIEWS, 5, device=device)
    for epoch in range(2):
        loader.set_epoch(epoch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = rows_of(loader)
        named = " ".join(str(w.message) for w in caught)
        assert (CUT in named) == (GONE in named) == (epoch == 0)
        assert set(range(30)) - set(rows) == {7, 19}
    assert "truncated" in loader.index.quarantine[str(tmp_path / CUT)]
    assert loader.index.quarantine[str(tmp_path / GONE)] == "no such file"
    part = ViewLoader(index.subset(np.arange(5, 25)), VIEWS, 5, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(range(20)) - set(rows_of(part)) == {2, 14}
    assert part.stats.bad_images == 2


def test_the_substitute_is_the_same_after_a_resume_and_for_any_batch_size(tmp_path):
    index = bad_folder(tmp_path)
    loader, other, resumed = (
        ViewLoader(replace(index, quarantine={}), VIEWS, size, device="cpu") for size in (10, 5, 10)
    )
    rows = rows_of(loader)
    assert rows_of(other) == rows
    resumed.load_state_dict({**loader.state_dict(), "position": 0})
    with pytest.raises(ValueError, match="a key of unreadable = 30, not an integer from 0 to 29"):
        resumed.load_state_dict({**loader.state_dict(), "unreadable": {30: "of another set"}})
    assert resumed.stats.bad_images == 2
    assert resumed.index.quarantine == loader.index.quarantine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows_of(resumed) == rows


def test_a_partner_that_cannot_be_read_is_replaced_by_the_sample_itself(tmp_path):
    index = bad_folder(tmp_path)
    regions = RegionTable(30)
    regions.update(np.arange(30), partner=np.full(30, 7))
    loader = ViewLoader(index, [View(size=8), View(size=8, partner=True)], 5, regions=regions, device="cpu")
    for batch in loader:
        assert torch.equal(batch.partner, batch.index)
    assert names(loader.index.quarantine) == {CUT, GONE}


def test_raise_ends_with_the_name_the_reason_and_the_remedy_however_the_file_became_known(tmp_path):
    index = bad_folder(tmp_path)
    strict = ViewLoader(replace(index, quarantine={}), VIEWS, 5, device="cpu", on_bad_image="raise")
    lenient = ViewLoader(index, VIEWS, 5, device="cpu")
    rows_of(lenient)
    told_of = ViewLoader(index, VIEWS, 5, device="cpu", on_bad_image="raise", max_bad_share=0)
    resumed = ViewLoader(replace(index, quarantine={}), VIEWS, 5, device="cpu", on_bad_image="raise")
    resumed.load_state_dict({**lenient.state_dict(), "position": 0})
    for loader in (strict, strict, told_of, resumed):
        with pytest.raises(BadImageError, match=r"(0007\.jpg: truncated|0019\.jpg: no such).*on_bad_image"):
            rows_of(loader)


def test_a_file_that_was_fixed_is_used_again_after_a_resume_or_when_its_entry_is_removed(tmp_path):
    index = bad_folder(tmp_path)

    def fix(row: int) -> None:
        height, width = index.sizes[row].tolist()
        Image.new("RGB", (width, height)).save(index.path(row), "JPEG")

    loader = ViewLoader(index, VIEWS, 5, device="cpu")
    rows_of(loader)
    state = {**loader.state_dict(), "position": 0}
    fix(7)
    resumed = ViewLoader(replace(index, quarantine={}), VIEWS, 5, device="cpu")
    resumed.load_state_dict(state)
    assert set(range(30)) - set(rows_of(resumed)) == {19}
    assert resumed.stats.bad_images == 1
    fix(19)
    index.quarantine.clear()
    assert loader.state_dict()["unreadable"] == {}
    assert sorted(rows_of(loader)) == list(range(30))


@pytest.mark.slow
def test_a_run_goes_on_with_its_samples_on_two_processes_although_files_break_vanish_and_come(tmp_path):
    folder, bad = noise_images(tmp_path / "images", 200), {"0000.jpg", "0033.jpg", "0155.jpg"}
    file = write_config(
        tmp_path, {"kind": "folder", "path": str(folder)}, run={"epochs": 2, "evaluate_every": 1},
        guide={"name": "none"}, views={"size": 8}, optim={"name": "sgd", "lr": 0.1, "batch": 40},
    )  # fmt: skip
    assert pretrain(config_file.load(file, ["run.max_steps=2"])).step == 2
    shutil.copy(folder / "0001.jpg", folder / "new.jpg")
    (folder / "0000.jpg").unlink()  # is among those whose picture is taken
    for name in ("0033.jpg", "0155.jpg"):
        damage_a_png(folder / name)
    arguments = (tmp_path, "never", "pretrain", str(file), "--resume")
    processes = start(2, tmp_path, recorded.main, lambda rank: arguments)
    assert finish(processes) == [0, 0], (tmp_path / "0.log").read_text()
    assert names(bad_list.load(tmp_path / "run" / "quarantine.txt")) == bad
    state = checkpoint.load(tmp_path / "run")
    assert state["loader"]["unreadable"].keys() == {0, 33, 155}
    assert len(state["regions"]["partner"]) == 200
    lines = [json.loads(line) for line in recorded.batches(tmp_path)]
    assert {row for step, row, *_ in lines if step > 5} == set(range(200)) - {0, 33, 155}


def test_where_the_object_is_in_an_image_that_cannot_be_read_is_not_known(tmp_path):
    images, instances = make_scenes(tmp_path, 12, size=48)
    index = SampleIndex.from_coco(images, instances, cache=False, progress=False)
    Path(index.path(7)).unlink()
    data = {"kind": "coco", "path": str(images), "instances": str(instances)}
    config = config_file.load(write_config(tmp_path, data, localise={"size": 96}))
    encoder, asked = build_backbone("resnet10"), EncoderMaps(join(config), config.views, config.localise)
    boxes, maps = asked.boxes(encoder, index, "activation", [0.5]), asked.whole(encoder, index, "activation")
    assert boxes[0, 7].tolist() == [0, 0, 1, 1]
    assert (maps[7] == 1).all()
    assert ((maps[np.arange(12) != 7] < 1).flatten(1).any(1)).all()


def test_more_bad_images_than_the_limit_end_with_their_list(tmp_path):
    index = bad_folder(tmp_path)
    assert len(rows_of(ViewLoader(index, VIEWS, 5, device="cpu", max_bad_share=2 / 30))) == 30
    for known in ({}, index.quarantine):
        part = replace(index, quarantine=known)
        with pytest.raises(BadImageError, match=r"2 of 30 .*share 0\.05.*\n.*0007\.jpg.*\n.*0019\.jpg"):
            rows_of(ViewLoader(part, VIEWS, 5, device="cpu", max_bad_share=0.05))
    none = SampleIndex.from_folder(noise_images(tmp_path, 4), cache=False, progress=False).subset(
        np.arange(4)
    )
    for row in range(4):
        Path(none.path(row)).write_bytes(b"")
    with pytest.raises(BadImageError, match="4 of 4 images cannot be read; fix the files:"):
        rows_of(ViewLoader(none, VIEWS, 2, device="cpu", max_bad_share=1))


def test_a_folder_that_is_gone_is_no_fault_of_its_files(tmp_path):
    folder = noise_images(tmp_path / "images", 30)
    loader = ViewLoader(SampleIndex.from_folder(folder, cache=False, progress=False), VIEWS, 5, device="cpu")
    batches = iter(loader)
    next(batches)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(BadImageError, match="is gone, for example unmounted"):
        list(batches)
    assert not loader.index.quarantine
    (tmp_path / "elsewhere").rename(folder)
    assert sorted(rows_of(loader)) == list(range(30))


def test_a_failure_that_has_passed_when_it_is_looked_into_costs_nothing(tmp_path):
    index = SampleIndex.from_folder(noise_images(tmp_path, 30), cache=False, progress=False)
    file = Path(index.path(11))
    content = file.read_bytes()
    file.unlink()
    loader = ViewLoader(index, VIEWS, 5, device="cpu")
    search = loader._quarantine.search

    def after_the_network_is_back(rows: np.ndarray) -> dict[int, str]:
        file.write_bytes(content)
        return search(rows)

    loader._quarantine.search = after_the_network_is_back  # type: ignore[method-assign]
    assert sorted(rows_of(loader)) == list(range(30))
    assert not loader.index.quarantine


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("Can't allocate 536870912 bytes on device 0.", "bytes on device"),
        ("nvImageCodec failure: '#6'", "refuses even a sound image .*#6"),
    ],
)
def test_what_fails_for_all_images_is_no_fault_of_those_of_the_batch(tmp_path, monkeypatch, words, told):
    """The decoder is a real graph whose source always fails with these words."""

    def source() -> list[np.ndarray]:
        raise RuntimeError(words)

    def decoder(*_: object) -> SimpleNamespace:
        graph = Pipeline(1, 1, None, prefetch_queue_depth=1)
        with graph:
            graph.set_outputs(fn.external_source(source, dtype=types.UINT8, ndim=1))
        graph.build()
        return SimpleNamespace(run=lambda images: graph.run())

    index = bad_folder(tmp_path / "images")
    monkeypatch.setattr(decode, "decoder", decoder)
    with pytest.raises(RuntimeError, match=told):
        rows_of(ViewLoader(index, VIEWS, 5, device="cpu"))
    assert names(index.quarantine) <= {GONE}  # which is not there, whatever the decoder says
    with pytest.raises(RuntimeError, match=told):
        ViewLoader(index, VIEWS, 5, device="cpu")._quarantine.search(np.arange(5))


def test_check_finds_beforehand_what_a_run_would_find_and_its_list_is_respected(tmp_path, capsys):
    folder, listed = noise_images(tmp_path / "images", 30), tmp_path / "bad.txt"
    damage_a_png(folder / CUT)
    (folder / GONE).write_bytes(b"")

    def check(*words: str) -> tuple[int, str]:
        code = cli.main(["check", str(folder), "--out", str(listed), "--device", "cpu", *words])
        return code, capsys.readouterr().out

    code, told = check("--batch-size", "8")
    assert code == 1
    assert f"{CUT}: the decoder refuses it" in told
    assert names(bad_list.load(listed)) == {CUT, GONE}
    assert all(bad_list.load(listed).values())
    index = SampleIndex.from_folder(folder, cache=False, progress=False).without(listed)
    assert names(path for path, _ in index.left_out) == {CUT, GONE}
    loader = ViewLoader(index, VIEWS, 4, device="cpu", on_bad_image="raise")
    assert sorted(rows_of(loader)) == list(range(28))
    assert cli.main(["index", str(folder), "--leave-out", str(listed)]) == 0
    assert "28 images" in capsys.readouterr().out
    code, told = check("--leave-out", str(listed))
    assert (code, "28 images decoded, 0 not, 2 left out" in told) == (1, True)
    (folder / CUT).unlink(), (folder / GONE).unlink()
    code, told = check()  # replaces the list of the earlier check
    assert (code, "28 images decoded, 0 not" in told, bad_list.load(listed)) == (0, True, {})


def test_a_list_may_name_files_in_full_or_relatively_and_files_that_are_gone(tmp_path):
    index = bad_folder(tmp_path / "images")
    listed = tmp_path / "bad.txt"
    listed.write_text(f"# by hand\n\n{tmp_path}/images/0003.jpg\tblurred\n0004.jpg\nnever/was.jpg\tgone\n")
    assert dict(index.without(listed).left_out) == {
        "0003.jpg": "blurred",
        "0004.jpg": "on the list of files to leave out",
    }
    listed.write_text("never/was.jpg\n")
    with pytest.warns(UserWarning, match="None of the files"):
        assert index.without(listed) is index
    listed.write_text("".join(f"{number:04d}.jpg\n" for number in range(30)))
    with pytest.raises(ValueError, match="names every image"):
        index.without(listed)


def test_substitutes_are_spread_over_the_data_set():
    bad = np.arange(1000) < 500
    epoch = Epoch(
        [View(size=8)], np.full((1000, 2), 8, np.int32), seed=0, epoch=0, shuffle=False, global_batch=500,
        rank=0, world=1, readable=lambda rows: ~bad[rows], snapshot=None,
    )  # fmt: skip
    counts = Counter(epoch.plan(0).index.tolist())
    assert min(counts) >= 500
    assert max(counts.values()) <= 8  # 500 draws of 500: the most frequent comes 5 or 6 times
