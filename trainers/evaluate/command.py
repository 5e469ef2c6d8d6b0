"""`python -m trainers knn`, `linear`, `finetune`, `svm`, `transfer`, `localise`: a checkpoint is measured."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from dali_views import SampleIndex
from dali_views.graph.build import default_threads
from dali_views.system.files import append_line, atomic_write
from dali_views.tools.command_line import Answer, counted

from .. import config as cfg
from ..data import DataSets, open_data
from ..encoders.backbones import Backbone
from ..encoders.frozen import frozen_encoder
from ..engine import ranks
from ..engine.setting import join
from ..guides.encoder_maps import EncoderMaps
from ..methods import Method
from ..report import EVALUATIONS
from ..saved_run import KINDS, Kind, encoder_of, load_run, method_with
from . import multilabel, precision, svm
from . import transfer as many
from .classifiers import finetune, linear_probe
from .evaluator import map_scores, seen_maps
from .evaluator import table as map_table
from .knn import knn as knn_scores
from .labelled_sets import read_sets

__all__ = ["COMMANDS", "add", "command"]


class _Evaluated:
    """The run that a command names by `args.run`, with its overrides, and an encoder to evaluate."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder, self.config, self.saved = load_run(args.run, args.overrides)
        self.setting = join(self.config)

    @property
    def title(self) -> str:
        which = str(self.args.encoder)
        if which == "trained":
            return f"trained encoder, {counted(self.saved['step'], 'step')}"
        given = which == "untrained" and self.config.model.weights is not None
        return (
            f"encoder of the weights that were given ({self.config.model.weights})"
            if given
            else f"{which} encoder"
        )

    @property
    def name(self) -> str:
        """The command, with the encoder if it is not the trained one; for files."""
        encoder = re.sub(r"[^\w.]+", "-", str(self.args.encoder))
        return str(self.args.command) + ("" if encoder == "trained" else f"-{encoder}")

    def data(self) -> DataSets:
        return open_data(self.config.data, self.config.run.seed)

    def encoder(self) -> Backbone:
        """The encoder on the device; one of a library comes with views of its own, for all that follows."""
        if self.args.encoder in KINDS:
            kind = cast(Kind, self.args.encoder)
            return encoder_of(self.config, self.saved, kind, self.setting.device)
        encoder, views = frozen_encoder(self.config.views, self.args.encoder, self.setting.device)
        self.config = self.config.model_copy(update={"views": views})
        return encoder

    def record(self, scores: Mapping[str, Any]) -> None:
        """Add scores to the run's evaluations.jsonl, on the main rank."""
        if ranks.is_main():
            args = self.args
            about = {"evaluation": args.command, "encoder": args.encoder, "step": self.saved["step"]}
            line = {**about, **scores, "overrides": args.overrides}
            append_line(self.folder / EVALUATIONS, json.dumps(line))

    def answer(self, facts: Mapping[str, Any], text: str) -> Answer:
        return Answer({"encoder": self.args.encoder, "step": self.saved["step"], **facts}, text)


def _knn(args: argparse.Namespace) -> Answer:
    """`knn`: scores of a run's encoder for each k."""
    run = _Evaluated(args)
    if args.multilabel:
        return _multilabel(run)
    data, encoder = run.data(), run.encoder()
    bank, queries = data.bank, data.queries
    if queries is None:
        raise ValueError("kNN needs labels; name labelled folders by data.eval_train=DIR data.eval_val=DIR")
    k, temperature = run.config.neighbours
    found = knn_scores(run.setting, run.config.views, encoder, bank, queries, args.k or [k], temperature)
    lines = []
    for k, scores in found.items():
        run.record({"k": k, **scores})
        if 2 * k > len(bank) and ranks.is_main():
            warnings.warn(f"k {k} is more than half of the {len(bank)} neighbours; lower -k", stacklevel=2)
        told = f"kNN (k {k}, T {temperature:g}, {len(bank)} neighbours, {len(queries)} queries)"
        lines.append(f"{run.title}: {told}: {_accuracy(scores, queries)}")
    return run.answer({"k": found}, "\n".join(lines))


