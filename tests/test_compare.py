"""Comparisons of real tiny runs: what the table says, what is refused, and what survives a kill."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import lines_of, once, signalled

from dali_views.tools.scenes import CLASSES, make_scenes
from trainers.compare import compare
from trainers.compare_measures import Measures
from trainers.compare_table import Row, Run, mean_and_deviation, paired, standard_error, table
from trainers.engine import checkpoint

# Two of eight scenes are trained on, one step per epoch; six are classified.
TREE: dict[str, dict[str, Any]] = {
    "run": {"epochs": 2, "evaluate_every": 2, "log_every": 1, "device": "cpu", "threads": 1, "out": "none"},
    "views": {"size": 16, "crop": "contrastive", "blur": 0},
    "model": {"backbone": "resnet10"},
    "method": {"name": "simclr"},
    "guide": {"name": "contrastive_crop", "warmup": 1, "interval": 1, "size": 64, "skip_whole": False},
    "optim": {"name": "sgd", "lr": 0.1, "batch": 2, "lr_scaling": False},
    "probe": {"epochs": 1, "batch": 2, "augment": False},
}
NEVER = {"warmup": 99}  # no box is written, so crops stay random
# Its tiny networks look at whole images.
pytestmark = pytest.mark.filterwarnings("ignore:half of the boxes")


def write(file: Path, data: dict[str, Any], **changes: dict[str, Any]) -> Path:
    """A configuration; `changes` are by section."""
    tree = {**TREE, "data": data}
    tree |= {section: {**tree.get(section, {}), **keys} for section, keys in changes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    return file


def data_in(folder: Path) -> dict[str, Any]:
    images, instances = folder / "scenes" / "images", folder / "scenes" / "instances.json"
    if not images.exists():
        make_scenes(folder / "scenes", 8, size=48)
    return {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0.75}


def compared(folder: Path) -> list[Row]:
    """Random and guided crops, two seeds, all evaluations, in `folder`/out; continued if it was begun."""
    data = data_in(folder)
    configs = [write(folder / "random.yaml", data, guide=NEVER), write(folder / "guided.yaml", data)]
    return compare(configs, 2, folder / "out", evaluations=("knn", "linear"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole comparison."""
    return once(tmp_path_factory, "comparison", compared)


@pytest.fixture
def data(done: Path) -> dict[str, Any]:
    return data_in(done)


def times(out: Path) -> dict[Path, int]:
    """When the checkpoints of runs and probes were written."""
    return {file: file.stat().st_mtime_ns for file in out.rglob("last.pt")}


