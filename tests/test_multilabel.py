"""Images that show several classes: average precision, logistic regression, SVMs and their commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import lines_of, plain_run
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from dali_views import SampleIndex
from trainers import cli
from trainers.detect.truth import read_truth
from trainers.evaluate.knn import knn_accuracy, knn_votes
from trainers.evaluate.logistic import fit_logistic
from trainers.evaluate.multilabel import Sides, label_matrix, linear, means
from trainers.evaluate.precision import average_precision, mean_per_class, top1
from trainers.evaluate.svm import support_vectors


def test_average_precision_is_that_of_scikit_learn_also_for_equal_scores():
    draw = np.random.default_rng(0)
    for _ in range(100):
        labels = draw.integers(0, 2, draw.integers(1, 30))
        scores = draw.integers(0, 9, len(labels)).astype(np.float64)
        if labels.any():
            area = average_precision(scores, labels)[0]
            assert area == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


def test_average_precision_by_hand_in_all_three_definitions():
    # Precision 1, 1/2, 2/3, 2/4, 3/5 at a recall of 1/3, 1/3, 2/3, 2/3, 1; from there on at best 1, 2/3, 3/5.
    scores, labels = np.array([5.0, 4, 3, 2, 1]), np.array([1, 0, 1, 0, 1])
    expected = (1 + 2 / 3 + 3 / 5) / 3, (1 + 2 / 3 + 3 / 5) / 3, (4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11
    assert average_precision(scores, labels) == pytest.approx(expected)
    # The precision of 1/2 is followed by 2/3: VOC takes the greater one.
    late = average_precision(np.array([3.0, 2, 1]), np.array([0, 1, 1]))
    assert late == pytest.approx(((1 / 2 + 2 / 3) / 2, 2 / 3, 2 / 3))
    # Ten found without a mistake but for the last: a recall of 3 / 10 is one of the eleven points.
    ten = average_precision(np.arange(11.0)[::-1], np.array([1] * 3 + [0] + [1] * 7))
    assert ten[2] == pytest.approx((4 * 1 + 7 * 10 / 11) / 11)
    assert average_precision(scores, np.array([1, -1, 1, -1, 1])) == (1, 1, 1), "left out"
    assert np.isnan(average_precision(scores, np.zeros(5, np.int64))).all()


def test_accuracies_by_hand():
    scores, labels = np.eye(3)[[0, 0, 0, 1, 0]], np.array([0, 0, 0, 1, 1])
    assert top1(scores, labels) == 4 / 5
    assert mean_per_class(scores, labels) == 3 / 4


def voc(home: Path, images: dict[str, list[tuple[str, int]]]) -> SampleIndex:
    """A folder in VOC's layout: of each image the names of its objects, and whether they are difficult."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (home / part).mkdir(parents=True)
    for name, objects in images.items():
        Image.new("RGB", (40, 30)).save(home / "JPEGImages" / f"{name}.jpg")
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>15</ymax></bndbox>"
        told = "".join(
            f"<object><name>{kind}</name><difficult>{hard}</difficult>{box}</object>"
            for kind, hard in objects
        )
        size = "<size><width>40</width><height>30</height></size>"
        file = home / "Annotations" / f"{name}.xml"
        file.write_text(f"<annotation><filename>{name}.jpg</filename>{size}{told}</annotation>")
    (home / "ImageSets/Main/trainval.txt").write_text("\n".join(images))
    return SampleIndex.from_folder(home.parent, cache=False, progress=False)


def test_an_image_with_difficult_objects_alone_neither_shows_the_class_nor_does_not(tmp_path):
    images = {"1": [("dog", 1)], "2": [("dog", 1), ("dog", 0), ("cat", 0)], "3": [("cat", 1)], "4": []}
    index = voc(tmp_path / "VOC2007", images)
    truth = read_truth(index, [str(tmp_path / "VOC2007/ImageSets/Main/trainval.txt")])
    assert truth.classes == ["cat", "dog"]
    assert label_matrix(truth).tolist() == [[0, -1], [1, 1], [-1, 0], [0, 0]]


def separate(count: int, classes: int, width: int = 16) -> tuple[torch.Tensor, np.ndarray]:
    """Features of images that show about half of the classes, and their labels; they overlap a little."""
    draw = np.random.default_rng([count, classes])
    labels = draw.integers(0, 2, (count, classes)).astype(np.int8)
    ways = np.random.default_rng(1).normal(size=(classes, width))
    found = labels @ ways + 0.5 * draw.normal(size=(count, width))
    return torch.from_numpy(found.astype(np.float32)), labels


