"""What a run reads: class lists over real folders, archives in torchvision's layout."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise_images
from torchvision.datasets import STL10

from dali_views import RegionTable, SampleIndex
from trainers.config import Config, Data
from trainers.config.file import parse
from trainers.data import evaluation_views, open_data, plain_loader, training_loader
from trainers.engine import ranks
from trainers.engine.setting import join


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with the classes ant, bee and cat."""
    root = tmp_path_factory.mktemp("folders")
    for number, (part, count) in enumerate([("train", 3), ("val", 2)]):
        for seed, name in enumerate(["ant", "bee", "cat"]):
            noise_images(root / part / name, count, seed=10 * number + seed)
    return root


def data_of(folders: Path, classes: str | None = None, **more: Any) -> Data:
    """The training folder; `classes` are the lines of a class list."""
    if classes is not None:
        more["classes"] = str(folders / "classes.txt")
        (folders / "classes.txt").write_text(classes, encoding="utf-8")
    return Data(**{"kind": "folder", "path": str(folders / "train"), **more})


def names_of(index: SampleIndex) -> set[str]:
    return {Path(index.path(i)).parent.name for i in range(len(index))}


def test_the_share_of_the_hardware_decoder_reaches_every_loader_and_the_search_for_bad_files(
    folders: Path,
) -> None:
    index = open_data(data_of(folders)).train
    for given, load in (("", 1.0), ("hw_decoder_load: 0.5, ", 0.5)):
        text = f"run: {{{given}out: x, device: cpu}}\ndata: {{kind: folder, path: x}}\noptim: {{batch: 4}}"
        config = parse(text)
        setting, shown = join(config), evaluation_views(config.views)
        training = training_loader(setting, config.views, index, RegionTable(len(index)))
        for loader in (training, plain_loader(setting, config.views, index, shown)):
            assert loader._feed._options["hw_decoder_load"] == load
            assert loader._quarantine._decoder[-1] == load


def test_only_the_listed_classes_are_read_and_have_the_same_number_everywhere(folders: Path) -> None:
    places = {"eval_train": str(folders / "train"), "eval_val": str(folders / "val")}
    sets = open_data(data_of(folders, "# where it is from\n\ncat\n  ant  \n  # bee\n", **places))
    assert sets.queries is not None
    for index, images in ((sets.train, 6), (sets.bank, 6), (sets.queries, 4)):
        assert index.classes == ["cat", "ant"]
        assert names_of(index) == {"ant", "cat"}
        assert len(index) == images
        for i in range(len(index)):
            assert index.classes[index.labels[i]] == Path(index.path(i)).parent.name
    every = open_data(data_of(folders, None, eval_val=str(folders / "val"))).train
    assert every.classes == ["ant", "bee", "cat"]
    assert len(every) == 9


def test_a_held_out_share_comes_from_the_listed_classes_alone_and_is_an_image_at_least(folders: Path) -> None:
    sets = open_data(data_of(folders, "bee\ncat\n", val_share=0.5), seed=3)
    assert sets.queries is not None
    assert len(sets.train) == len(sets.queries) == 3
    assert names_of(sets.train) | names_of(sets.queries) == {"bee", "cat"}
    few = open_data(data_of(folders, val_share=0.01)).queries
    assert few is not None
    assert len(few) == 1
    assert open_data(data_of(folders, val_share=0.0)).queries is None


def test_class_lists_that_name_nothing_that_is_there_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no class list .*nowhere\.txt, named by data\.classes"):
        open_data(data_of(folders).model_copy(update={"classes": str(tmp_path / "nowhere.txt")}))
    for text, told in (("# remark\n\n", r"classes\.txt, .* names no class"), ("ant\ndog\n", "dog")):
        with pytest.raises(ValueError, match=told):
            open_data(data_of(folders, text))


NAMES = ["airplane", "bird", "car"]


@pytest.fixture
def stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A small archive in STL-10's layout: 4 labelled, 5 unlabelled and 3 test images (N, 96, 96, 3)."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = {
        part: draw.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        for part, count in (("train", 4), ("unlabeled", 5), ("test", 3))
    }
    for part, images in pixels.items():  # planes of columns, as the authors describe the files
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 3, 2, 3]))  # labels count from 1
    (folder / "test_y.bin").write_bytes(bytes([2, 1, 3]))
    (folder / "class_names.txt").write_text("\n".join(NAMES))

    # torchvision opens only what has the real files' checksums; these are other files.
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    return pixels


