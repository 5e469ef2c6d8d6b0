"""Write the tables of the documents from the committed files: no figure is typed by hand.

python tests/bench/tables.py            # writes the pages below
python tests/bench/tables.py --check    # fails if that would change anything

A table stands between `<!-- table: FILE.csv -->` and `<!-- end -->`. FILE may hold one `*`: all files of
such a name stand side by side, named by what it stands for. Without any, the table stays empty, and a note
says so. For files of `trainers compare`, `<!-- table: FILE.csv against ARM -->` names the arm to subtract; by
default it is the first. `<!-- table: FILE.csv only NAME; NAME -->` keeps some rows. After `<!-- gpu table:
FILE.csv -->` each file, written by `dali-views gpu-report`, stands under the name of its machine; without
any, a sentence stands there.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from trainers.compare_table import Row, Run, difference, paired, score

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/speed.md", "docs/sources.md", "docs/results.md", "docs/learning.md")
_TABLE = re.compile(
    r"(<!-- (gpu )?table: (\S+\.csv)(?: against (\S+))?(?: only (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL
)
_UNMEASURED = "Not yet measured on a GPU.\n"
# Words of files, and better ones; several files side by side stand in this order.
_WORDS = {
    "simclr": "SimCLR", "moco": "MoCo v2", "byol": "BYOL", "simsiam": "SimSiam", "dino": "DINO",
    "scfs": "SCFS", "lejepa": "LeJEPA",
    "colours": "histogram of colours", "tiny-imagenet-50": "Tiny-ImageNet", "otsu": "Otsu",
    "held-out": "held-out photographs", "clean": "plain CIFAR-10",
    "online boxes": "reading boxes off online maps", "pass": "localisation pass",
}  # fmt: skip
# Names of arms of comparisons that are not names of guides.
_ARMS = {
    "untrained": "untrained", "random": "none: random crops", "true_boxes": "`true_boxes` (control)",
    "shuffled": "true boxes of other images (control)", "matched": "true boxes elsewhere (control)",
    "frozen_boxes": "`frozen_boxes`", "frozen_lite0": "`frozen_boxes`, EfficientNet-Lite0",
    "contrastive_crop_published": "`contrastive_crop` as published",
    "iou_80": "IoU 0.80", "iou_60": "IoU 0.60", "iou_40": "IoU 0.40", "iou_25": "IoU 0.25",
    "ccrop": "`contrastive_crop`", "online": "`online_crop`", "pairs": "`semantic_pairs`",
    "pairs_label": "pairs by label (control)", "pairs_random": "pairs at random (control)",
}  # fmt: skip
# Names of runs of docs/learning.md that are not names of methods.
_RUNS = {
    "moco": "MoCo", "dino_no_centre": "DINO without centring",
    "simsiam_no_stop": "SimSiam without stop-gradient",
    "simclr_lr_100": "SimCLR, rate x 100", "byol_lr_100": "BYOL, rate x 100",
    "simclr_lr_0001": "SimCLR, rate / 1000", "byol_still": "BYOL, target never moves",
}  # fmt: skip
# What a comparison shows: scores, each with its difference from the baseline, and the boxes of the guide.
_JUDGED = {"knn_top1": "kNN top-1 %", "linear_top1": "linear top-1 %"}
_COMPARED = {**_JUDGED, "guide_iou": "IoU of its boxes"}


class _Grid(NamedTuple):
    """A file with a line per cell: names of its row and column, format strings, and figures with digits."""

    row: str
    column: str
    figures: dict[str, int | str]


# A column that only such files have, and their grid.
_GRIDS = {
    "quantile_low": _Grid("{encoder}", "{quantile_low} to {quantile_high}", {"precision": "%"}),
    "threshold": _Grid("{box}, {threshold}", "{images}, {encoder}", {"iou": 3, "corloc": "%"}),
    "share_of_epoch": _Grid("{what}", "% of an epoch, {file}", {"share_of_epoch": "%"}),
}
# A column that only such files have: the columns to show, each with its heading and its number of digits
# (after the point; -1: three figures of a small number, all before the point of a large one; "%": a share in
# per cent; None: as it is). Columns that a file lacks are left out.
_COLUMNS: dict[str, dict[str, tuple[str, int | str | None]]] = {
    "knn20_top1": {
        "encoder": ("encoder", None), "knn20_top1": ("kNN top-1 %, k 20", "%"), "knn200_top1": ("k 200", "%"),
        "linear_top1": ("linear top-1 %", "%"), "iou": ("IoU", 3), "corloc": ("CorLoc %", "%"),
        "embedding_std": ("spread", 2), "embedding_rank": ("rank", 0), "cpu_minutes": ("CPU minutes", 0),
    },
    "operator": {"operator": ("operator", None), "core_ms_per_view": ("ms of one core", None)},
    "trial": {"trial": ("instead", None), "ratio": ("ratio", 2)},
    "mapped_mb": {
        "rows": ("images", -1), "file_mb": ("index, MB", -1), "s_to_load": ("s to load it", -1),
        "s_to_first_batch": ("s to the first batch", -1), "ms_per_batch": ("ms per batch of 256", -1),
        "own_mb": ("own MB", -1),
    },
    "ms_to_snapshot": {
        "table": ("table", None), "ranks": ("ranks", None), "rows": ("images", -1),
        "ms_to_snapshot": ("ms to freeze", -1), "ms_per_256_rows": ("ms per 256 rows", -1),
        "s_to_sync": ("s to sync", -1), "written_private_mb": ("own MB", -1),
        "written_pss_mb": ("share, MB", -1),
    },
}  # fmt: skip
_LEARNT = ("loss", "embedding_std", "embedding_rank", "knn_top1")  # of runs, step by step
_SOURCES: dict[str, tuple[str, int | str | None]] = {
    "name": ("images from", None), "value": ("images/s", 0), "ratio": ("x folder", 2)
}  # fmt: skip


def rendered(text: str) -> str:
    """The text with every marked table made anew."""

    def made(found: re.Match[str]) -> str:
        _, gpu, pattern, baseline, only, _ = found.groups()
        return found[1] + (_on_gpus(pattern) if gpu else table(pattern, baseline, only)) + found[6]

    return _TABLE.sub(made, text)


def table(pattern: str, baseline: str | None = None, only: str | None = None) -> str:
    """The files of a pattern as one table, by the columns they have; `only` the rows with these names."""
    lines = [line for line in _lines(pattern) if only is None or line["name"] in only.split("; ")]
    if not lines:
        print(f"no file is named {pattern} yet; its table stays empty", file=sys.stderr)
        return ""
    return _table(lines, baseline)


def _on_gpus(pattern: str) -> str:
    """The files of a pattern one after the other, each under its machine and batch size."""
    files: dict[str, list[dict[str, str]]] = {}
    for line in _lines(pattern):
        files.setdefault(line["file"], []).append(line)
    parts = []
    for lines in files.values():
        size = f"batch {lines[0]['batch_size']}, {lines[0]['size']} pixels"
        parts.append(f"{lines[0]['machine']}; {size}:\n\n{_table(lines)}")
    return "\n".join(parts) or _UNMEASURED


def _table(lines: Sequence[dict[str, str]], baseline: str | None = None) -> str:
    first = lines[0]
    if "config" in first:
        return _comparison(lines, baseline)
    for key, columns in _COLUMNS.items():
        if key in first:
            return _flat(lines, columns)
    if "run" in first:
        return _ends(lines)
    if "agreement" in first:
        return _readings(lines)
    for key, grid in _GRIDS.items():
        if key in first:
            return _grid(lines, grid)
    if first["part"] == "loaders":
        return _loaders(lines)
    if first["part"] == "sources":
        return _flat(lines, _SOURCES)
    return _markdown(["", "", ""], [[line["name"], *_figure(line)] for line in lines])


def _lines(pattern: str) -> list[dict[str, str]]:
    """The lines of all files of a pattern; `file` is what its `*` stands for, in the order of `_WORDS`."""
    before, _, after = Path(pattern).name.partition("*")
    paths = {path.name[len(before) : len(path.name) - len(after)]: path for path in ROOT.glob(pattern)}
    order = list(_WORDS)
    lines: list[dict[str, str]] = []
    for name in sorted(paths, key=lambda name: (order.index(name) if name in order else len(order), name)):
        with paths[name].open(newline="") as file:
            lines += ({**line, "file": name} for line in csv.DictReader(file))
    return lines


def _flat(lines: Sequence[dict[str, str]], columns: Mapping[str, tuple[str, int | str | None]]) -> str:
    """A row per line, in the file's order."""
    shown = {name: how for name, how in columns.items() if name in lines[0]}
    rows = [[_number(line[name], digits) for name, (_, digits) in shown.items()] for line in lines]
    return _markdown([head for head, _ in shown.values()], rows)


