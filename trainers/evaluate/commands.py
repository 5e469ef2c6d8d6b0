"""The commands that measure a finished run: knn, linear, finetune, localise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from dali_views.tools.command_line import Answer

from ..data import open_data
from ..encoders.backbones import Backbone
from ..encoders.frozen import frozen_encoder
from ..engine import ranks
from ..engine.setting import join
from ..guides.encoder_maps import EncoderMaps
from ..methods import Method
from ..report import EVALUATIONS
from ..saved_run import encoder_of, load_run, method_with
from .classifiers import finetune, linear_probe
from .evaluator import map_scores, seen_maps, table
from .knn import knn as knn_scores

__all__ = ["classify", "knn", "localise"]


class _Evaluated:
    """The run that a command names by `args.run`, with its overrides, and the data to evaluate it on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder, self.config, self.saved = load_run(args.run, args.overrides)
        self.setting = join(self.config)
        self.data = open_data(self.config.data, self.config.run.seed)

    @property
    def title(self) -> str:
        """Which encoder, after how many steps."""
        return f"{self.args.encoder} encoder, {self.saved['step']} steps"

    def encoder(self) -> Backbone:
        """The encoder that `--encoder` names."""
        return encoder_of(self.config, self.saved, self.args.encoder, self.setting.device)

    def record(self, scores: Mapping[str, Any]) -> None:
        """Add scores to the run's evaluations.jsonl, on the main rank."""
        if ranks.is_main():
            args = self.args
            about = {"evaluation": args.command, "encoder": args.encoder, "step": self.saved["step"]}
            with (self.folder / EVALUATIONS).open("a") as file:
                file.write(json.dumps({**about, **scores, "overrides": args.overrides}) + "\n")


def knn(args: argparse.Namespace) -> Answer:
    """`knn`: scores of a run's encoder for each k."""
    run = _Evaluated(args)
    bank, queries = run.data.bank, run.data.queries
    if queries is None:
        raise ValueError("kNN needs labels; name labelled folders by data.eval_train=DIR data.eval_val=DIR")
    found = knn_scores(run.setting, run.config.views, run.encoder(), bank, queries, args.k, args.temperature)
    lines = []
    for k, scores in found.items():
        run.record({"k": k, **scores})
        told = f"kNN (k {k}, {len(bank)} neighbours, {len(queries)} queries)"
        lines.append(f"{run.title}: {told}: top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}")
    return Answer({"encoder": args.encoder, "step": run.saved["step"], "k": found}, "\n".join(lines))


def classify(args: argparse.Namespace) -> Answer:
    """`linear` and `finetune`: a classifier on a run's encoder, with a checkpoint of its own."""
    run = _Evaluated(args)
    name = args.name or args.command + ("" if args.encoder == "trained" else f"-{args.encoder}")
    probe = args.command == "linear"
    evaluate, title = (linear_probe, "linear probe") if probe else (finetune, "fine-tuning")
    result = evaluate(run.config, run.setting, run.encoder(), run.data, run.folder / name, args.resume)
    scores = {"top1": result.top1, "top5": result.top5, "best_top1": result.best_top1}
    facts = {"name": name, "epochs": result.epochs, **scores}
    run.record(facts)
    text = (
        f"{run.title}: {title} ({result.epochs} epochs): top-1 {result.top1:.2%}, top-5 {result.top5:.2%} "
        f"(best epoch on the test images: {result.best_epoch}, {result.best_top1:.2%})"
    )
    return Answer({"encoder": args.encoder, "step": run.saved["step"], **facts}, text)


def localise(args: argparse.Namespace) -> Answer:
    """`localise`: scores of every kind of map of a run's encoder, or of another one on the run's data."""
    run = _Evaluated(args)
    index, how, views = run.data.train, run.config.localise, run.config.views
    network: Method | Backbone
    seen = None
    if args.encoder in ("trained", "untrained"):
        trained = args.encoder == "trained"
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
        f"{scores['whole']['images']} images with true boxes\n{table(scores)}"
    )
    return Answer({"encoder": args.encoder, "step": run.saved["step"], "boxes": scores}, text)