def _classify(args: argparse.Namespace) -> Answer:
    """`linear` and `finetune`: a classifier on a run's encoder, with a checkpoint of its own."""
    run = _Evaluated(args)
    probe = args.command == "linear"
    if probe and args.multilabel:
        return _multilabel(run)
    data, encoder = run.data(), run.encoder()
    name = args.name or run.name
    evaluate, title = (linear_probe, "linear probe") if probe else (finetune, "fine-tuning")
    result = evaluate(run.config, run.setting, encoder, data, run.folder / name, args.resume)
    scores = {"top1": result.top1, "top5": result.top5, "best_top1": result.best_top1}
    facts = {"name": name, "epochs": len(result.curve), **scores}
    run.record(facts)
    assert data.queries is not None  # a classifier has been tested on them
    text = (
        f"{run.title}: {title} ({counted(len(result.curve), 'epoch')}): {_accuracy(scores, data.queries)} "
        f"(for information, do not choose by it: best epoch on the test images {result.best_epoch}, "
        f"{result.best_top1:.2%})"
    )
    return run.answer(facts, text)


def _accuracy(scores: Mapping[str, float], tests: SampleIndex) -> str:
    """Top-1 with its standard error beside that of always answering the largest class; top-5 where there are
    more classes than five."""
    counts = np.bincount(tests.labels[tests.labels >= 0])
    top1 = scores["top1"]
    error = math.sqrt(top1 * (1 - top1) / counts.sum())
    top5 = f", top-5 {scores['top5']:.2%}" if (counts > 0).sum() > 5 else ""
    return f"top-1 {top1:.2%} ± {error:.2%}{top5}, largest class {counts.max() / counts.sum():.2%}"


def _multilabel(run: _Evaluated) -> Answer:
    """`linear --multilabel` and `knn --multilabel`: mean average precision of the classes of objects."""
    args, encoder = run.args, run.encoder()
    sides = multilabel.sides_of(run.config, run.setting, encoder)
    lines, facts = [], []
    if args.command == "linear":
        scores, decay = multilabel.linear(sides, run.setting.seed)
        found = {f"logistic regression (weight decay {decay:g}": ({"weight_decay": decay}, scores)}
    else:
        usual, temperature = run.config.neighbours
        found = {
            f"kNN (k {k}, T {temperature:g}": ({"k": k}, multilabel.knn(sides, k, temperature))
            for k in args.k or [usual]
        }
    for title, (how, scores) in found.items():
        means, each = multilabel.means(scores, sides)
        run.record({**how, **means, "classes": len(sides.classes)})
        facts.append({**how, **means, "classes": each})
        lines.append(f"{run.title}: {title}, {_sizes(sides)}): {_told(means)}")
    return run.answer({"found": facts}, "\n".join(lines))


def _svm(args: argparse.Namespace) -> Answer:
    """`svm`: VOC 2007's classification by linear SVMs, with all training images and with few."""
    run = _Evaluated(args)
    sides = multilabel.sides_of(run.config, run.setting, run.encoder())
    jobs = run.setting.threads or default_threads()
    found = svm.support_vectors(sides, args.shots, args.draws, run.setting.seed, jobs)
    means = dict(zip(precision.PRECISIONS, found.whole.mean(0).tolist(), strict=True))
    lines, facts = [f"{run.title}: SVMs ({_sizes(sides)}): {_told(means)}"], [{"shots": "all", **means}]
    for shots, draws in zip(args.shots, found.few[..., 1].mean(2).tolist(), strict=True):
        spread = statistics.stdev(draws) if len(draws) > 1 else 0.0
        facts.append(
            {"shots": shots, "draws": len(draws), "map_voc": statistics.fmean(draws), "deviation": spread}
        )
        lines.append(
            f"{shots} images of each class: mAP {100 * facts[-1]['map_voc']:.2f} ± {100 * spread:.2f} %"
        )
    for fact in facts:
        run.record(fact)
    costs = dict(zip(sides.classes, found.costs.tolist(), strict=True))
    each = dict(zip(sides.classes, found.whole[:, 1].tolist(), strict=True))
    return run.answer({"found": facts, "classes": each, "costs": costs}, "\n".join(lines))


def _sizes(sides: multilabel.Sides) -> str:
    return f"{len(sides.classes)} classes, {len(sides.labels)} training, {len(sides.test_labels)} test images"


def _told(means: Mapping[str, float]) -> str:
    area, voc, voc07 = (f"{means[name]:.2%}" for name in precision.PRECISIONS)
    return f"mAP {area}, as VOC 2010 has it {voc}, as VOC 2007 has it {voc07}"