def test_stl10_trains_on_all_images_and_votes_with_the_labelled_ones(
    stl10: dict[str, np.ndarray], tmp_path: Path
) -> None:
    sets = open_data(Data(kind="stl10", path=str(tmp_path)))
    assert sets.queries is not None
    assert sets.train.labels.tolist() == [0, 2, 1, 2, -1, -1, -1, -1, -1]
    assert sets.bank.labels.tolist() == [0, 2, 1, 2]
    assert sets.queries.labels.tolist() == [1, 0, 2]
    for index, images in (
        (sets.train, np.concatenate([stl10["train"], stl10["unlabeled"]])),
        (sets.bank, stl10["train"]),
        (sets.queries, stl10["test"]),
    ):
        assert index.classes == NAMES
        assert index.arrays is not None
        assert index.arrays.flags.c_contiguous
        assert np.array_equal(index.arrays, images)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    assert open_data(Data(kind="stl10", path=str(tmp_path))).train.classes == ["0", "1", "2"]


def test_an_absent_archive_says_how_to_fetch_it(tmp_path: Path) -> None:
    for kind in ("cifar10", "cifar100", "stl10"):
        with pytest.raises(FileNotFoundError, match=rf"datasets\.{kind.upper()}\(.*download=True"):
            open_data(Data(kind=kind, path=str(tmp_path)))  # type: ignore[arg-type]


def test_a_list_of_bad_files_is_left_out_with_its_reasons(folders: Path, tmp_path: Path) -> None:
    whole = open_data(Data(kind="folder", path=str(folders))).train
    name = os.path.relpath(whole.path(0), folders)
    (tmp_path / "bad.txt").write_text(f"{name}\tout of focus\n")
    train = open_data(Data(kind="folder", path=str(folders), leave_out=str(tmp_path / "bad.txt"))).train
    assert (name, "out of focus") in train.left_out
    assert whole.path(0) not in {train.path(row) for row in range(len(train))}


def test_what_an_archive_has_no_use_for_is_refused(folders: Path) -> None:
    for key in ("boxes", "eval_train", "eval_val", "cache_dir", "leave_out"):
        with pytest.raises(ValueError, match=f"data.{key} is not read for data.kind stl10, .* to null"):
            Data.model_validate({"kind": "stl10", "path": str(folders), key: "somewhere"})


def config_of(batch: int) -> Config:
    return parse(
        f"run: {{out: run, device: cpu}}\ndata: {{kind: folder, path: images}}\noptim: {{batch: {batch}}}"
    )


@pytest.mark.parametrize(
    ("batch", "world", "images", "expected"),
    [(256, 1, 1000, 256), (512, 1, 1000, 256), (256, 4, 1000, 64), (64, 4, 1000, 32), (256, 4, 40, 10)],
)
def test_what_is_evaluated_comes_in_batches_that_the_memory_has_held_in_training(
    batch: int, world: int, images: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, index = config_of(batch), SampleIndex.from_arrays(np.zeros((images, 8, 8, 3), np.uint8))
    monkeypatch.setattr(ranks, "world", lambda: world)
    loader = plain_loader(join(config), config.views, index, evaluation_views(config.views))
    assert loader.batch_size == expected


def test_processes_that_do_not_divide_the_batch_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config, index = config_of(16), SampleIndex.from_arrays(np.zeros((16, 8, 8, 3), np.uint8))
    monkeypatch.setattr(ranks, "world", lambda: 3)
    with pytest.raises(ValueError, match=r"optim\.batch 16 does not divide over 3 processes"):
        training_loader(join(config), config.views, index, RegionTable(16))
    monkeypatch.setattr(ranks, "world", lambda: 4)
    with pytest.raises(ValueError, match=r"method\.split_bn 8 does not divide the 4 samples of each of 4"):
        training_loader(join(config), config.views, index, RegionTable(16), split_bn=8)
    setting = replace(join(config), parts=8)
    with pytest.raises(
        ValueError, match=r"16 does not divide over 4 processes in 8 parts \(optim.accumulate"
    ):
        training_loader(setting, config.views, index, RegionTable(16))
    few = index.subset(np.arange(16) < 12)
    with pytest.raises(ValueError, match=r"12 images to train on cannot fill optim\.batch 16"):
        training_loader(replace(setting, parts=2), config.views, few, RegionTable(12))