def _ends(lines: Sequence[dict[str, str]]) -> str:
    """Of runs with a line per step: the last value of each measure, and kNN before the first step."""
    rows: dict[str, list[str]] = {}
    for run in dict.fromkeys(line["run"] for line in lines):
        known = {
            name: [line[name] for line in lines if line["run"] == run and line[name]] for name in _LEARNT
        }
        ends = [
            _number(known[name][-1], digits) for name, digits in zip(_LEARNT, (2, 2, 1, "%"), strict=True)
        ]
        rows[run] = [*ends, _number(known["knn_top1"][0], "%")]
    heads = ["run", "loss", "spread", "rank", "kNN top-1 %", "at step 0"]
    return _markdown(heads, [[_RUNS.get(run, _WORDS.get(run, run)), *cells] for run, cells in rows.items()])


def _grid(lines: Sequence[dict[str, str]], grid: _Grid) -> str:
    """A cell per line; rows and columns in the order of their first line."""
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        words = {name: _WORDS.get(text, text) for name, text in line.items()}
        row, column = (form.format_map(words).strip(", ") for form in (grid.row, grid.column))
        figures = [_number(line[name], digits) for name, digits in grid.figures.items()]
        cells.setdefault(row, {})[column] = ", ".join(figures)
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    rows = [[name, *(row.get(column, "") for column in columns)] for name, row in cells.items()]
    return _markdown(["", *columns], rows)


