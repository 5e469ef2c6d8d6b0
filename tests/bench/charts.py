"""The charts of README.md and docs, from the committed files: no figure is typed by hand.

python tests/bench/charts.py            # writes docs/pictures; part of `make tables`
python tests/bench/charts.py --check    # fails if that would change anything

Each file of loaders becomes a chart of the same name (`cpu_loaders_NAME.csv`, `gpu_loaders_NAME.csv`).
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import svg
from svg import Bar, Curve, Theme

RESULTS = svg.ROOT / "tests" / "bench" / "results"
# Loaders that make two views as the others do; our other rows stand in the table.
_OURS = ("dali_views", "dali_views, guided")
_ARMS = {
    "untrained": "untrained", "shuffled": "boxes of other images", "random": "random crops",
    "contrastive_crop": "guided crops", "true_boxes": "true boxes",
}  # fmt: skip
# Runs of docs/learning.md that stand in one picture, and their names there.
_LEARNING = {
    "healthy": {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam", "dino": "DINO"},
    "simsiam": {"simsiam": "SimSiam", "simsiam_no_stop": "without stop-gradient"},
    "dino": {"dino": "DINO", "dino_no_centre": "without centring"},
    "rate": {
        "simclr": "SimCLR", "simclr_lr_100": "SimCLR, rate x 100",
        "byol": "BYOL", "byol_lr_100": "BYOL, rate x 100",
    },
    "still": {
        "simclr": "SimCLR", "simclr_lr_0001": "SimCLR, rate / 1000",
        "byol": "BYOL", "byol_still": "BYOL, target never moves",
    },
}  # fmt: skip
_PLOTS = {
    "loss": "loss", "embedding_std": "embedding_std", "embedding_rank": "embedding_rank",
    "knn_top1": "kNN top-1 %",
}  # fmt: skip


def drawings() -> Iterator[tuple[str, str]]:
    """Name and text of every chart."""
    for file in sorted(RESULTS.glob("*_loaders*.csv")):
        yield from svg.both(file.stem, partial(loaders, lines=_lines(file)))
    yield from svg.both("gain", partial(gain, lines=_lines(RESULTS / "cpu_guides_simclr_scenes.csv")))
    curves = _lines(RESULTS / "cpu_learning_scenes.csv")
    for name, runs in _LEARNING.items():
        yield from svg.both(f"learning-{name}", partial(learning, lines=curves, runs=runs))


def loaders(theme: Theme, lines: list[dict[str, str]]) -> str:
    """Images per second of peers, from slow to fast, and ours below them."""
    rates = [line for line in lines if line["measure"] == "images/s"]
    peers = sorted((line for line in rates if line["kind"] == "peer"), key=lambda line: float(line["value"]))
    ours = [line for line in rates if line["name"] in _OURS]
    rows = [
        Bar(line["name"], float(line["value"]), f"{float(line['value']):,.0f}", line in ours)
        for line in [*peers, *ours[::-1]]
    ]
    first = rates[0]
    cores, _, gpu, *_ = first["machine"].split(", ")
    place = gpu if first["device"] == "gpu" else f"{cores}, no GPU"
    remark = f"two views of {first['size']} pixels, batch {first['batch_size']}, {place}"
    return svg.bars(theme, "Images per second", remark, rows)


def gain(theme: Theme, lines: list[dict[str, str]]) -> str:
    """kNN accuracy of arms of a comparison, mean and standard error over seeds."""
    rows = []
    for arm, name in _ARMS.items():
        scores = [100 * float(line["knn_top1"]) for line in lines if line["config"] == arm]
        mean, error = statistics.mean(scores), statistics.stdev(scores) / len(scores) ** 0.5
        rows.append(Bar(name, mean, f"{mean:.1f} %", arm == "contrastive_crop", error))
    seeds = sum(line["config"] == "random" for line in lines)
    remark = f"kNN top-1 on held-out scenes with small objects, {seeds} seeds"
    return svg.bars(theme, "What SimCLR learns in the same 460 steps", remark, rows)


def learning(theme: Theme, lines: list[dict[str, str]], runs: dict[str, str]) -> str:
    """Loss, spread, rank and kNN of runs over steps. Losses of several methods have a scale each."""
    colours = dict(zip(runs, theme.more, strict=False))
    methods = {run: run.partition("_")[0] for run in runs}
    scaled = len(set(methods.values())) > 1
    plots = []
    for column, title in _PLOTS.items():
        found = {
            run: [
                (int(line["step"]), float(line[column]))
                for line in lines
                if line["run"] == run and line[column]
            ]
            for run in runs
        }
        curves = []
        for run, name in runs.items():
            steps, values = (list(each) for each in zip(*found[run], strict=True))
            if column == "knn_top1":
                values = [100 * value for value in values]
            if column == "loss" and scaled:
                same = [
                    value for other in runs if methods[other] == methods[run] for _, value in found[other]
                ]
                values = [(value - min(same)) / (max(same) - min(same)) for value in values]
            curves.append(Curve(name, steps, values, colours[run]))
        plots.append((f"{title}, a scale per method" if column == "loss" and scaled else title, curves))
    ends = "; ".join(
        f"{each.name} {title} {each.values[-1]:.3g}" for title, curves in plots[1:] for each in curves
    )
    return svg.panels(theme, plots, f"At the end: {ends}")


def _lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


if __name__ == "__main__":
    found = svg.stale(drawings(), check="--check" in sys.argv)
    print("\n".join(found))
    sys.exit("--check" in sys.argv and bool(found))
