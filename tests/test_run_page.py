"""The page of a run: of real runs, of killed and resumed ones, and of metrics of any kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_images
from pages import Page, small_config
from runs import SMALL, scenes_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dali_views import SampleIndex, bad_list
from trainers import cli
from trainers.config import file as config_file
from trainers.engine import checkpoint
from trainers.pretrain import pretrain
from trainers.report import PAGE, report
from trainers.report.history import History, lines_of, recorded
from trainers.report.page import curves_of, thinned

pytestmark = pytest.mark.filterwarnings("ignore:half of the boxes")
PARTNERS = {**SMALL["views"], "partner": "replace"}
HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return scenes_in(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def undisturbed(scenes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a guided run of nine steps, evaluated before and after."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pretrain(config_file.load(small_config(folder, scenes, run={"evaluate_every": 3})))
    return folder / "run"


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def remade(run: Path) -> Page:
    """The page as the command makes it of what is in the folder."""
    assert cli.main(["report", str(run)]) == 0
    return Page(run / PAGE)


def test_a_run_leaves_a_page_and_tensorboard_with_all_that_it_has_to_show(undisturbed):
    found = Page(undisturbed / PAGE)
    assert found.has("How the boxes moved", "Best and worst localised", "Views of the latest evaluation")
    assert found.has("numpy", "MoCo", "ContrastiveCrop", "finished after 9 steps")
    assert not any(map(found.has, ("Semantic pairs", "Images that could not be read")))
    charts = {each["aria-label"] for each in found.tags("svg", role="img")}
    assert charts > {"Loss", "kNN accuracy", "IoU with true boxes", "Learning rate"}
    assert len(found.pictures()) == 12 + 2 * 6 + 1
    assert (undisturbed / PAGE).stat().st_size < 3_000_000

    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    assert set(curves_of(undisturbed / "metrics.jsonl")) == set(events.Tags()["scalars"])
    assert {"views", "followed", "localised"} == set(events.Tags()["images"])

    shown = lines_of(undisturbed / "history" / "boxes.jsonl")
    assert [line["epoch"] for line in shown] == [1, 2]  # passes of the guide; the last epoch has none
    boxes = checkpoint.load(undisturbed)["regions"]["boxes"][:, 0].numpy()
    rows = json.loads((undisturbed / "history" / "followed.json").read_text())["rows"]
    assert len(set(rows)) == 12
    np.testing.assert_allclose(shown[-1]["boxes"], boxes[rows], atol=1e-4)
    colours = {each["stroke"] for each in found.tags("rect", **{"class": "strong"})}
    assert len(colours) == 2 + 1  # two epochs, and boxes of the evaluation


def test_a_stopped_run_says_so_and_goes_on_to_the_page_of_one_never_stopped(undisturbed, scenes, tmp_path):
    file = small_config(tmp_path, scenes, run={"evaluate_every": 3})
    pretrain(config_file.load(file, ["run.max_steps=4"]))
    run = tmp_path / "run"
    assert "stopped at run.max_steps after 4 of 9 steps" in Page(run / PAGE).text
    # What a process leaves that went on and was killed while it wrote.
    with (run / "history" / "boxes.jsonl").open("a") as boxes:
        boxes.write('{"step": 6, "epoch": 2, "boxes": [null]}\n{"step": 9, "epo')
    shutil.copy(undisturbed / "history" / "localised.json", run / "history")
    History(run, SampleIndex.load(run / "index.safetensors"), 0, 4)
    assert [line["step"] for line in lines_of(run / "history" / "boxes.jsonl")] == [3]
    assert not (run / "history" / "localised.json").exists()
    pretrain(config_file.load(file), resume=True)
    for name in ("boxes.jsonl", "followed.json", "localised.json"):
        assert (run / "history" / name).read_bytes() == (undisturbed / "history" / name).read_bytes()
    assert "finished after 9 steps" in Page(run / PAGE).text
    events = [event["event"] for event in lines_of(run / "history" / "events.jsonl")]
    assert events == ["start", "end"] * 2


def test_a_failed_run_names_the_failure(scenes, tmp_path):
    too_fast = {"optim": {"name": "sgd", "lr": 1e30, "lr_scaling": False, "batch": 16}}
    no_encoder = {"guide": {"name": "semantic_pairs", "encoder": "nowhere"}, "views": PARTNERS}
    for changes, error in ((too_fast, FloatingPointError), (no_encoder, FileNotFoundError)):
        with pytest.raises(error) as failed:
            pretrain(config_file.load(small_config(tmp_path / error.__name__, scenes, **changes)))
        found = Page(tmp_path / error.__name__ / "run" / PAGE)
        assert found.has(f"failed: {error.__name__}: {failed.value}"[:60])


def test_a_run_begun_anew_keeps_nothing_of_one_that_died_before_its_first_checkpoint(scenes, tmp_path):
    file = small_config(tmp_path, scenes, run={"max_steps": 1, "evaluate_every": 3})
    for _ in range(2):
        pretrain(config_file.load(file))
        (tmp_path / "run" / "last.pt").unlink()
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_pairs_regions_and_a_folder_without_true_boxes(tmp_path):
    noise_images(tmp_path / "photos" / "<i>a", 16)
    noise_images(tmp_path / "photos" / "b", 16, seed=1)
    (tmp_path / "photos" / "b" / "0000.jpg").rename(tmp_path / "photos" / "b" / '"><script>.jpg')
    guide = {"name": "semantic_pairs", "control": "label", "share": 1.0,
             "boxes": {"name": "saliency", "warmup": 1, "interval": 1, "size": 64}}  # fmt: skip
    data = {"kind": "folder", "path": str(tmp_path / "photos"), "val_share": 0.25}
    changes = {"run": {"epochs": 2, "evaluate_every": 2}, "optim": {"lr": 0.1, "batch": 12}}
    pretrain(config_file.load(small_config(tmp_path, data, guide=guide, views=PARTNERS, **changes)))
    found = Page(tmp_path / "run" / PAGE)
    assert found.has("semantic pairs and salient regions", "<i>a", "no IoU and CorLoc (they need true boxes")
    assert not found.has("Best and worst localised")
    assert len(found.pictures()) == 12 + 2 * 6 + 1
    _, lines = recorded(tmp_path / "run", "pairs")
    pairs = [[each.caption.split(", class ") for each in line] for _, line in lines]
    assert len(pairs) == 6
    assert all(one[1] == other[1] and one[0] != other[0] for one, other in pairs)


def test_what_is_damaged_or_hostile_costs_its_own_part_only(run):
    bad_list.save(run / "quarantine.txt", {f"/a/{HOSTILE}{n}.jpg": f"cut off {HOSTILE}" for n in range(60)})
    followed = json.loads((run / "history" / "followed.json").read_text())
    followed["lines"][0][1][0] |= {"caption": HOSTILE, "jpg": "https://example.org/x.jpg"}
    (run / "history" / "followed.json").write_text(json.dumps(followed))
    (run / "history" / "localised.json").write_text('{"step": 3, "lines": [["Best", [{"name": 1}]]]}')
    (run / "config.yaml").write_text("run: {out: x, of_another_version: 1}\n")
    (run / "history" / "events.jsonl").write_text('{"step": 0, "event": "start"}\n{"step": 9, "ev')
    (run / "pictures" / "epoch-0009.png").write_bytes(b"no picture")
    (run / "evaluations.jsonl").write_text(json.dumps({"evaluation": "knn", "step": 9, "x": HOSTILE}))
    found = remade(run)
    assert found.has(
        "could not be read: 60", "and 10 more in quarantine", "Evaluations", "of_another_version",
        "no end noted: still going, or killed",
    )  # fmt: skip
    assert found.text.count(f"cut off {HOSTILE}") == 50
    assert len(found.pictures()) == 12
    assert found.text.count("A part is missing here") == 2  # the boxes of the evaluation, and its views


GAPS = [{"step": 10 * n, "loss": value} for n, value in enumerate([1.0, np.nan, 3.0, np.inf, 2.0, 2.0])]
TINY = {"step": 0, "guide_area_median": 0.007, "guide_whole": 0.0, "guide_cell": 1 / 256}
GAPS += [{"step": 7, "loss": None, "lr": "word"}, {"step": 70, "embedding_std": np.nan}]


@pytest.mark.parametrize(
    ("entries", "names", "told"),
    [
        ([], [], "Nothing has been noted yet"),
        ([{"step": 1, "loss": 2.5, "lr": 0.1}], ["Loss", "Learning rate"], "no evaluations"),
        ([TINY], ["Box area, share of the image"], "Boxes are tiny (the median is 0.7%"),
        (GAPS, ["Loss"], "2 values are no finite numbers"),
        ([{"step": n, "loss": n % 7 - 3.0} for n in range(100_000)], ["Loss"], "means of stretches"),
    ],
)
def test_metrics_of_any_kind_are_drawn(run, entries, names, told):
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = remade(run)
    assert [each["aria-label"] for each in found.tags("svg", role="img")] == names
    assert found.has(told)
    assert (run / PAGE).stat().st_size < 3_000_000


def test_thinning_keeps_means_and_extremes_and_tells_gaps():
    values = np.random.default_rng(0).normal(size=10_000)
    values[5_000], values[2_000:4_000] = 99, np.nan
    x, mean, low, high = thinned((np.arange(10_000.0), values), 100)
    np.testing.assert_allclose(x, np.arange(49.5, 10_000, 100))
    parts, known = values.reshape(100, 100), ~np.isnan(mean)
    assert (~known).nonzero()[0].tolist() == list(range(20, 40))
    np.testing.assert_allclose(mean[known], parts[known].mean(1))
    assert (low[known] == parts[known].min(1)).all()
    assert (high[known] == parts[known].max(1)).all()


def test_samples_are_followed_by_the_seed_and_outlast_their_images(tmp_path):
    photos = noise_images(tmp_path / "photos", 40)
    index = SampleIndex.from_folder(photos, cache=False, progress=False)
    first, other = (History(tmp_path / str(seed), index, seed, 0).rows.tolist() for seed in (0, 1))
    shutil.rmtree(photos)
    assert History(tmp_path / "again", index, 0, 0).rows.tolist() == first != other
    ((_, pictures),) = recorded(tmp_path / "again", "followed")[1]
    assert ["not readable" in picture.caption for picture in pictures] == [True] * 12


def test_no_run_and_no_library_of_wandb_are_told(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["pretrain", str(small_config(tmp_path, scenes, run={"wandb": "views"}))]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluations_are_in_percent_with_what_was_changed_for_them(run):
    line = {"evaluation": "knn", "encoder": "trained", "step": 9, "k": 20, "top1": 0.4567}
    lines = [{**line, "overrides": changes} for changes in ([], ["data.eval_val=other"])]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = remade(run)
    assert found.text.count("k 20, top1 45.7%") == 2
    assert found.text.count("data.eval_val=other") == 1
    assert not found.has("0.4567")