def csv_of(out: Path) -> list[dict[str, str]]:
    with (out / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def test_table_and_csv_hold_what_the_runs_wrote_down_and_given_again_nothing_trains(done, tmp_path):
    out = done / "out"
    stamps, before = times(out), (out / "compare.csv").read_bytes()
    rows = compared(done)
    assert len(stamps) == 8
    assert times(out) == stamps
    assert (out / "compare.csv").read_bytes() == before
    assert [(row.name, [run.seed for run in row.runs]) for row in rows] == [
        ("untrained", [0, 1]), ("random", [0, 1]), ("guided", [0, 1]),
    ]  # fmt: skip
    for line, run in zip(csv_of(out), [run for row in rows for run in row.runs], strict=True):
        folder = out / ("random" if run.config == "untrained" else run.config) / f"seed-{run.seed}"
        log = lines_of(folder)
        measured = log[0] if run.config == "untrained" else log[-1]
        assert measured["step"] == run.step == (0 if run.config == "untrained" else 2)
        for score in ("knn_top1", "knn_top5", "iou", "corloc", "box_area"):
            assert getattr(run, score) == float(line[score]) == measured[score]
        if run.config == "untrained":
            assert run.linear_top1 is run.seconds is None
            assert line["linear_top1"] == line["seconds"] == ""
            continue
        assert float(line["linear_top1"]) == checkpoint.load(folder / "linear")["curve"][-1]["top1"]
        assert (checkpoint.load(folder)["regions"]["writes"] == run.extra_passes).all()
        assert run.extra_passes == (1 if run.config == "guided" else 0)
        assert run.seconds > 0
        assert (line["threads"], line["processes"], line["device"]) == ("1", "1", "cpu")
        assert "DALI" in line["machine"]
        assert "2 epochs, batch 2, resnet10 at 16 pixels" in line["budget"]
    assert (out / "compare.md").read_text() == table(rows) + "\n"


def test_killed_between_runs_and_started_again_it_repeats_none_and_fills_the_table_up(done, tmp_path):
    out = shutil.copytree(done / "out", tmp_path / "out")
    whole = csv_of(out)
    shutil.rmtree(out / "guided" / "seed-1")  # as a kill before the last run leaves it
    with (out / "random" / "seed-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # as a kill leaves a line
    stamps = times(out)
    compare([done / "random.yaml", done / "guided.yaml"], 2, out, evaluations=("knn", "linear"))
    assert stamps.items() < times(out).items()
    assert csv_of(out)[:-1] == whole[:-1]
    assert csv_of(out)[-1]["linear_top1"] == whole[-1]["linear_top1"]


def test_a_signal_ends_the_comparison_after_the_step_and_the_rows_say_so(data, tmp_path):
    configs = [write(tmp_path / f"{name}.yaml", data, run={"evaluate_every": 0}) for name in ("one", "two")]
    run = tmp_path / "out" / "one" / "seed-0"
    with signalled(signal.SIGTERM, run, 3):
        (row,) = compare(configs, 2, tmp_path / "out", ["run.epochs=300"])
    (ended,) = row.runs
    assert ended.stopped
    assert ended.failure.startswith(f"stopped after {checkpoint.load(run)['step']} steps; the same command")
    assert not (tmp_path / "out" / "two").exists()
    assert ended.failure in (tmp_path / "out" / "compare.md").read_text()


def test_seconds_add_up_and_scores_are_those_of_the_last_step_wherever_a_run_is_cut(done, data, tmp_path):
    configs, out = [write(tmp_path / "arm.yaml", data, run={"evaluate_every": 0})], tmp_path / "out"
    run = out / "arm" / "seed-0"

    def only(*changes: str) -> Run:
        ((found,),) = [row.runs for row in compare(configs, 1, out, changes)]
        return found

    short = only("run.max_steps=1")
    assert not short.failure
    assert short.step == 1
    assert lines_of(run)[-1]["knn_top1"] == short.knn_top1
    record = run / "compare.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "seconds": 1000.0}))
    longer = only()
    assert longer.step == 2
    assert short.seconds < 1000 < longer.seconds
    whole = next(line for line in csv_of(done / "out") if line["config"] == "guided")  # never cut
    assert (longer.knn_top1, longer.iou) == (float(whole["knn_top1"]), float(whole["iou"]))
    assert longer.extra_passes == int(whole["extra_passes"])
    assert [line["step"] for line in lines_of(run) if "iou" in line] == [1, 2]
    late = only("run.max_steps=1")
    assert "took 2 steps, more than run.max_steps" in late.failure
    assert late.knn_top1 is None


def test_a_diverging_run_is_noted_with_the_reason_and_the_others_go_on_and_equal_stems_are_told_apart(
    done, data, tmp_path
):
    # Reads its loss at no step: its weights give it away.
    quick = {"log_every": 100, "evaluate_every": 0}
    wild = write(tmp_path / "a" / "arm.yaml", data, optim={"lr": 1e30}, run=quick)
    steady = write(tmp_path / "b" / "arm.yaml", data, guide=NEVER, run={"evaluate_every": 0})
    out = tmp_path / "out"
    shutil.copytree(done / "out" / "random", out / "b" / "arm")  # finished, so that it is quick
    failed, fine = compare([wild, steady], 1, out)
    reason = failed.runs[0].failure
    assert reason.startswith("FloatingPointError: ")
    assert "optim.lr" in reason
    assert not failed.values("knn_top1")
    assert fine.runs[0].knn_top1 == float(csv_of(done / "out")[2]["knn_top1"])
    assert [(line["config"], line["failure"]) for line in csv_of(out)] == [("a/arm", reason), ("b/arm", "")]
    (shown,) = [line for line in (out / "compare.md").read_text().splitlines() if line.startswith("| a/arm ")]
    assert "| 0 of 1 |" in shown
    assert f"a/arm, seed 0: {reason}" in (out / "compare.md").read_text()


@pytest.mark.slow
def test_map_labelled_sets_and_a_detector_are_measures_which_are_taken_once(tmp_path):
    images, instances = make_scenes(tmp_path / "scenes", 16, 48, CLASSES[:2])
    data = {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0.5}
    quick = {"epochs": 1, "evaluate_every": 0}
    configs = [
        write(tmp_path / f"{name}.yaml", data, run=quick, **more)
        for name, more in (("random", {"guide": NEVER}), ("guided", {}))
    ]
    small = {"size": 32, "longest": 32, "anchors": [8, 12, 16, 20, 24], "width": 8, "batch": 2, "steps": 2}
    detector, sets = tmp_path / "detector.yaml", tmp_path / "sets.yaml"
    detector.write_text(yaml.safe_dump({"detect": {**small, "drops": [1], "warmup": 1, "rois": 8}}))
    sets.write_text(yaml.safe_dump({"one": {"data": data}, "other": {"torchvision": "DTD", "root": "none"}}))
    out, measures = tmp_path / "out", Measures(True, sets, (detector,))
    rows = compare(configs, 1, out, measures=measures)
    assert [run.failure for row in rows for run in row.runs] == ["", ""]
    for run in (run for row in rows for run in row.runs):
        assert None not in (run.map, run.transfer, run.box_ap, run.mask_ap)
        assert len(lines_of(out / run.config / "seed-0" / "detect")) > 0
    head = (out / "compare.md").read_text().splitlines()[0]
    assert [name in head for name in ("mAP %", "transfer %", "box AP %", "mask AP %")] == [True] * 4
    stamps = times(out)
    assert compare(configs, 1, out, measures=measures) == rows
    assert times(out) == stamps
    sets.write_text("one: {torchvision: DTT}")
    with pytest.raises(ValueError, match="torchvision DTT is not read"):
        compare(configs, 1, tmp_path / "never", measures=measures)
    assert not (tmp_path / "never").exists()


def test_mistakes_and_unequal_budgets_are_told_before_anything_trains(data, tmp_path):
    one, same = write(tmp_path / "one.yaml", data), tmp_path / "two" / ".." / "one.yaml"
    simclr, byol, dino, misspelt, small = (
        write(tmp_path / f"{name}.yaml", data, **changes)
        for name, changes in (
            ("simclr", {"views": {"size": 128}}),
            ("byol", {"views": {"size": 128}, "method": {"name": "byol"}}),
            ("dino", {"views": {"size": 128, "name": "dino"}, "method": {"name": "dino"}}),
            ("misspelt", {"optim": {"rate": 1}}),
            ("small", {"model": {"stem": "small"}, "run": {"max_steps": 1}, "optim": {"batch": 8}}),
        )
    )
    other = write(tmp_path / "other.yaml", {**data, "val_share": 0.5})
    for configs, seeds, changes, told in (
        ([one, other], 1, [], r"other has another data\.val_share than one.*--unequal"),
        ([one, small], 1, [], r"small has another model\.stem, optim\.batch, run\.max_steps than one"),
        ([one, misspelt], 1, [], r"optim\.rate is not a known key"),
        ([simclr, byol], 1, ["probe.recipe=published"], r"probe\.recipe \(published follows the method\)"),
        ([simclr, dino], 1, [], r"knn\.k or knn\.temperature \(absent, they follow the method\)"),
        ([one, same], 1, [], "named twice"),
        ([one], 0, [], "0 seeds"),
        ([one], 1, ["run.seed=3"], r"run\.seed and run\.out"),
    ):
        with pytest.raises(ValueError, match=told):
            compare(configs, seeds, tmp_path / "out", changes, evaluations=["linear"])
    assert not (tmp_path / "out").exists()


def test_statistics_are_those_worked_by_hand():
    assert mean_and_deviation([0.25]) == (0.25, None)
    assert mean_and_deviation([1, 2, 6]) == (3, pytest.approx(7**0.5))  # (4 + 1 + 9) / 2
    # Differences 1, 3 and 8: mean 4, deviations -3, -1 and 4, variance 26 / 2, error sqrt(13 / 3).
    one, other = {0: 2.0, 1: 5.0, 2: 9.0, 7: 100.0}, {2: 1.0, 1: 2.0, 0: 1.0}
    assert sorted(paired(one, other)) == [1, 3, 8]
    assert standard_error([1, 3, 8]) == pytest.approx((13 / 3) ** 0.5)
    assert standard_error([0.5]) is None
    assert paired({0: 2.0}, {1: 1.5}) == []


def cells(*rows: Row) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table(rows).splitlines()]


def arm(name: str, *top: float, **more: float) -> Row:
    """Seeds 0, 1, ... with these kNN accuracies."""
    return Row(name, tuple(Run(name, seed, knn_top1=value, **more) for seed, value in enumerate(top)))


def test_the_table_marks_the_best_and_gives_differences_paired_by_seed():
    a, b = arm("a", 0.5, 0.6, 0.7, iou=0.5, seconds=9), arm("b", 0.55, 0.75, 0.8, iou=0.25, seconds=5)
    untrained = Row("untrained", (Run("untrained", 0, knn_top1=0.9),), reference=True)
    head, _, reference, first, second, apart, *_ = cells(untrained, a, b)
    assert head == ["seeds", "kNN top-1 %", "IoU", "seconds"]
    assert reference == ["untrained", "1", "90.00", "-", "-"]
    assert first == ["a", "3", "60.00 ± 10.00", "0.500 ± <0.001*", "9"]
    assert second == ["b", "3", "70.00 ± 13.23*", "0.250 ± <0.001", "5"]
    # 5, 15 and 10 points more: mean 10, deviation 5, error 5 / sqrt(3).
    assert apart[:4] == ["b - a", "3", "+10.00 ± 2.89", "-0.250 ± <0.001"]


def test_two_seeds_stand_side_by_side_and_a_difference_within_its_error_has_no_winner():
    _, _, first, second, third, apart, *_ = cells(
        arm("a", 0.5, 0.6, queries=200), arm("b", 0.52, 0.585, queries=200), arm("c", 0.4, 0.45, queries=200)
    )
    assert first[2] == "55.00 (50.00, 60.00)*"
    assert second[2] == "55.25 (52.00, 58.50)*"
    assert third[2] == "42.50 (40.00, 45.00)"
    assert apart[:3] == ["b - a", "2", "+0.25 (+2.00, -1.50)"]
    starred = [
        row[2].endswith("*") for row in cells(arm("a", 0.5, queries=200), arm("b", 0.505, queries=200))[2:4]
    ]
    assert starred == [True, True], "one image of 200 decides nothing"
    text = table([arm("a", 0.5, queries=200), arm("b", 0.52, queries=200)])
    assert "50.00 " in text
    assert "52.00*" in text
    assert "200 images are classified: one is 0.5 points." in text


def test_scores_of_boxes_that_are_read_differently_are_neither_ranked_nor_subtracted():
    a = Run("a", 0, knn_top1=0.5, iou=0.5, localisation="layer3 at 64 pixels")
    b = Run("b", 0, knn_top1=0.6, iou=0.6, localisation="last stage at 32 pixels")
    text = table([Row("a", (a,)), Row("b", (b,))])
    assert "60.00*" in text
    assert "0.600*" not in text
    assert "a layer3 at 64 pixels; b last stage at 32 pixels" in text
