"""Comparisons of real tiny runs: what the table says, what is refused, and what survives a kill."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dali_views.tools.scenes import make_scenes
from trainers.compare import _evaluations, compare
from trainers.compare_table import Row, table
from trainers.config import file as config_file
from trainers.engine import checkpoint

ROOT = Path(__file__).resolve().parents[1]
# Two of eight scenes are trained on, one step per epoch; six are asked.
TREE: dict[str, dict[str, Any]] = {
    "run": {"epochs": 2, "evaluate_every": 2, "log_every": 1, "device": "cpu", "threads": 1, "out": "none"},
    "views": {"size": 16, "crop": "contrastive", "blur": 0},
    "model": {"backbone": "resnet10"},
    "method": {"name": "simclr"},
    "guide": {"name": "contrastive_crop", "warmup": 1, "interval": 1, "size": 64},
    "optim": {"name": "sgd", "lr": 0.1, "batch": 2, "lr_scaling": False},
    "probe": {"epochs": 1, "batch": 2, "augment": False},
}
NEVER = {"warmup": 99}  # no box is written, so crops stay random
# Its tiny networks look at whole images.
pytestmark = pytest.mark.filterwarnings("ignore:half of the boxes")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    images, instances = make_scenes(tmp_path_factory.mktemp("scenes"), 8, size=48)
    return {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0.75}


def write(file: Path, data: dict[str, Any], **changes: dict[str, Any]) -> Path:
    """A configuration; `changes` are by section."""
    tree = {**TREE, "data": data}
    tree |= {section: {**tree.get(section, {}), **keys} for section, keys in changes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    return file


def compared(folder: Path, data: dict[str, Any]) -> list[Row]:
    """Random and guided crops, two seeds, all evaluations."""
    configs = [write(folder / "random.yaml", data, guide=NEVER), write(folder / "guided.yaml", data)]
    return compare(configs, 2, folder / "out", evaluations=("knn", "linear"))


class Done(NamedTuple):
    out: Path
    rows: list[Row]
    """Of a comparison that was killed between its second and third run, and started again."""
    saved: list[dict[str, str]]
    """Lines of compare.csv when it was killed."""
    stamps: dict[Path, int]
    """When each checkpoint that stood there then had been written."""


@pytest.fixture(scope="module")
def done(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("done")
    out = folder / "out"
    script = f"import test_compare; test_compare.compared(test_compare.Path({str(folder)!r}), {data!r})"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as process:
        begun = (
            line for line in process.stdout if "images in" in line
        )  # every run begins by telling its data
        assert len(list(islice(begun, 3))) == 3
        process.kill()
    assert process.returncode == -signal.SIGKILL
    saved, stamps = lines(out), times(out)
    return Done(out, compared(folder, data), saved, stamps)


def times(out: Path) -> dict[Path, int]:
    """When the checkpoints of runs and probes were written."""
    return {file: file.stat().st_mtime_ns for file in out.rglob("last.pt")}


def lines(out: Path) -> list[dict[str, str]]:
    with (out / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_table_and_csv_hold_what_the_runs_wrote_down(done):
    out, rows = done.out, done.rows
    assert [(row.name, [run.seed for run in row.runs]) for row in rows] == [
        ("untrained", [0, 1]), ("random", [0, 1]), ("guided", [0, 1]),
    ]  # fmt: skip
    written = lines(out)
    assert len(written) == 6
    for line, run in zip(written, [run for row in rows for run in row.runs], strict=True):
        folder = out / ("random" if run.config == "untrained" else run.config) / f"seed-{run.seed}"
        log = logged(folder)
        measured = log[0] if run.config == "untrained" else log[-1]
        assert measured["step"] == run.step == (0 if run.config == "untrained" else 2)
        for score in ("knn_top1", "knn_top5", "iou", "corloc", "box_area"):
            assert getattr(run, score) == float(line[score]) == measured[score]
        if run.config == "untrained":
            assert run.linear_top1 is run.seconds is None
            assert line["linear_top1"] == line["seconds"] == ""
            continue
        saved = checkpoint.load(folder)
        rates = [entry["images_per_second"] for entry in log if "images_per_second" in entry]
        # A guide's pass after each of two epochs of a step leaves nothing to measure between them.
        assert run.images_per_second == (statistics.median(rates) if rates else None)
        assert line["images_per_second"] == (
            "" if run.images_per_second is None else str(run.images_per_second)
        )
        assert float(line["linear_top1"]) == checkpoint.load(folder / "linear")["curve"][-1]["top1"]
        assert (saved["regions"]["writes"] == run.extra_passes).all()
        assert run.extra_passes == (1 if run.config == "guided" else 0)
        assert run.seconds > 0
        assert (line["threads"], line["processes"], line["device"]) == ("1", "1", "cpu")
        assert "DALI" in line["machine"]
        assert "torch" in line["machine"]
        assert "2 epochs, batch 2, resnet10 at 16 pixels" in line["budget"]
    text = table(rows)
    assert (out / "compare.md").read_text() == text + "\n"
    for row in rows:
        tops = [100 * top for top in row.values("knn_top1").values()]
        (shown,) = [line for line in text.splitlines() if line[2:].split(" |")[0].rstrip() == row.name]
        assert f"{statistics.mean(tops):.2f} ± {statistics.stdev(tops):.2f}" in shown
    assert "| guided - random |" in text


def test_killed_between_runs_and_started_again_it_repeats_none_and_fills_the_table_up(done):
    assert [(line["config"], line["seed"]) for line in done.saved] == [
        ("untrained", "0"), ("random", "0"), ("guided", "0"),
    ]  # fmt: skip
    assert len(done.stamps) == 4
    assert done.stamps.items() <= times(done.out).items()
    assert [line for line in lines(done.out) if line["seed"] == "0"] == done.saved


def test_a_line_of_metrics_that_a_kill_cut_off_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "knn_top1": 0.5}\n{"step": 3, "lo')
    assert _evaluations(tmp_path) == [(2, {"knn_top1": 0.5})]


def test_given_again_when_all_is_done_it_trains_nothing_and_gives_the_same_table(done, data):
    stamps, before = times(done.out), (done.out / "compare.csv").read_bytes()
    assert len(stamps) == 8
    assert compared(done.out.parent, data) == done.rows
    assert (done.out / "compare.csv").read_bytes() == before
    assert times(done.out) == stamps


def test_a_signal_ends_the_comparison_after_the_step_and_the_rows_say_so(data, tmp_path):
    configs = [write(tmp_path / f"{name}.yaml", data, run={"evaluate_every": 0}) for name in ("one", "two")]
    run, over = tmp_path / "out" / "one" / "seed-0", threading.Event()

    def interrupt() -> None:
        metrics = run / "metrics.jsonl"
        while not over.is_set():
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        (row,) = compare(configs, 2, tmp_path / "out", ["run.epochs=300"])
    finally:
        over.set()
        thread.join()
    (ended,) = row.runs
    assert ended.stopped
    assert ended.failure.startswith(f"stopped after {checkpoint.load(run)['step']} steps; the same command")
    assert not (tmp_path / "out" / "two").exists()
    assert ended.failure in (tmp_path / "out" / "compare.md").read_text()


def test_seconds_add_up_and_scores_are_those_of_the_last_step_wherever_a_run_is_cut(done, data, tmp_path):
    configs, out = [write(tmp_path / "arm.yaml", data, run={"evaluate_every": 0})], tmp_path / "out"
    ((short,),) = [row.runs for row in compare(configs, 1, out, ["run.max_steps=1"])]
    assert not short.failure
    assert short.step == 1
    assert logged(out / "arm" / "seed-0")[-1]["knn_top1"] == short.knn_top1
    record = out / "arm" / "seed-0" / "compare.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "seconds": 1000.0}))
    ((longer,),) = [row.runs for row in compare(configs, 1, out)]
    assert longer.step == 2
    assert short.seconds < 1000 < longer.seconds
    whole = done.rows[2].runs[0]  # the same configuration, never cut
    assert (longer.knn_top1, longer.iou, longer.extra_passes) == (
        whole.knn_top1,
        whole.iou,
        whole.extra_passes,
    )
    assert [line["step"] for line in logged(out / "arm" / "seed-0") if "iou" in line] == [1, 2]
    ((late,),) = [row.runs for row in compare(configs, 1, out, ["run.max_steps=1"])]
    assert "took 2 steps, more than run.max_steps" in late.failure
    assert late.knn_top1 is None


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_diverging_run_is_noted_with_the_reason_and_the_others_go_on(done, data, tmp_path, log_every):
    quick = {"log_every": log_every, "evaluate_every": 0}
    wild = write(tmp_path / "wild.yaml", data, optim={"lr": 1e30}, run=quick)
    steady = write(tmp_path / "random.yaml", data, guide=NEVER, run={"evaluate_every": 0})
    out = tmp_path / "out"
    shutil.copytree(done.out / "random", out / "random")  # finished, so that it is quick
    failed, fine = compare([wild, steady], 1, out)
    reason = failed.runs[0].failure
    assert reason.startswith("FloatingPointError: ")
    assert "optim.lr" in reason
    assert not failed.values("knn_top1")
    assert fine.runs[0].knn_top1 == done.rows[1].runs[0].knn_top1
    assert [line["failure"] for line in lines(out)] == [reason, ""]
    (shown,) = [line for line in (out / "compare.md").read_text().splitlines() if line.startswith("| wild ")]
    assert "| 0 of 1 |" in shown
    assert reason in shown


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "val_share", 0.5), ("optim", "batch", 8), ("run", "epochs", 3), ("run", "max_steps", 1),
        ("model", "stem", "small"), ("probe", "epochs", 2), ("run", "evaluate_every", 1),
        ("views", "size", 24),
    ],
)  # fmt: skip
def test_an_unequal_budget_is_refused_by_the_name_of_its_key(data, tmp_path, section, key, value):
    one = write(tmp_path / "one.yaml", data)
    changed = {**data, key: value} if section == "data" else data
    other = write(tmp_path / "other.yaml", changed, **({} if section == "data" else {section: {key: value}}))
    with pytest.raises(ValueError, match=rf"other has another {section}\.{key} than one.*--unequal"):
        compare([one, other], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_probe_whose_recipe_follows_the_method_is_no_equal_evaluation(data, tmp_path):
    one = write(tmp_path / "one.yaml", data, views={"size": 128})
    other = write(tmp_path / "other.yaml", data, views={"size": 128}, method={"name": "byol"})
    with pytest.raises(ValueError, match=r"probe\.recipe \(auto follows the method\)"):
        compare([one, other], 1, tmp_path / "out", evaluations=["linear"])


def test_mistakes_are_told_before_anything_trains(data, tmp_path):
    one, misspelt = write(tmp_path / "one.yaml", data), write(tmp_path / "two.yaml", data, optim={"rate": 1})
    with pytest.raises(config_file.ConfigError, match=r"optim\.rate is not a known key"):
        compare([one, misspelt], 1, tmp_path / "out")
    with pytest.raises(ValueError, match="named twice"):
        compare([one, tmp_path / "two" / ".." / "one.yaml"], 1, tmp_path / "out")
    with pytest.raises(ValueError, match="0 seeds"):
        compare([one], 0, tmp_path / "out")
    with pytest.raises(ValueError, match=r"run\.seed and run\.out"):
        compare([one], 1, tmp_path / "out", ["run.seed=3"])
    assert not (tmp_path / "out").exists()


def test_files_of_equal_stem_are_told_apart_by_their_folders(done, data, tmp_path):
    configs = [write(tmp_path / name / "arm.yaml", data, guide=NEVER) for name in ("a", "b")]
    for name in ("a", "b"):  # runs that are there need not be made again
        shutil.copytree(done.out / "random" / "seed-0", tmp_path / "out" / name / "arm" / "seed-0")
    rows = compare(configs, 1, tmp_path / "out")
    assert [row.name for row in rows] == ["untrained", "a/arm", "b/arm"]
    assert [line["config"] for line in lines(tmp_path / "out")] == ["untrained", "a/arm", "b/arm"]
