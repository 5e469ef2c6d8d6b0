"""The data set of objects on photographs: what is held out, paired and biased, and both ways to read it.

Objects and photographs of one colour each show which of them an image is made of.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dali_views.data.index import SampleIndex

SCRIPT = Path(__file__).parent / "bench" / "objects_on_photographs.py"
KINDS, PHOTOS, SETS = ("cat", "ship"), 20, ("train", "test", "mixed_rand", "plain")


def _paint(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs are shades of green; objects are red and blue, red by class and part, blue by number."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(PHOTOS):
        _paint(folder / f"imagenet-sample/n{i:02d}.png", (0, 12 * i + 10, 0), (200, 150))
    for i, (part, kind) in enumerate((p, k) for p in ("train", "test") for k in KINDS):
        for number in range(4):
            _paint(folder / f"cifar10/{part}/{kind}/{number}.png", (60 * i + 60, 0, 60 * number + 60))
    return folder


class Made(NamedTuple):
    """What a set is made of, by the images' numbers."""

    labels: list[int]
    boxes: list[list[int]]
    objects: list[tuple[int, int]]
    photographs: list[int]


def _make(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Made]:
    words = [str(data), str(out), "--train", "60", "--test", "40", "--size", "64", *options]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return {name: _read(out / name) for name in SETS}


def _read(folder: Path) -> Made:
    content, made = json.loads((folder / "instances.json").read_text()), Made([], [], [], [])
    for image, mark in zip(content["images"], content["annotations"], strict=True):
        assert image["id"] == mark["image_id"]
        pixels = np.asarray(Image.open(folder / "images" / image["file_name"])).astype(int)
        x, y, width, height = mark["bbox"]
        red, _, blue = pixels[y + height // 2, x + width // 2]
        around = np.delete(pixels[..., 1], np.s_[max(0, y - 8) : y + height + 8], axis=0)
        made.labels.append(mark["category_id"])
        made.boxes.append(mark["bbox"])
        made.objects.append((round(red / 60) - 1, round(blue / 60) - 1))
        made.photographs.append(round((np.median(around) - 10) / 12))
    return made


def test_objects_and_photographs_of_the_tests_are_held_out_and_objects_are_paired(
    data, tmp_path, monkeypatch
):
    train, test, mixed, plain = _make(data, tmp_path, monkeypatch).values()
    assert not set(train.objects) & set(test.objects)
    assert not set(train.photographs) & {*test.photographs, *mixed.photographs}
    assert len(set(train.photographs)) == PHOTOS * 4 // 5
    assert test.photographs != mixed.photographs
    assert set(plain.photographs) == {9}  # grey
    assert test[:3] == mixed[:3] == plain[:3]
    # Every object of a class comes once before one comes again.
    assert len(set(train.objects[:8])) == 8
    assert [kind for kind, _ in train.objects] == train.labels


def test_with_a_bias_the_photograph_tells_the_class_but_not_in_mixed_rand(data, tmp_path, monkeypatch):
    made = _make(data, tmp_path, monkeypatch, "--bias", "1")

    def by_class(name: str) -> list[set[int]]:
        pairs = list(zip(made[name].labels, made[name].photographs, strict=True))
        return [{photo for label, photo in pairs if label == kind} for kind in range(len(KINDS))]

    cat, ship = by_class("train")
    cat_held, ship_held = by_class("test")
    assert max(cat | cat_held) < min(ship | ship_held)  # the groups hold the dark and the light shades
    assert set.intersection(*by_class("mixed_rand"))


def test_boxes_take_the_share_and_both_indexes_read_them(data, tmp_path, monkeypatch):
    made = _make(data, tmp_path / "a", monkeypatch, "--share", "0.1", "0.2")
    again = _make(data, tmp_path / "b", monkeypatch, "--share", "0.1", "0.2")
    assert made == again
    area = np.prod(np.array(made["train"].boxes)[:, 2:], axis=1) / 64**2
    side = np.sqrt(area)
    assert (side > 0.1**0.5 - 1 / 64).all()
    assert (side < 0.2**0.5 + 1 / 64).all()
    assert area.std() > 0.02
    images = tmp_path / "a/train/images"
    coco = SampleIndex.from_coco(images, images.parent / "instances.json", cache=False)
    folder = SampleIndex.from_folder(images, cache=False)
    assert coco.classes == folder.classes == list(KINDS)
    assert [coco.path(row) for row in range(60)] == [folder.path(row) for row in range(60)]
    np.testing.assert_array_equal(coco.labels, folder.labels)
    assert all(len(coco.truth(row)) == 1 for row in range(60))


def test_objects_of_tiny_imagenet_are_what_its_boxes_hold(data, tmp_path, monkeypatch):
    (tmp_path / "imagenet-sample").symlink_to(data / "imagenet-sample")
    for part in ("train", "val"):
        lines = []
        for i, kind in enumerate(KINDS):
            for number, (width, height) in enumerate([(30, 20), (30, 5)]):
                image = Image.new("RGB", (64, 64), (255, 255, 255))
                image.paste((60 * i + 60, 0, 60 * number + 60), (10, 20, 10 + width, 20 + height))
                file = tmp_path / f"tiny-imagenet-50/{part}/{kind}/{kind}_{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
                lines.append(f"{file.name}\t10\t20\t{9 + width}\t{19 + height}\n")
        (tmp_path / f"tiny-imagenet-50/{part}_boxes.txt").write_text("".join(lines))
    made = _make(
        tmp_path, tmp_path / "out", monkeypatch, "--objects", "tiny-imagenet", "--share", "0.2", "0.3"
    )
    for part in made.values():
        assert set(part.objects) == {(0, 0), (1, 0)}  # the flat box is too thin
        boxes = np.array(part.boxes)
        assert (np.abs(boxes[:, 2] / boxes[:, 3] - 1.5) < 0.1).all()
