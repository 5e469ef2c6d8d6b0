"""Several configurations on one budget, with the same seeds: one table, so that a claim is one command.

python -m trainers compare A.yaml A.yaml+configs/guide/contrastive_crop.yaml --seeds 3 --out OUT

Every run lies in OUT/NAME/seed-N, like any other run. Given again, the command continues what was interrupted
and repeats nothing. OUT/compare.csv has the raw numbers, a line per run, and OUT/compare.md the table.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import os
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import count, product
from pathlib import Path
from typing import Any, Literal

from dali_views import RegionTable
from dali_views.graph.build import default_threads
from dali_views.system.files import append_line, atomic_write
from dali_views.system.machine import machine
from dali_views.tools.command_line import MISTAKE, Answer, counted

from . import config as cfg
from .compare_measures import Measures
from .compare_table import LOCALISED, Row, Run, table
from .config import file as config_file
from .data import open_data
from .engine import checkpoint, ranks
from .engine.lock import held
from .engine.setting import device_kind, join
from .evaluate.classifiers import linear_probe, probe_recipe
from .evaluate.evaluator import Evaluator
from .pretrain import START, pretrain
from .report import METRICS
from .report.history import lines_of
from .saved_run import encoder_of

__all__ = ["command", "compare"]

Evaluation = Literal["knn", "linear"]
NOTHING = Measures()
RECORD = "compare.json"  # in a run's folder: how long it trained, and on what
_BUDGET = (
    *("data.", "model.", "knn.", "probe.", "localise.", "detect.", "optim.batch"),
    *("run.epochs", "run.max_steps", "run.evaluate_every", "views.size", "views.mean", "views.std"),
)


def command(args: argparse.Namespace) -> Answer:
    """`compare`: the table, and exit code 2 if runs failed."""
    words = [*args.words, *args.overrides]
    configs = [Path(word) for word in words if "=" not in word]
    changes = [word for word in words if "=" in word]
    evaluations: tuple[Evaluation, ...] = ("knn", "linear") if args.linear else ("knn",)
    measures = Measures(args.multilabel, args.transfer, tuple(args.detect))
    rows = compare(configs, args.seeds, args.out, changes, evaluations, args.unequal, measures)
    failed = sum(bool(run.failure) for row in rows for run in row.runs)
    text = table(rows)
    if failed:
        text += f"\n{failed} runs did not come to their end; {args.out}/compare.csv says why"
    facts = {"out": args.out, "rows": [asdict(row) for row in rows], "failed": failed}
    return Answer(facts, text, MISTAKE if failed else 0)


def compare(
    configs: Sequence[Path], seeds: int, out: Path, overrides: Sequence[str] = (),
    evaluations: Sequence[Evaluation] = ("knn",), unequal: bool = False, measures: Measures = NOTHING,
) -> list[Row]:  # fmt: skip
    """Pretrain and evaluate every configuration with seeds 0, 1, ..., and save the table after every run.

    Configurations alternate, seed by seed, so that an interrupted comparison is balanced. A failed run is
    recorded with the reason and the others continue; with several processes, which may wait for each other,
    only if its loss was not finite.

    Args:
        configs: YAML files, named in the table by stem, and by folders above where stems are equal.
        evaluations: "knn": as during pretraining, with localisation; "linear": a linear probe.
        unequal: compare although data, encoder, batch, length or evaluation differ.
        measures: what else is measured, after all these.

    Returns:
        A row of the untrained encoder, if it was evaluated, and one per configuration. After a signal the
        remaining runs are missing.
    """
    if seeds < 1 or not configs:
        raise ValueError(
            f"{len(configs)} configurations with {seeds} seeds give no comparison; give some of both"
        )
    if any(word.partition("=")[0].strip() in ("run.seed", "run.out") for word in overrides):
        raise ValueError("run.seed and run.out are set run by run here; give a number of seeds and a folder")
    files = dict(zip(_names(configs), configs, strict=True))
    order = list(product(range(seeds), files))
    # All are read before one trains: a misspelt key should not be found after hours.
    arms: dict[tuple[int, str], cfg.Config] = {}
    for seed, name in order:
        folder = json.dumps(str(out / name / f"seed-{seed}"))
        own = [f"run.seed={seed}", f"run.out={folder}"]
        arms[seed, name] = config_file.load(files[name], [*overrides, *own])
    if not unequal:
        _check_budgets({name: arms[0, name] for name in files}, "linear" in evaluations)
    for arm in arms.values():
        measures.check(arm)
    join(arms[order[0]])
    runs: list[Run] = []
    with held(out):  # each training holds its own folder, too; its record and the table are of this one
        for number, (seed, name) in enumerate(order, 1):
            if ranks.is_main():
                place = arms[seed, name].run.out
                print(f"\n{name}, seed {seed} (run {number} of {len(order)}): {place}", flush=True)
            runs.append(_run(name, arms[seed, name], evaluations, measures))
            gc.collect()  # the parts of a run refer to each other, so only this frees its memory
            first = [arms[one, order[0][1]] for one in range(seed + 1)]
            rows = _rows(
                runs, [Path(config.run.out) for config in first], START[first[0].model.weights is None]
            )
            _save(out, rows)
            if runs[-1].stopped:
                break
    return rows


def _run(name: str, config: cfg.Config, evaluations: Sequence[str], measures: Measures) -> Run:
    """One run, continued if it was begun, with its numbers or the reason why some are missing."""
    folder, how, size = Path(config.run.out), config.localise, config.views.size
    cut = f" cut at {config.run.max_steps} steps" if config.run.max_steps else ""
    budget = (
        f"{counted(config.run.epochs, 'epoch')}{cut}, batch {config.optim.batch}, {config.model.backbone} "
        f"at {size} pixels, {config.data.kind} {config.data.path}"
    )
    reading = f"{how.map} of {how.layer or 'the last stage'} at {how.size or size} pixels"
    run = Run(name, config.run.seed, localisation=reading, budget=budget)
    try:
        run = _pretrained(run, config)
        if run.stopped:
            return run
        setting, saved = join(config), checkpoint.load(folder)
        data = open_data(config.data, setting.seed)
        encoder = encoder_of(config, saved, "trained", setting.device)
        run = replace(run, extra_passes=int(saved["guide"]["passes"]), **_guide(folder))
        run = replace(run, queries=None if data.queries is None else len(data.queries))
        if "knn" in evaluations:
            logged = [line for line in lines_of(folder / METRICS) if line.get("step") == run.step]
            found = [scores for line in logged if (scores := _scores(line))]
            # None if run.evaluate_every is 0 or run.max_steps cut an epoch short.
            if ranks.any_rank(not found):
                regions = RegionTable(len(data.train))
                evaluator = Evaluator(setting, config, data, encoder, regions)
                line = {"step": run.step, "epoch": saved["loader"]["epoch"], **evaluator.run().scores}
                found = [_scores(line)]
                if ranks.is_main():
                    append_line(folder / METRICS, json.dumps(line))
            run = replace(run, **found[-1])
        if "linear" in evaluations:
            result = linear_probe(config, setting, encoder, data, folder / "linear", resume=True)
            run = replace(run, linear_top1=result.top1, linear_top5=result.top5)
        more = measures.of(config, setting, saved, encoder)
        if more is None:
            stopped = "stopped in the training of its detector; the same command continues it"
            return replace(run, stopped=True, failure=stopped)
        run = replace(run, **more)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if ranks.world() > 1 and not isinstance(error, FloatingPointError):
            raise
        run = replace(run, failure=textwrap.shorten(f"{type(error).__name__}: {error}", 500))
    return run


def _pretrained(run: Run, config: cfg.Config) -> Run:
    folder, limit, device = Path(config.run.out), config.run.max_steps, device_kind(config.run)
    threads = config.run.threads or default_threads()
    where = {"threads": threads, "processes": ranks.world(), "machine": machine(device)}
    _clock(folder, {"at": time.time(), "device": device, **where})
    result = pretrain(config, resume=True)
    ranks.barrier()  # the main process may still be writing what all read now
    run = replace(run, step=result.step, **_clock(folder))
    if limit is not None and result.step > limit:
        raise ValueError(f"{folder} took {result.step} steps, more than run.max_steps; name another folder")
    if not result.finished and result.step != limit:
        stopped = f"stopped after {result.step} steps; the same command continues it"
        return replace(run, stopped=True, failure=stopped)
    rates = [line["images_per_second"] for line in lines_of(folder / METRICS) if "images_per_second" in line]
    return replace(run, images_per_second=statistics.median(rates) if rates else None)


def _clock(folder: Path, begun: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Seconds of training so far and where it was, from the run's record, in which `begun` opens a stretch.

    A stretch counts up to the newest checkpoint, because what a killed process did after it is repeated.
    """
    file, last = folder / RECORD, folder / checkpoint.LAST
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    before = record.pop("begun", None)
    if before and last.is_file() and (spent := last.stat().st_mtime - before.pop("at")) > 0:
        record |= {**before, "seconds": record.get("seconds", 0.0) + spent}
    if ranks.is_main():
        with atomic_write(file) as draft:
            draft.write(json.dumps({**record, "begun": begun} if begun else record).encode())
    return record