def test_logistic_regression_is_that_of_scikit_learn_with_the_decay_that_held_out_images_chose():
    features, labels = separate(300, 4)
    kinds = torch.from_numpy(labels[:, 0] + 2 * labels[:, 1]).long()
    fitted = fit_logistic(features, kinds, 4, lambda z, t: top1(z.numpy(), t.numpy()), 0)
    inputs = ((features - fitted.mean) * fitted.scale).numpy()
    theirs = LogisticRegression(C=1 / (fitted.decay * 300), max_iter=10_000, tol=1e-9).fit(inputs, kinds)
    logits = fitted(features).numpy()
    assert logits - logits.mean(1, keepdims=True) == pytest.approx(theirs.decision_function(inputs), abs=0.1)
    # Each class by itself, without the images that neither show it nor do not.
    several = torch.from_numpy(labels.copy())
    several[:40, 2] = -1
    fitted = fit_logistic(features, several, 4, lambda z, t: 0.0, 0)
    rows = slice(40, None)
    theirs = LogisticRegression(C=1 / (fitted.decay * 300), max_iter=10_000, tol=1e-9).fit(
        inputs[rows], labels[rows, 2]
    )
    assert fitted(features)[rows, 2].numpy() == pytest.approx(
        theirs.decision_function(inputs[rows]), abs=0.02
    )


def test_votes_for_one_class_an_image_are_those_of_knn_and_those_for_several_add_up():
    features, labels = separate(60, 2)
    kinds = torch.from_numpy(labels[:, 0] + 2 * labels[:, 1]).long()
    bank, queries = (features[:40], kinds[:40]), (features[40:], kinds[40:])
    votes = knn_votes(bank[0], torch.nn.functional.one_hot(bank[1], 4).bool(), queries[0], 7, 0.1)
    assert votes.sum(1) == pytest.approx(torch.ones(20))
    assert (
        float((votes.argmax(1) == queries[1]).double().mean())
        == knn_accuracy(*bank, *queries, 7, 0.1)["top1"]
    )
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    shown = torch.tensor([[True, True, False], [False, True, False]])
    (found,) = knn_votes(torch.stack([near, far]), shown, 3 * near[None], 2, 0.5)
    weight = np.exp(2) / (np.exp(2) + 1)
    assert found.tolist() == pytest.approx([weight, 1, 0])


def sides(count: int = 120) -> Sides:
    features, labels = separate(2 * count, 3)
    return Sides(features[:count], labels[:count], features[count:], labels[count:], ["a", "b", "c"])


def test_svms_find_the_classes_and_more_images_of_each_help():
    given = sides()
    found = support_vectors(given, [1, 32], 3, 0, 1)
    assert found.few.shape == (2, 3, 3, 3)
    assert (found.whole > 0.9).all()
    few, many = found.few[..., 0].mean((1, 2))
    assert few < many < found.whole[:, 0].mean() + 0.01
    assert found.few[0, :, :, 0].std() > 0, "draws differ"
    again = support_vectors(given, [32], 3, 0, 2)
    assert np.array_equal(found.few[1], again.few[0]), "they depend neither on other numbers nor on processes"
    logistic, _ = linear(given, 0)
    assert means(logistic, given)[0]["map"] > 0.9


def test_svms_say_what_they_lack(monkeypatch):
    with pytest.raises(ValueError, match=r"only \d+ training images show [abc], and 99 are needed"):
        support_vectors(sides(), [1, 99], 2, 0, 1)
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ValueError, match=r"scikit-learn; pip install 'dali-views\[transfer\]'"):
        support_vectors(sides(), [], 1, 0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on scenes of three kinds, for this process alone, whose folder is written into."""
    return plain_run(tmp_path_factory.mktemp("run"), 40)


def test_three_commands_score_the_classes_of_all_objects(run, capsys):
    assert cli.main(["linear", str(run), "--multilabel"]) == 0
    assert cli.main(["knn", str(run), "--multilabel", "-k", "1", "5"]) == 0
    assert cli.main(["svm", str(run), "--shots", "1", "2", "--encoder", "colours"]) == 0
    told = capsys.readouterr().out
    assert "logistic regression (weight decay" in told
    assert "2 images of each class: mAP" in told
    lines = lines_of(run, "evaluations.jsonl")
    assert [line["evaluation"] for line in lines] == ["linear", "knn", "knn", "svm", "svm", "svm"]
    assert all(0 <= line["map_voc"] <= 1 for line in lines)
    assert [line.get("shots") for line in lines] == [None, None, None, "all", 1, 2]


def test_classes_that_cannot_be_scored_are_named_and_without_any_there_is_one_sentence(run, tmp_path, capsys):
    data = json.loads((run.parent / "instances.json").read_text())
    data["categories"].append({"id": 99, "name": "unicorn"})
    (tmp_path / "more.json").write_text(json.dumps(data))
    words = ["linear", str(run), "--multilabel"]
    assert cli.main([*words, f"data.instances={tmp_path / 'more.json'}"]) == 0
    assert "1 of " in (told := capsys.readouterr().err)
    assert "the first is unicorn" in told
    data["annotations"] = data["annotations"][:1]
    (tmp_path / "one.json").write_text(json.dumps(data))
    for change, told in (
        (f"data.instances={tmp_path / 'one.json'}", "classes has an image that shows it both in training"),
        ("data.instances=null", "needs true boxes; name their file by data.instances or detect.instances"),
        ("detect.val_path=nowhere", "name their file by detect.val_instances"),
    ):
        assert cli.main([*words, change]) == 2
        assert told in capsys.readouterr().err
