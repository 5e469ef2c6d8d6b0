"""Generated scenes: reproducible, with tight boxes, and readable by the index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dali_views.data.index import SampleIndex
from dali_views.tools.cli import main
from dali_views.tools.scenes import CLASSES, draw_scene, make_scenes


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_equal_seeds_give_equal_bytes_however_many_scenes_there_are(tmp_path):
    for name, count, seed in (("a", 6, 3), ("b", 6, 3), ("few", 2, 3), ("other", 6, 4)):
        make_scenes(tmp_path / name, count, 48, seed=seed)
    a, b, few, other = (_bytes(tmp_path / name) for name in ("a", "b", "few", "other"))
    assert a == b
    assert few["000001.jpg"] == a["000001.jpg"] != other["000001.jpg"]


@pytest.mark.parametrize("kind", CLASSES)
def test_pixels_change_inside_the_boxes_only_and_reach_all_their_sides(kind: str):
    for number in range(12):
        scene = draw_scene(1, number, (64, 80), [kind])
        assert scene.kind == kind
        changed = (scene.image != scene.background).any(-1)
        for y0, x0, y1, x1 in scene.boxes:
            inside = changed[y0:y1, x0:x1]
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert max(rows[0], columns[0]) <= 1
            assert max(inside.shape[0] - 1 - rows[-1], inside.shape[1] - 1 - columns[-1]) <= 1
            changed[y0:y1, x0:x1] = False
        assert not changed.any()


def test_objects_are_one_to_three_of_moderate_size_and_often_off_centre():
    scenes = [draw_scene(0, number, 64) for number in range(150)]
    assert {len(scene.boxes) for scene in scenes} == {1, 2, 3}
    boxes = np.concatenate([scene.boxes for scene in scenes]) / 64
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    assert area.min() > 0.03
    assert area.max() < 0.4
    off = np.abs((boxes[:, 2:] + boxes[:, :2]) / 2 - 0.5).max(1)
    assert (off > 0.15).mean() > 0.5
    assert {scene.kind for scene in scenes} == set(CLASSES)


def test_a_share_is_the_area_of_the_square_around_an_object():
    low, high = 0.03, 0.08
    small, one = [draw_scene(0, n, 128, share=(low, high), objects=(1, 1)) for n in range(300)], 1 / 128
    for scene in small:
        ((y0, x0, y1, x1),) = scene.boxes / 128
        assert y1 - y0 < high**0.5 + 2 * one  # the pixels at both edges
        if scene.kind in ("disc", "ring", "striped disc"):
            assert low**0.5 - one < min(y1 - y0, x1 - x0)
            assert abs(y1 - y0 - (x1 - x0)) < 2 * one
    covered = np.mean([np.prod(s.boxes[0, 2:] - s.boxes[0, :2]) / 128**2 for s in small])
    assert 0.85 < covered / ((low + high) / 2) < 1.05


def test_as_many_objects_as_asked_for_if_they_fit(tmp_path):
    scenes = [draw_scene(0, n, 128, share=(0.03, 0.05), objects=(2, 5)) for n in range(60)]
    assert {len(scene.boxes) for scene in scenes} == {2, 3, 4, 5}
    with pytest.warns(UserWarning, match="4 of 4 scenes"):
        _, file = make_scenes(tmp_path, 4, 64, share=(0.3, 0.4), objects=(5, 5))
    assert 4 <= len(json.loads(file.read_text())["annotations"]) < 4 * 5


def test_clutter_multiplies_what_lies_behind_the_objects_and_moves_none():
    covered = []
    for clutter in (0, 1, 2, 4):
        changed = []
        for number in range(60):
            bare, scene = (draw_scene(0, number, 96, share=(0.03, 0.08), clutter=c) for c in (0, clutter))
            assert np.abs(scene.boxes - bare.boxes).max() <= 1
            changed.append((scene.background != bare.background).any(-1).mean())
        covered.append(np.mean(changed))
    none, usual, twice, fourfold = covered
    assert none == 0
    assert 1.5 < twice / usual < 2.5
    assert 1.5 < fourfold / twice < 2.5
    assert usual / 4 < 0.03  # four shapes on average, each smaller than the smallest object


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"share": (0.2, 0.1)}, "low <= high"),
        ({"share": (0.0001, 0.1)}, "4 pixels of radius"),
        ({"share": (0.1, 0.9)}, "to 0.8464"),
        ({"share": (float("nan"), 0.1)}, "Objects cannot take nan"),
        ({"objects": (0, 1)}, "1 <= least"),
        ({"objects": (3, 2)}, "3 to 2 objects"),
        ({"clutter": -1}, "Clutter -1 is impossible"),
        ({"clutter": float("inf")}, "Clutter inf is impossible"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(tmp_path, wrong, told):
    with pytest.raises(ValueError, match=told):
        make_scenes(tmp_path / "out", 1, **wrong)
    assert not (tmp_path / "out").exists()


def test_mean_colour_does_not_tell_the_class():
    scenes = [draw_scene(0, number, 48) for number in range(400)]
    colour = np.stack([scene.image.mean((0, 1)) for scene in scenes])
    kinds = np.array([CLASSES.index(scene.kind) for scene in scenes])
    distance = ((colour[:, None] - colour[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    right = (kinds[distance.argmin(1)] == kinds).mean()
    assert right < 2 / len(CLASSES)


def test_the_index_reads_labels_and_boxes_back(tmp_path):
    folder, file = make_scenes(tmp_path, 8, (48, 64), seed=2)
    index = SampleIndex.from_coco(folder, file, cache=False)
    assert index.classes == list(CLASSES)
    assert index.sizes.tolist() == [[48, 64]] * 8
    for row in range(8):
        scene = draw_scene(2, row, (48, 64))
        assert index.classes[index.labels[row]] == scene.kind
        np.testing.assert_allclose(index.truth(row), scene.boxes / [48, 64, 48, 64], atol=1e-6)


def test_fewer_classes_are_numbered_as_given(tmp_path):
    _, file = make_scenes(tmp_path, 3, 32, classes=["star", "disc"])
    assert [c["name"] for c in json.loads(file.read_text())["categories"]] == ["star", "disc"]


def test_unknown_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hexagon"):
        make_scenes(tmp_path, 3, classes=["hexagon"])


def test_the_command_takes_what_the_function_takes(tmp_path):
    options = {"size": 64, "classes": ["star", "striped disc"], "share": (0.05, 0.1), "objects": (2, 2)}
    make_scenes(tmp_path / "function", 4, **options, clutter=3)
    words = [
        "--count",
        "4",
        "--size",
        "64",
        "--share",
        "0.05",
        "0.1",
        "--objects",
        "2",
        "2",
        "--clutter",
        "3",
        "--classes",
        "star",
    ]
    assert main(["scenes", str(tmp_path / "command"), *words, "striped disc"]) == 0
    assert _bytes(tmp_path / "command") == _bytes(tmp_path / "function")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "10"], "10 x 10"),
        (["--count", "0"], "0 scenes"),
        (["--share", "0.3", "0.1"], "0.3 to 0.1"),
    ],
)
def test_the_command_says_in_one_sentence_what_it_cannot_make(tmp_path, capsys, options, told):
    assert main(["scenes", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