def _scores(line: Mapping[str, Any]) -> dict[str, Any]:
    """The scores in a line of a run's log; none if it is not of an evaluation."""
    return {name: line[name] for name in ("knn_top1", "knn_top5", *LOCALISED) if name in line}


def _guide(folder: Path) -> dict[str, Any]:
    """What the region table was last like: the boxes that crops were drawn from."""
    lines = [line for line in lines_of(folder / METRICS) if "guide_area_median" in line]
    names = {"guide_iou": "guide_iou", "guide_area": "guide_area_median"}
    return {ours: lines[-1][name] for ours, name in names.items() if lines and name in lines[-1]}


def _rows(runs: Sequence[Run], folders: Sequence[Path], start: str) -> list[Row]:
    """All rows; that of the encoder at the start, so named, from the runs of the first configuration."""
    names = dict.fromkeys(run.config for run in runs)
    rows = [Row(name, tuple(run for run in runs if run.config == name)) for name in names]
    untrained = [
        replace(Run(start, seed, 0, localisation=runs[0].localisation), **scores)
        for seed, folder in enumerate(folders)
        for line in lines_of(folder / METRICS)
        if line.get("step") == 0 and (scores := _scores(line))
    ]
    return [Row(start, tuple(untrained), reference=True), *rows] if untrained else rows


