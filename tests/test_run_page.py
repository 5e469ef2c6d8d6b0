"""The page of a run: of real runs, of killed and resumed ones, and of metrics of any kind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from by_hand import finish, start
from conftest import noise_images
from pages import Page, small_config
from runs import SMALL, scenes_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dali_views import SampleIndex, bad_list
from trainers import cli
from trainers.config import file as config_file
from trainers.engine import checkpoint
from trainers.pretrain import pretrain
from trainers.report import PAGE
from trainers.report.history import History, lines_of, recorded
from trainers.report.page import curves_of, draw, thinned
from trainers.report.report import check_wandb

SECTIONS = ("Curves", "How the boxes moved", "Best and worst localised", "Views of the latest evaluation",
            "Machine and configuration")  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:half of the boxes")
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


def made_anew(run: Path) -> Page:
    """The page as the command makes it of what is in the folder."""
    assert cli.main(["report", str(run)]) == 0
    found = Page(run / PAGE)
    found.check_alone()
    return found


def test_a_run_leaves_a_page_with_all_that_it_has_to_show(undisturbed):
    found = Page(undisturbed / PAGE)
    found.check_alone()
    for section in SECTIONS:
        assert section in found.words
    for absent in ("Semantic pairs", "Images that could not be read"):
        assert absent not in found.text
    assert "SimCLR" in found.text or "MoCo" in found.text
    assert "ContrastiveCrop" in found.text
    assert "finished after 9 steps" in found.text
    drawn = [each for each in found.tags("svg") if each.get("role") == "img"]
    for title in (
        "Loss",
        "kNN accuracy",
        "IoU with true boxes",
        "Learning rate",
        "Effective rank of the embeddings",
    ):
        assert title in [each["aria-label"] for each in drawn]
    pictures = found.pictures()
    assert len(pictures) == 12 + 2 * 6 + 1
    assert min(min(picture.size) for picture in pictures) >= 40
    assert "numpy" in found.text  # versions
    assert (undisturbed / PAGE).stat().st_size < 3_000_000


def test_followed_boxes_are_those_of_the_region_table(undisturbed):
    shown = lines_of(undisturbed / "history" / "boxes.jsonl")
    assert [line["epoch"] for line in shown] == [1, 2]  # passes of the guide; the last epoch has none
    boxes = checkpoint.load(undisturbed)["regions"]["boxes"][:, 0].numpy()
    rows = json.loads((undisturbed / "history" / "followed.json").read_text())["rows"]
    assert len(set(rows)) == 12
    np.testing.assert_allclose(shown[-1]["boxes"], boxes[rows], atol=1e-4)
    drawn = [each for each in Page(undisturbed / PAGE).tags("rect") if each.get("class") == "strong"]
    assert len({each["stroke"] for each in drawn}) == 2 + 1  # two epochs, and boxes of the evaluation


def test_tensorboard_has_the_curves_and_pictures_of_the_page(undisturbed):
    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    assert set(curves_of(undisturbed / "metrics.jsonl")) == set(events.Tags()["scalars"])
    assert {"views", "followed", "localised"} == set(events.Tags()["images"])


def test_a_stopped_run_says_so_and_goes_on_to_the_page_of_one_never_stopped(undisturbed, scenes, tmp_path):
    file = small_config(tmp_path, scenes, run={"evaluate_every": 3})
    pretrain(config_file.load(file, ["run.max_steps=4"]))
    run = tmp_path / "run"
    assert "stopped at run.max_steps after 4 of 9 steps" in Page(run / PAGE).text
    # What a process leaves that went on and was killed while it wrote.
    with (run / "history" / "boxes.jsonl").open("a") as boxes:
        boxes.write('{"step": 6, "epoch": 2, "boxes": [null]}\n{"step": 9, "epo')
    shutil.copy(undisturbed / "history" / "localised.json", run / "history")
    pretrain(config_file.load(file), resume=True)
    for name in ("boxes.jsonl", "followed.json", "localised.json"):
        assert (run / "history" / name).read_bytes() == (undisturbed / "history" / name).read_bytes()
    found = Page(run / PAGE)
    assert "finished after 9 steps" in found.text
    assert [event["event"] for event in lines_of(run / "history" / "events.jsonl")] == [
        "start", "end", "start", "end",
    ]  # fmt: skip


def test_of_a_killed_run_the_command_shows_what_is_there(scenes, tmp_path):
    file = small_config(tmp_path, scenes, run={"epochs": 500, "log_every": 1})
    (process,) = start(1, tmp_path, cli.main, lambda rank: [["pretrain", str(file)]])
    boxes = tmp_path / "run" / "history" / "boxes.jsonl"
    while process.is_alive() and not (boxes.exists() and boxes.read_text().count("\n") > 1):
        pass
    os.kill(process.pid, signal.SIGKILL)
    assert finish([process]) == [-signal.SIGKILL], (tmp_path / "0.log").read_text()
    assert not (tmp_path / "run" / PAGE).exists()  # no evaluation, and no end
    found = made_anew(tmp_path / "run")
    assert "no end noted: still going, or killed" in found.text
    assert "There are no evaluations (run.evaluate_every is 0)." in found.text
    assert len(found.pictures()) == 12


def test_a_failed_run_names_the_failure(scenes, tmp_path):
    file = small_config(tmp_path, scenes, optim={"name": "sgd", "lr": 1e30, "lr_scaling": False, "batch": 16})
    with pytest.raises(FloatingPointError):
        pretrain(config_file.load(file))
    assert "failed: FloatingPointError: the loss is" in Page(tmp_path / "run" / PAGE).text


def test_a_guide_that_fails_before_the_first_step_is_named_too(scenes, tmp_path):
    guide = {"name": "semantic_pairs", "encoder": str(tmp_path / "nowhere")}
    file = small_config(tmp_path, scenes, guide=guide, views={**SMALL["views"], "partner": True})
    with pytest.raises(FileNotFoundError):
        pretrain(config_file.load(file))
    assert "failed: FileNotFoundError: there is no checkpoint" in Page(tmp_path / "run" / PAGE).text


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
    views = {**SMALL["views"], "partner": True}
    data = {"kind": "folder", "path": str(tmp_path / "photos"), "val_share": 0.25}
    length = {"epochs": 2, "evaluate_every": 2}
    pretrain(config_file.load(small_config(tmp_path, data, guide=guide, views=views, run=length,
                                           optim={"lr": 0.1, "batch": 12})))  # fmt: skip
    found = Page(tmp_path / "run" / PAGE)
    found.check_alone()
    assert "semantic pairs and salient regions" in found.text
    assert "<i>a" in found.text
    pairs = [
        [each.caption.split(", class ") for each in line]
        for _, line in recorded(tmp_path / "run", "pairs")[1]
    ]
    assert len(pairs) == 6
    assert all(one[1] == other[1] and one[0] != other[0] for one, other in pairs)
    assert len(found.pictures()) == 12 + 2 * 6 + 1
    assert "Best and worst localised" not in found.text
    assert "no IoU and CorLoc (they need true boxes" in found.text


def test_every_method_and_guide_has_a_headline(run):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    methods = ("simclr", "moco", "byol", "simsiam", "dino", "scfs")
    guides = ("none", "contrastive_crop", "online_crop", "saliency", "simccrop", "true_boxes")
    headlines = []
    for method, guide in zip(methods, guides, strict=True):
        changed = {**tree, "method": {"name": method}, "guide": {"name": guide}}
        (run / "config.yaml").write_text(yaml.safe_dump(changed))
        words = made_anew(run).words
        headlines.append(words[words.index("run") + 1].split(" · ")[:2])
    assert [named.lower() for named, _ in headlines] == list(methods)
    assert len({guide for _, guide in headlines}) == len(guides)


def test_what_is_damaged_or_hostile_costs_its_own_part_only(run):
    bad = {f"/photos/{HOSTILE}{number}.jpg": f"cut off {HOSTILE}" for number in range(60)}
    bad_list.save(run / "quarantine.txt", bad)
    followed = json.loads((run / "history" / "followed.json").read_text())
    followed["lines"][0][1][0] |= {"caption": HOSTILE, "jpg": "https://example.org/x.jpg"}
    (run / "history" / "followed.json").write_text(json.dumps(followed))
    (run / "history" / "localised.json").write_text('{"step": 3, "lines": [["Best", [{"name": 1}]]]}')
    (run / "config.yaml").write_text("run: {out: x, of_another_version: 1}\n")
    (run / "pictures" / "epoch-0009.png").write_bytes(b"no picture")
    (run / "evaluations.jsonl").write_text(
        json.dumps({"evaluation": "knn", "step": 9, "top1": 0.5, "x": HOSTILE})
    )
    found = made_anew(run)
    assert "Images that could not be read: 60" in found.text
    assert "and 10 more in quarantine.txt" in found.text
    assert found.text.count(f"cut off {HOSTILE}") == 50
    assert len(found.pictures()) == 12
    assert "Evaluations" in found.words
    assert found.text.count("A part is missing here") == 2  # the boxes of the evaluation, and its views
    assert "of_another_version" in found.text


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("lines", ["nothing", "one", "gaps", "long"])
def test_metrics_of_any_kind_are_drawn(run, lines):
    draw_from = np.random.default_rng(0)
    entries: list[dict] = []
    if lines == "one":
        entries = [{"step": 1, "epoch": 0, "loss": 2.5, "lr": 0.1}]
    if lines == "gaps":
        values = [1.0, float("nan"), 3.0, float("inf"), 2.0, 2.0]
        entries = [{"step": 10 * n, "loss": value} for n, value in enumerate(values)]
        entries += [{"step": 7, "loss": None, "lr": "word"}, {"step": 70, "embedding_std": float("nan")}]
    if lines == "long":
        noise = draw_from.normal(size=(100_000, 4))
        entries = [
            {"step": n + 1, "loss": a, "lr": b, "wait_share": c, "images_per_second": d}
            for n, (a, b, c, d) in enumerate(noise.tolist())
        ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = made_anew(run)
    names = [each["aria-label"] for each in found.tags("svg") if each.get("role") == "img"]
    expected = {"nothing": [], "one": ["Loss", "Learning rate"], "gaps": ["Loss"]}
    assert names == expected.get(lines, names)
    if lines == "gaps":
        assert "2 values are no finite numbers" in found.text
    if lines == "long":
        assert len(names) == 4
        assert (run / PAGE).stat().st_size < 3_000_000
    if lines == "nothing":
        assert "Nothing has been noted yet" in found.text


def test_thinning_keeps_means_and_extremes_and_tells_gaps():
    values = np.random.default_rng(0).normal(size=10_001)
    values[5_000] = 99
    values[2_000:4_000] = np.nan
    steps = np.arange(10_001.0)
    x, mean, low, high = thinned((steps, values), 100)
    assert len(x) == 100
    assert (np.diff(x) > 0).all()
    assert np.nanmax(high) == 99
    assert np.nanmin(low) == np.nanmin(values)
    assert 15 <= np.isnan(mean).sum() <= 20
    known = ~np.isnan(mean)
    assert ((low <= mean) & (mean <= high))[known].all()
    assert draw({"lr": (steps, values)}, "Loss", {"loss": "loss"}) is None


def test_samples_are_followed_by_the_seed_and_outlast_their_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    arrays = SampleIndex.from_arrays(pixels, [0] * 40, ["ant"])
    rows = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        rows.append(History(tmp_path / name, arrays, seed, 0).rows.tolist())
    assert rows[0] == rows[1] != rows[2]

    photos = noise_images(tmp_path / "photos", 20)
    index = SampleIndex.from_folder(photos, cache=False, progress=False)
    shutil.rmtree(photos)
    (tmp_path / "d").mkdir()
    history = History(tmp_path / "d", index, 0, 0)
    pictures = [picture for _, line in recorded(tmp_path / "d", "followed")[1] for picture in line]
    assert len(history.rows) == len(pictures) == 12
    assert all("not readable" in picture.caption for picture in pictures)


def test_a_resumed_history_has_nothing_of_the_steps_to_come(undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    index = SampleIndex.load(run / "index.safetensors")
    History(run, index, 0, 9)
    assert len(lines_of(run / "history" / "boxes.jsonl")) == 2
    assert (run / "history" / "localised.json").exists()
    History(run, index, 0, 4)
    assert [line["step"] for line in lines_of(run / "history" / "boxes.jsonl")] == [3]
    assert not (run / "history" / "localised.json").exists()
    assert (run / "history" / "followed.json").exists()
    assert "Best and worst localised" not in made_anew(run).text


def test_without_the_library_a_run_for_wandb_ends_at_once(scenes, tmp_path, capsys):
    try:
        check_wandb()
        pytest.skip("Weights & Biases is installed")
    except ValueError:
        pass
    file = small_config(tmp_path, scenes, run={"wandb": "views"})
    assert cli.main(["pretrain", str(file)]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