def _transfer(args: argparse.Namespace) -> Answer:
    """`transfer`: a table over several labelled sets, written into the run's folder after each set."""
    run = _Evaluated(args)
    sets, encoder = read_sets(args.sets, run.config), run.encoder()
    rows: list[many.Scored] = []
    for row in many.transfer(sets, run.setting, encoder, run.config.views):
        rows.append(row)
        if not row.missing:
            about = {"set": row.set, "measure": row.measure, "knn": row.knn, "linear": row.linear}
            run.record({**about, "train": row.train, "test": row.test, "weight_decay": row.decay})
            if ranks.is_main():
                for suffix, text in ((".csv", many.as_csv(rows)), (".md", many.table(rows) + "\n")):
                    with atomic_write(run.folder / f"{run.name}{suffix}") as file:
                        file.write(text.encode())
    mean = many.mean_of(rows)
    run.record({"set": mean.set, "knn": mean.knn, "linear": mean.linear, "file": str(args.sets)})
    text = f"{run.title}\n{many.table(rows)}"
    return run.answer({"sets": rows, "mean": mean}, text)


def _localise(args: argparse.Namespace) -> Answer:
    """`localise`: scores of every kind of map of a run's encoder, or of another one on the run's data."""
    run = _Evaluated(args)
    index, how, views = run.data().train, run.config.localise, run.config.views
    network: Method | Backbone
    seen = None
    if args.encoder in ("trained", "untrained"):
        trained = args.encoder == "trained"
        if isinstance(run.config.method, cfg.Own):  # which has no gradient maps without its class
            network = run.encoder()
        else:
            network = method_with(run.config, run.saved if trained else None, run.setting.device)
        seen = seen_maps(run.config.box_guide, run.saved, len(index)) if trained else None
    else:
        network, views = frozen_encoder(views, args.encoder, run.setting.device)
    if not len(index.boxes):
        raise ValueError("localisation needs true boxes; name them by data.boxes or data.instances")
    encoder_maps = EncoderMaps(run.setting, views, how)
    scores = map_scores(encoder_maps, network, index, seen)
    for name, row in scores.items():
        run.record({"boxes": name, **row})
    text = (
        f"{args.encoder} encoder, {how.layer or 'the last stage'} at {encoder_maps.shape[0]} pixels, "
        f"{scores['whole']['images']} images with true boxes\n{map_table(scores)}"
    )
    return run.answer({"boxes": scores}, text)


COMMANDS = {
    "knn": _knn, "linear": _classify, "finetune": _classify, "svm": _svm, "transfer": _transfer,
    "localise": _localise,
}  # fmt: skip
"""What each command does, by name."""


def command(args: argparse.Namespace) -> Answer:
    """One of `COMMANDS`, by `args.command`; its scores are added to the run's evaluations.jsonl."""
    return COMMANDS[args.command](args)


def add(name: str, parser: argparse.ArgumentParser) -> None:
    """The words of one command."""
    parser.add_argument("run", type=Path, help="run folder, or its last.pt")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.threads=4")
    if name == "finetune":
        parser.add_argument("--encoder", choices=("trained", "untrained"), default="trained")
    else:
        told = "trained, untrained, " + "colours (a histogram), " * (name != "localise")
        told += "or another one on the run's data: timm:NAME[:FILE], torchvision:NAME[:FILE] or a run"
        parser.add_argument("--encoder", default="trained", metavar="WHICH", help=told)
    if name in ("linear", "finetune"):
        parser.add_argument("--resume", action="store_true", help="continue an earlier run, if there is one")
        told = "folder below the run for its checkpoints (the command's name)"
        parser.add_argument("--name", help=told)
    if name in ("knn", "linear"):
        told = "an image has the classes of all its objects (data.instances, detect.instances): mAP"
        parser.add_argument("--multilabel", action="store_true", help=told)
    if name == "knn":
        parser.add_argument("-k", type=int, nargs="+", help="neighbours (knn.k)")
    if name == "svm":
        told = "also train with K images of each class, such as 1 2 4 8 16 32 64 96"
        parser.add_argument("--shots", type=int, nargs="+", default=[], metavar="K", help=told)
        parser.add_argument("--draws", type=int, default=5, help="draws for each K (5)")
    if name == "transfer":
        parser.add_argument(
            "--sets", type=Path, required=True, metavar="FILE", help="YAML file of labelled sets"
        )