def _save(out: Path, rows: Sequence[Row]) -> None:
    """Write both files, on the main process."""
    if not ranks.is_main():
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Run)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(run) for row in rows for run in row.runs)
    for name, content in (("compare.csv", text.getvalue()), ("compare.md", table(rows) + "\n")):
        with atomic_write(out / name) as draft:
            draft.write(content.encode())


def _names(configs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, without suffix, that tell the files apart."""
    ways = [Path(os.path.abspath(str(path).replace(".yaml+", "+"))).with_suffix("").parts for path in configs]
    if len(set(ways)) < len(ways):
        raise ValueError(f"a configuration is named twice in {', '.join(map(str, configs))}; leave one out")

    def depth(way: tuple[str, ...]) -> int:
        return next(n for n in count(1) if sum(other[-n:] == way[-n:] for other in ways) == 1)

    return ["/".join(way[-depth(way) :]) for way in ways]


def _check_budgets(configs: Mapping[str, cfg.Config], probed: bool) -> None:
    (first, model), *others = configs.items()
    for name, config in others:
        unlike = [key for key in config_file.differences(model, config) if key.startswith(_BUDGET)]
        if not unlike and config.neighbours != model.neighbours:
            unlike = ["knn.k or knn.temperature (absent, they follow the method)"]
        if probed and not unlike and probe_recipe(config) != probe_recipe(model):
            unlike = ["probe.recipe (published follows the method)"]
        if unlike:
            raise ValueError(
                f"{name} has another {', '.join(unlike)} than {first}, which makes budgets or evaluations "
                "unequal; make them equal or give --unequal"
            )
