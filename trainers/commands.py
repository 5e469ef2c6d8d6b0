"""What each command of the trainer does with its arguments, and what it answers."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dali_views.tools.command_line import MISTAKE, Answer

from .compare import compare as compare_configs
from .compare_table import table as compared_table
from .config import file as config_file
from .data import open_data
from .demo import demo as run_demo
from .encoders.backbones import Backbone
from .encoders.frozen import frozen_encoder
from .engine import ranks as distributed
from .engine.amp import device_kind
from .evaluate import knn as knn_scores
from .evaluate.encoders import encoder_of, load_run, method_with
from .evaluate.linear import linear_probe
from .evaluate.map_scores import map_scores, seen_maps
from .evaluate.map_scores import table as map_table
from .evaluate.semi_supervised import finetune as fine_tuned
from .evaluate.supervised import Result
from .export import export as export_encoder
from .guides.localise import input_size
from .methods import Method
from .pretrain import pretrain as train
from .report import EVALUATIONS
from .report import page as run_page
from .report.report import table as scores_table


def pretrain(args: argparse.Namespace) -> Answer:
    """Train as a configuration says."""
    files = [word for word in args.config if "=" not in word]
    changes = [word for word in args.config if "=" in word]
    config = config_file.load(files, [*changes, *args.overrides])
    result = train(config, resume=args.resume)
    state = "finished" if result.finished else "stopped and saved; continue with --resume"
    text = f"{config.run.out}: {state} after {result.step} steps"
    if result.scores:
        text = f"{scores_table(result.scores)}\n{text}"
    stopped = not result.finished and result.step != config.run.max_steps
    code = 0
    if stopped and distributed.restartable():
        code = os.EX_TEMPFAIL
    elif stopped and result.ctrl_c:  # what a shell was to do after this is not done
        code = 128 + signal.SIGINT
    return Answer({"run": config.run.out, **asdict(result)}, text, code)


def knn(args: argparse.Namespace) -> Answer:
    """Weighted kNN."""
    folder, config, saved = load_run(args.run, args.overrides)
    device = distributed.init(device_kind(config))
    data = open_data(config.data, config.run.seed)
    if data.queries is None:
        raise ValueError("kNN needs labels; name labelled folders by data.eval_train=DIR data.eval_val=DIR")
    encoder = encoder_of(config, saved, args.encoder, device)
    found = knn_scores(config, encoder, data.bank, data.queries, device, args.k, args.temperature)
    lines = []
    for k, scores in found.items():
        _record(folder, args, saved, {"k": k, **scores})
        told = f"kNN (k {k}, {len(data.bank)} neighbours, {len(data.queries)} queries)"
        lines.append(f"{_start(args, saved)}: {told}: top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}")
    facts = {"encoder": args.encoder, "step": saved["step"], "k": found}
    return Answer(facts, "\n".join(lines))


def localise(args: argparse.Namespace) -> Answer:
    """How well maps find the true objects."""
    folder, config, saved = load_run(args.run, args.overrides)
    device = distributed.init(device_kind(config))
    data = open_data(config.data, config.run.seed)
    network: Method | Backbone
    seen = None
    if args.encoder in ("trained", "untrained"):
        network = method_with(config, saved if args.encoder == "trained" else None, device)
        seen = seen_maps(config, saved, len(data.train)) if args.encoder == "trained" else None
    else:
        network, config = frozen_encoder(config, args.encoder, device)
    if not len(data.train.boxes):
        raise ValueError("localisation needs true boxes; name them by data.boxes or data.instances")
    scores = map_scores(config, network, data.train, device, seen)
    for name, row in scores.items():
        _record(folder, args, saved, {"boxes": name, **row})
    how = config.localise
    text = (
        f"{args.encoder} encoder, {how.layer or 'the last stage'} at {input_size(config, how)} pixels, "
        f"{scores['whole']['images']} images with true boxes\n{map_table(scores)}"
    )
    return Answer({"encoder": args.encoder, "step": saved["step"], "boxes": scores}, text)


def linear(args: argparse.Namespace) -> Answer:
    """A linear classifier on a frozen encoder."""
    return _learn(args, linear_probe, "linear probe")


def finetune(args: argparse.Namespace) -> Answer:
    """Encoder and classifier on few labels."""
    return _learn(args, fine_tuned, "fine-tuning")


def _learn(args: argparse.Namespace, evaluate: Callable[..., Result], title: str) -> Answer:
    folder, config, saved = load_run(args.run, args.overrides)
    device = distributed.init(device_kind(config))
    data = open_data(config.data, config.run.seed)
    encoder = encoder_of(config, saved, args.encoder, device)
    name = args.name or args.command + ("" if args.encoder == "trained" else f"-{args.encoder}")
    result = evaluate(config, encoder, data, device, folder / name, args.resume)
    scores = {"top1": result.top1, "top5": result.top5, "best_top1": result.best_top1}
    facts = {"name": name, "epochs": result.epochs, **scores}
    _record(folder, args, saved, facts)
    text = (
        f"{_start(args, saved)}: {title} ({result.epochs} epochs): top-1 {result.top1:.2%}, "
        f"top-5 {result.top5:.2%} "
        f"(best epoch on the test images: {result.best_epoch}, {result.best_top1:.2%})"
    )
    return Answer({"encoder": args.encoder, "step": saved["step"], **facts}, text)


def _start(args: argparse.Namespace, saved: Mapping[str, Any]) -> str:
    return f"{args.encoder} encoder, {saved['step']} steps"


def _record(
    folder: Path, args: argparse.Namespace, saved: Mapping[str, Any], scores: Mapping[str, Any]
) -> None:
    """Add scores to the run's evaluations.jsonl, on the main rank."""
    if not distributed.is_main():
        return
    line = {"evaluation": args.command, "encoder": args.encoder, "step": saved["step"], **scores}
    with (folder / EVALUATIONS).open("a") as file:
        file.write(json.dumps({**line, "overrides": args.overrides}) + "\n")


def compare(args: argparse.Namespace) -> Answer:
    """Several configurations on one budget."""
    words = [*args.words, *args.overrides]
    configs = [Path(word) for word in words if "=" not in word]
    rows = compare_configs(
        configs, args.seeds, args.out, [word for word in words if "=" in word],
        ("knn", "linear") if args.linear else ("knn",), args.unequal,
    )  # fmt: skip
    failed = sum(bool(run.failure) for row in rows for run in row.runs)
    text = compared_table(rows)
    if failed:
        text += f"\n{failed} runs did not come to their end; {args.out}/compare.csv says why"
    facts = {"out": args.out, "rows": [asdict(row) for row in rows], "failed": failed}
    return Answer(facts, text, MISTAKE if failed else 0)


def report(args: argparse.Namespace) -> Answer:
    """The page of a run."""
    folder = args.run if args.run.suffix != ".pt" else args.run.parent
    page, state = run_page.write(folder), run_page.state_of(folder).told
    return Answer({"page": page, "state": state}, f"{page}: {state}")


def export(args: argparse.Namespace) -> Answer:
    """An encoder's weights for other libraries."""
    written = export_encoder(args.run, args.out, args.format)
    text = (
        f"{written.path}: {written.tensors} tensors for {args.format}'s {written.architecture}\n"
        f"Loaded there, its features differ from ours by {written.difference:.1e} of the largest."
    )
    return Answer(asdict(written), text)


def demo(args: argparse.Namespace) -> Answer:
    """Generated scenes, with and without guidance."""
    run_demo(args.out, changes=args.overrides)
    return Answer({"out": args.out}, "")
