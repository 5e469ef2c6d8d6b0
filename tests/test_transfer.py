"""`transfer`: sets in the layouts of torchvision's classes, in one table; what is missing or wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import lines_of, plain_run
from scipy.io import savemat

from trainers import cli
from trainers import config as cfg
from trainers.evaluate.labelled_sets import KNOWN, open_set, read_sets

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
NAMES = ("ant", "bee", "cat")
CONFIG = cfg.check({"run": {"out": "-", "device": "cpu"}, "data": {"kind": "folder", "path": "-"}}, "")


def picture(file: Path, label: int, number: int) -> None:
    """A small image whose colour tells the class."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([label, number]).integers(0, 40, (24, 24, 3))
    Image.fromarray((noise + COLOURS[label]).astype(np.uint8)).save(file, quality=95)


def lines(file: Path, text: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n")


def each(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Class and number of images, of which the class with number c has counts[c]."""
    return [(label, number) for label, count in enumerate(counts) for number in range(count)]


def dtd(root: Path) -> None:
    for part, first in (("train", 0), ("val", 10), ("test", 20)):
        names = [f"{NAMES[c]}/{NAMES[c]}_{first + n}.jpg" for c, n in each((3, 2, 1))]
        lines(root / f"dtd/dtd/labels/{part}1.txt", names)
        for (label, number), name in zip(each((3, 2, 1)), names, strict=True):
            picture(root / "dtd/dtd/images" / name, label, number)


def food(root: Path) -> None:
    for part, counts in (("train", (4, 4, 4)), ("test", (2, 1, 1))):
        names = {NAMES[c]: [f"{NAMES[c]}/{part}{n}" for n in range(count)] for c, count in enumerate(counts)}
        lines(root / f"food-101/meta/{part}.json", [json.dumps(names)])
        for label, number in each(counts):
            picture(root / f"food-101/images/{NAMES[label]}/{part}{number}.jpg", label, number)


def aircraft(root: Path) -> None:
    home = root / "fgvc-aircraft-2013b/data"
    lines(home / "variants.txt", list(NAMES))
    for part, counts in (("trainval", (3, 3, 3)), ("test", (4, 1, 1))):
        lines(home / f"images_variant_{part}.txt", [f"{part}{c}{n} {NAMES[c]}" for c, n in each(counts)])
        for label, number in each(counts):
            picture(home / f"images/{part}{label}{number}.jpg", label, number)


def pets(root: Path) -> None:
    home = root / "oxford-iiit-pet"
    for part, counts in (("trainval", (3, 3, 3)), ("test", (2, 2, 2))):
        names = [f"{NAMES[c]}_{part}_{n} {c + 1} 1 1" for c, n in each(counts)]
        lines(home / f"annotations/{part}.txt", names)
        for label, number in each(counts):
            picture(home / f"images/{NAMES[label]}_{part}_{number}.jpg", label, number)


def cars(root: Path) -> None:
    home = root / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    savemat(home / "devkit/cars_meta.mat", {"class_names": np.array(NAMES, object)})
    for file, part in ("devkit/cars_train_annos.mat", "train"), ("cars_test_annos_withlabels.mat", "test"):
        kinds = [("fname", object), ("class", np.uint8)]
        named = [(f"{c}{n}.jpg", c + 1) for c, n in each((3, 2, 2))]
        savemat(home / file, {"annotations": np.array(named, kinds)})
        for label, number in each((3, 2, 2)):
            picture(home / f"cars_{part}/{label}{number}.jpg", label, number)


def caltech(root: Path) -> None:
    home = root / "caltech101/101_ObjectCategories"
    (home / "BACKGROUND_Google").mkdir(parents=True)
    for label, number in each((32, 31, 33)):
        picture(home / NAMES[label] / f"image_{number + 1:04d}.jpg", label, number)


def sun(root: Path) -> None:
    lines(root / "SUN397/ClassName.txt", [f"/{name[0].lower()}/{name}" for name in NAMES])
    for label, number in each((101, 52, 51)):
        name = NAMES[label]
        picture(root / f"SUN397/{name[0].lower()}/{name}/sun_{number}.jpg", label, number)


LAYOUTS: dict[str, tuple[Callable[[Path], None], tuple[int, ...], tuple[int, ...]]] = {
    "DTD": (dtd, (6, 4, 2), (3, 2, 1)),
    "Food101": (food, (4, 4, 4), (2, 1, 1)),
    "FGVCAircraft": (aircraft, (3, 3, 3), (4, 1, 1)),
    "OxfordIIITPet": (pets, (3, 3, 3), (2, 2, 2)),
    "StanfordCars": (cars, (3, 2, 2), (3, 2, 2)),
    "Caltech101": (caltech, (30, 30, 30), (2, 1, 3)),
    "SUN397": (sun, (50, 50, 50), (50, 2, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_torchvisions_layouts_give_the_images_of_each_class_on_both_sides(name, tmp_path):
    make, *counts = LAYOUTS[name]
    make(tmp_path)
    file = tmp_path / "sets.yaml"
    file.write_text(f"one: {{torchvision: {name}, root: {tmp_path}}}")
    one = read_sets(file, CONFIG)["one"]
    assert one.measure == KNOWN[name].measure
    sides = open_set(one, 3)
    for index, expected in zip(sides, counts, strict=True):
        assert tuple(np.bincount(index.labels)) == expected
        for row in range(len(index)):
            mean = np.asarray(Image.open(index.path(row)).convert("RGB")).mean((0, 1))
            assert mean.argmax() == index.labels[row], "the colour tells the class"
    paths = [{index.path(row) for row in range(len(index))} for index in sides]
    assert not paths[0] & paths[1]
    if KNOWN[name].drawn:
        others = open_set(one, 4)[0]
        assert {others.path(row) for row in range(len(others))} != paths[0], "the seed draws them"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a step on scenes of three kinds, for this process alone, with sets beside it."""
    folder = tmp_path_factory.mktemp("run")
    plain_run(folder, 32, max_steps=1)
    food(folder)
    aircraft(folder)
    for label, number in each((4, 4, 4)):
        picture(folder / f"labelled/{NAMES[label]}/{number}.jpg", label, number)
    (folder / "sets.yaml").write_text(
        f"food: {{torchvision: Food101, root: {folder}}}\n"
        f"planes: {{torchvision: FGVCAircraft, root: {folder}}}\n"
        f"flowers: {{torchvision: Flowers102, root: {folder}}}\n"
        f"own: {{data: {{kind: folder, path: {folder}/labelled, val_share: 0.5}}, measure: mean_per_class}}\n"
        f"gone: {{data: {{kind: folder, path: {folder}/nowhere}}}}\n"
        f"scenes: {{data: {{kind: coco, path: {folder}/images, instances: {folder}/instances.json, "
        "val_share: 0.5}, "
        "detect: {}}\n"
    )
    return folder / "run"


def test_one_table_over_several_sets_says_which_are_missing(run, capsys):
    sets = str(run.parent / "sets.yaml")
    assert cli.main(["transfer", str(run), "--sets", sets, "--encoder", "colours"]) == 0
    told = capsys.readouterr().out
    assert "mean of 4 of 6 sets" in told
    assert f"flowers is left out: torchvision's Flowers102 is not in {run.parent}" in told
    assert "gone is left out: " in told
    assert (run / "transfer-colours.md").read_text() in told + "\n"
    rows = {row["set"]: row for row in csv.DictReader((run / "transfer-colours.csv").open())}
    assert list(rows) == ["food", "planes", "flowers", "own", "gone", "scenes"]
    measures = {"food": "top1", "planes": "mean_per_class", "own": "mean_per_class", "scenes": "map"}
    assert {name: row["measure"] for name, row in rows.items() if not row["missing"]} == measures
    for name in ("food", "planes", "own"):
        assert float(rows[name]["knn"]) == float(rows[name]["linear"]) == 1, "colours tell the classes"
    lines = lines_of(run, "evaluations.jsonl")
    assert [line["set"] for line in lines] == [*measures, "mean of 4 of 6 sets"]
    assert lines[-1]["linear"] == pytest.approx(np.mean([line["linear"] for line in lines[:-1]]))


WRONG = {
    "one: {torchvision: Flowers103}": "one: torchvision Flowers103 is not read; known: Food101, ",
    "one: {torchvision: VOC2007}": "give VOC by data and detect",
    "one: {torchvision: DTD, data: {kind: folder, path: x}}": "either torchvision or data",
    "one: {}": "either torchvision or data",
    "one: {rot: 1}": "rot is none of a set's keys; valid here: torchvision, root, data, detect, measure",
    "one: DTD": "'DTD' is none of a set's keys",
    "one: {data: {kind: folder, pth: x}}": "one: data.pth is not a known key; did you mean data.path?",
    "one: {torchvision: DTD, measure: map}": "measure should be one of top1, mean_per_class, not map",
    "one: {data: {kind: coco, path: x}, detect: {}, measure: top1}": "map, map_voc, map_voc07, not top1",
    "one: {data: [": "is not valid YAML",
    "": "names no set",
    "one: {data: {kind: folder, path: LABELLED, val_share: 0}}": "one: no image has a label",
    "one: {data: {kind: folder, path: LABELLED}, detect: {}}": "one: this needs true boxes",
    "one: {torchvision: DTD, root: nowhere}": "none of 1 sets is on disk (one: torchvision's DTD is not in",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_sets_are_one_sentence(text, run, tmp_path, capsys):
    file = tmp_path / "sets.yaml"
    file.write_text(text.replace("LABELLED", str(run.parent / "labelled")))
    assert cli.main(["transfer", str(run), "--sets", str(file)]) == 2
    assert WRONG[text] in capsys.readouterr().err


def test_a_file_of_sets_that_is_not_there_is_one_sentence(run, capsys):
    assert cli.main(["transfer", str(run), "--sets", "nowhere.yaml"]) == 2
    assert "no configuration file nowhere.yaml" in capsys.readouterr().err