def _readings(lines: Sequence[dict[str, str]]) -> str:
    """CorLoc of activation maps, as they are and aligned, by extent and by part, and by rules."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        if line["map"] != "activation" or line["layer"] not in ("layer2", "layer3", "blocks.2", "blocks.6"):
            continue
        row = rows.setdefault(tuple(line[name] for name in ("data", "network", "size", "layer")), {})
        which = line["reading"], line["aligned"]
        if which in (("part", "False"), ("part", "True"), ("extent", "True")):
            row[" ".join(which)] = line["corloc"]
        if which == ("part", "True"):
            row |= {rule: line[f"{rule} corloc"] for rule in ("auto", "otsu")}
    heads = {
        "part False": "part, as it is", "part True": "part", "extent True": "extent", "auto": "part, auto",
        "otsu": "part, Otsu",
    }  # fmt: skip
    cells = [[*names, *(_number(row.get(head, ""), "%") for head in heads)] for names, row in rows.items()]
    return _markdown(["images", "network", "pixels", "layer", *heads.values()], cells)


def _comparison(lines: Sequence[dict[str, str]], baseline: str | None) -> str:
    """Files of `trainers compare` side by side: a row per arm."""
    files = dict.fromkeys(line["file"] for line in lines)
    heads, columns = [], []
    for file in files:
        name = f", {_WORDS.get(file, file)}" if len(files) > 1 else ""
        for head, cells in _compared([line for line in lines if line["file"] == file], baseline):
            heads.append(head + name)
            columns.append(cells)
    arms = dict.fromkeys(line["config"] for line in lines)
    rows = [[_ARMS.get(arm, f"`{arm}`"), *(cells.get(arm, "") for cells in columns)] for arm in arms]
    return _markdown(["", *heads], rows)


def _compared(lines: Sequence[dict[str, str]], baseline: str | None) -> list[tuple[str, dict[str, str]]]:
    """Columns of one comparison: heading, and cells by arm.

    Scores have their deviation over seeds; differences from the baseline, paired by seed, a standard
    error; of two seeds both values stand there.
    """
    runs: dict[str, list[Run]] = {}
    for line in lines:
        measured = {measure: float(line[measure]) for measure in _COMPARED if line.get(measure)}
        runs.setdefault(line["config"], []).append(Run(line["config"], int(line["seed"]), **measured))
    rows = [Row(arm, tuple(each), reference=arm == "untrained") for arm, each in runs.items()]
    trained = [row for row in rows if not row.reference]
    base = next((row for row in trained if baseline in (None, row.name)), None)
    if base is None:
        raise ValueError(f"no run is of {baseline}; subtract one of {', '.join(row.name for row in trained)}")
    columns = []
    for measure, head in _COMPARED.items():
        values = {row.name: found for row in rows if (found := row.values(measure))}
        if not values:
            continue
        most = max(map(len, values.values()))
        means = {arm: _mean(measure, list(found.values()), most) for arm, found in values.items()}
        columns.append((head, means))
        if measure in _JUDGED:
            against = base.values(measure)
            pairs = {row.name: paired(row.values(measure), against) for row in trained if row is not base}
            told = {arm: difference(measure, pair) for arm, pair in pairs.items() if pair}
            columns.append(("difference", told))
    return columns


def _mean(measure: str, values: Sequence[float], seeds: int) -> str:
    """The mean over seeds; how many, if the other arms have more."""
    text = score(measure, values if measure in _JUDGED else [fmean(values)])
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds} seeds)"


def _loaders(lines: Sequence[dict[str, str]]) -> str:
    """Peers and limits from slow to fast, ours in their own order; shares of time last."""
    rows = []
    for kind in ("peer", "ours", "limit"):
        chosen = [line for line in lines if line["kind"] == kind and line["measure"] == "images/s"]
        for line in chosen if kind == "ours" else sorted(chosen, key=lambda line: float(line["value"])):
            name = f"**{line['name']}**" if kind == "ours" else line["name"]
            images, views = float(line["value"]), int(line["views"])
            ratios = [_number(line[key], 2) for key in ("ratio", "of_limit")]
            rows.append([name, f"{images:.0f}", f"{images * views:.0f}" if views else "", *ratios])
    rest = [[line["name"], _figure(line)[0], "", "", ""] for line in lines if line["measure"] != "images/s"]
    return _markdown(["loader", "images/s", "views/s", "x torchvision", "of decoding alone"], rows + rest)


def _figure(line: dict[str, str]) -> list[str]:
    value = float(line["value"])
    of_time = line["measure"] == "of time"
    return [f"{value:.2%}", "of the time"] if of_time else [f"{value:g}", line["measure"]]


def _number(text: str, digits: int | str | None) -> str:
    if digits is None or not text:
        return _WORDS.get(text, text)
    value = float(text)
    if digits == "%":
        return f"{100 * value:.1f}"
    if digits >= 0:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` tell whether they are as they should be."""
    stale = 0
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = rendered(before)
        if before != after and "--check" in arguments:
            stale = 1
        elif before != after:
            (ROOT / page).write_text(after, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
