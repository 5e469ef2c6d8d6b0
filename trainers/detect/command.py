"""`python -m trainers detect`: a detector on the encoder of a run or of an exported file."""

from __future__ import annotations

import argparse
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dali_views.tools.command_line import Answer

from .. import config as cfg
from ..config import file as config_file
from ..encoders.backbones import Backbone, build_backbone
from ..encoders.weights import load_weights
from ..engine import interrupt, ranks
from ..engine.setting import join
from ..report import EVALUATIONS
from ..saved_run import encoder_of, load_run
from .train import train_detector

__all__ = ["add", "command"]

_AFRESH = {"data": {"kind": "coco"}}  # what a run was pretrained on says nothing about what is detected


def add(parser: argparse.ArgumentParser) -> None:
    """The command's own words."""
    parser.add_argument("run", type=Path, help="run folder, its last.pt, or an exported file (.safetensors)")
    told = "YAML files with a section `detect`, and key=value such as data.path=photos"
    parser.add_argument("words", nargs="*", metavar="CONFIG", help=told)
    parser.add_argument("--encoder", choices=("trained", "untrained"), default="trained")
    parser.add_argument("--resume", action="store_true", help="continue an earlier run, if there is one")
    parser.add_argument("--name", help="folder below the run for checkpoint and report (detect)")
    parser.set_defaults(overrides=[])


def command(args: argparse.Namespace) -> Answer:
    """Train and test; record the scores in the run's evaluations.jsonl."""
    files = [word for word in args.words if "=" not in word]
    changes = [*(word for word in args.words if "=" in word), *args.overrides]
    exported = args.run.suffix == ".safetensors"
    if exported:
        config, about = _exported(args.run, changes, files)
        home, trained_for = Path(config.run.out), int(about.get("step", 0))
    else:
        home, config, saved = load_run(args.run, changes, files, _AFRESH)
        trained_for = int(saved["step"])
    setting = join(config)
    encoder = (
        _encoder_of_file(args, config, setting.device)
        if exported
        else encoder_of(config, saved, args.encoder, setting.device)
    )
    name = args.name or "detect" + ("" if args.encoder == "trained" else f"-{args.encoder}")
    result = train_detector(config, setting, encoder, home / name, args.resume)
    title = f"{home / name}: {args.encoder} encoder, {trained_for} steps: detection"
    code = 0
    if result.finished:
        told = ", ".join(f"{key.replace('_', ' ')} {value:.2%}" for key, value in result.scores.items())
        text = f"{title} ({result.step} steps): {told}"
        if ranks.is_main():
            facts = {"evaluation": "detect", "encoder": args.encoder, "step": trained_for, "name": name}
            line = {**facts, "steps": result.step, **result.scores, "overrides": changes}
            with (home / EVALUATIONS).open("a") as file:
                file.write(json.dumps(line) + "\n")
    else:
        text = f"{title}: stopped after {result.step} steps and saved; --resume continues it"
        if result.step != config.run.max_steps and interrupt.restartable():
            code = os.EX_TEMPFAIL
        elif result.ctrl_c:
            code = 128 + signal.SIGINT
    return Answer({"run": home, "name": name, **asdict(result)}, text, code)


def _exported(file: Path, changes: list[str], files: list[str]) -> tuple[cfg.Config, dict[str, Any]]:
    """The configuration that an exported file stands for, and its metadata."""
    try:
        with safe_open(file, "pt") as weights:
            about = weights.metadata() or {}
        model = {"backbone": about["architecture"], "stem": about["stem"]}
        views = {key: json.loads(about[key]) for key in ("mean", "std")}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} was not written by `export` ({error}); export the encoder again") from None
    out = {"run": {"out": f"runs/{file.stem}"}, "model": model, "views": views}
    begun = cfg.check({**out, "data": {**_AFRESH["data"], "path": ""}}, str(file))
    return config_file.override(begun, changes, files, _AFRESH), about


def _encoder_of_file(args: argparse.Namespace, config: cfg.Config, device: torch.device) -> Backbone:
    torch.manual_seed(config.run.seed)
    encoder = build_backbone(config.model.backbone, config.model.stem)
    if args.encoder == "trained":
        load_weights(encoder, args.run)
    return encoder.to(device)
