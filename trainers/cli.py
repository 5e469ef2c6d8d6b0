"""The command line of the trainer: `python -m trainers COMMAND ...`, which torchrun starts as well."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dali_views.system.files import append_line
from dali_views.tools.command_line import Answer, Parser, carry_out, counted

from . import bench, compare, demo
from . import config as cfg
from .config import file as config_file
from .config import keys
from .data import open_data
from .detect import command as detect
from .encoders.backbones import Backbone
from .encoders.frozen import frozen_encoder
from .engine import checkpoint, interrupt, ranks
from .engine.setting import join
from .evaluate.classifiers import finetune, linear_probe
from .evaluate.evaluator import map_scores, seen_maps
from .evaluate.evaluator import table as map_table
from .evaluate.knn import knn as knn_scores
from .export import export as export_encoder
from .guides.encoder_maps import EncoderMaps
from .methods import Method
from .pretrain import pretrain as train
from .report import CONFIG, EVALUATIONS
from .report import page as run_page
from .report.report import table
from .saved_run import KINDS, encoder_of, load_run, method_with

__all__ = ["main"]

_CHANGE = re.compile(r"\w+(\.\w+)+=")  # section.key=value
_PROGRAM = "python -m trainers"  # the one form that torchrun takes, too
_FILES = "configs/imagenet/moco_v2.yaml configs/guide/contrastive_crop.yaml"
_RUN = f"pretrain {_FILES} data.path=photos data.eval_val=null run.out=runs/a"
EXAMPLES = f"""
{_PROGRAM} {_RUN}
{_PROGRAM} {_RUN} --resume
{_PROGRAM} knn runs/a -k 20 200
torchrun --standalone --nproc-per-node 8 -m trainers pretrain {_FILES}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, or 2 with one sentence for a user's mistake.

    A run that Ctrl-C stopped exits with 130, one that another signal stopped with 0. If torchrun may restart
    it, both exit with 75: when machines join or leave, an agent that has not noticed yet would take 0 for the
    end of the work.
    """
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Removed first: argparse would assign them to a preceding option, or reject them after one.
    changes = [word for word in words if _CHANGE.match(word)]
    try:
        args = parser.parse_args([word for word in words if word not in changes])
        if changes and not hasattr(args, "overrides"):
            parser.error(f"unrecognized arguments: {' '.join(changes)}")
    except SystemExit as done:  # after the help, or an unknown word
        return int(done.code or 0)
    if changes:
        args.overrides = [*args.overrides, *changes]

    def command() -> Answer | int | None:
        with ranks.together():
            answer: Answer = args.run_command(args)
            return answer if ranks.is_main() else answer.code

    def warn(text: str) -> None:
        tqdm.write(text, file=sys.stderr)  # around the progress bar

    # Mistakes that the user can fix are one sentence; anything else keeps its traceback.
    mistakes = (ValueError, OSError, FloatingPointError)
    return carry_out(command, as_json=args.json, mistakes=mistakes, warn=warn)


def _pretrain(args: argparse.Namespace) -> Answer:
    files = [word for word in args.config if "=" not in word]
    changes = [*(word for word in args.config if "=" in word), *args.overrides]
    config = _of_run(files, changes) or config_file.load(files, changes)
    result = train(config, resume=args.resume)
    steps = counted(result.step, "step")
    if result.finished:
        text = f"{config.run.out}: finished after {steps}"
    else:
        text = f"{config.run.out}: stopped after {steps} and saved; --resume continues it"
    if result.scores:
        text = f"{table(result.scores)}\n{text}"
    stopped = not result.finished and result.step != config.run.max_steps
    code = 0
    if stopped and interrupt.restartable():
        code = os.EX_TEMPFAIL
    elif stopped and result.ctrl_c:  # so that a shell does not go on to its next command
        code = 128 + signal.SIGINT
    return Answer({"run": config.run.out, **asdict(result)}, text, code)


def _of_run(files: Sequence[str], changes: Sequence[str]) -> cfg.Config | None:
    """The configuration of a run that is named, in place of files, by its folder or its last.pt."""
    if len(files) != 1:
        return None
    folder = Path(files[0]).parent if Path(files[0]).name == checkpoint.LAST else Path(files[0])
    if not (folder / CONFIG).is_file():
        return None
    return config_file.load(folder / CONFIG, [f"run.out={json.dumps(str(folder))}", *changes])


def _report(args: argparse.Namespace) -> Answer:
    folder = args.run if args.run.suffix != ".pt" else args.run.parent
    page, state = run_page.write(folder), run_page.state_of(folder)[1]
    return Answer({"page": page, "state": state}, f"{page}: {state}")


def _export(args: argparse.Namespace) -> Answer:
    written = export_encoder(args.run, args.out, args.format)
    text = (
        f"{written.path}: {written.tensors} tensors for {args.format}'s {written.architecture}\n"
        f"Loaded there, its features differ from ours by {written.difference:.1e} of the largest."
    )
    return Answer(asdict(written), text)


class _Evaluated:
    """The run that a command names by `args.run`, with its overrides, and the data to evaluate it on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder, self.config, self.saved = load_run(args.run, args.overrides)
        self.setting = join(self.config)
        self.data = open_data(self.config.data, self.config.run.seed)

    @property
    def title(self) -> str:
        return f"{self.args.encoder} encoder, {self.saved['step']} steps"

    def encoder(self) -> Backbone:
        return encoder_of(self.config, self.saved, self.args.encoder, self.setting.device)

    def record(self, scores: Mapping[str, Any]) -> None:
        """Add scores to the run's evaluations.jsonl, on the main rank."""
        if ranks.is_main():
            args = self.args
            about = {"evaluation": args.command, "encoder": args.encoder, "step": self.saved["step"]}
            line = {**about, **scores, "overrides": args.overrides}
            append_line(self.folder / EVALUATIONS, json.dumps(line))


def _knn(args: argparse.Namespace) -> Answer:
    """`knn`: scores of a run's encoder for each k."""
    run = _Evaluated(args)
    bank, queries = run.data.bank, run.data.queries
    if queries is None:
        raise ValueError("kNN needs labels; name labelled folders by data.eval_train=DIR data.eval_val=DIR")
    k, temperature = run.config.neighbours
    found = knn_scores(
        run.setting, run.config.views, run.encoder(), bank, queries, args.k or [k], temperature
    )
    lines = []
    for k, scores in found.items():
        run.record({"k": k, **scores})
        told = f"kNN (k {k}, T {temperature:g}, {len(bank)} neighbours, {len(queries)} queries)"
        lines.append(f"{run.title}: {told}: top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}")
    return Answer({"encoder": args.encoder, "step": run.saved["step"], "k": found}, "\n".join(lines))


def _classify(args: argparse.Namespace) -> Answer:
    """`linear` and `finetune`: a classifier on a run's encoder, with a checkpoint of its own."""
    run = _Evaluated(args)
    name = args.name or args.command + ("" if args.encoder == "trained" else f"-{args.encoder}")
    probe = args.command == "linear"
    evaluate, title = (linear_probe, "linear probe") if probe else (finetune, "fine-tuning")
    result = evaluate(run.config, run.setting, run.encoder(), run.data, run.folder / name, args.resume)
    scores = {"top1": result.top1, "top5": result.top5, "best_top1": result.best_top1}
    facts = {"name": name, "epochs": len(result.curve), **scores}
    run.record(facts)
    text = (
        f"{run.title}: {title} ({facts['epochs']} epochs): top-1 {result.top1:.2%}, top-5 {result.top5:.2%} "
        f"(best epoch on the test images: {result.best_epoch}, {result.best_top1:.2%})"
    )
    return Answer({"encoder": args.encoder, "step": run.saved["step"], **facts}, text)


def _localise(args: argparse.Namespace) -> Answer:
    """`localise`: scores of every kind of map of a run's encoder, or of another one on the run's data."""
    run = _Evaluated(args)
    index, how, views = run.data.train, run.config.localise, run.config.views
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
    return Answer({"encoder": args.encoder, "step": run.saved["step"], "boxes": scores}, text)


def _keys(args: argparse.Namespace) -> Answer:
    """`keys`: what a configuration may say."""
    found = keys.listed(args.section)
    return Answer({"keys": found}, keys.table(found))


# fmt: off
_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Answer], str, str]] = {
    "pretrain": (_pretrain, "train an encoder as a configuration says", f"{_RUN}\n{_RUN} --resume"),
    "knn": (_knn, "weighted kNN of a checkpoint's frozen features",
            "knn runs/a -k 20 200 data.eval_train=labelled/train data.eval_val=labelled/val"),
    "linear": (_classify, "a linear classifier on a checkpoint's frozen encoder",
               "linear runs/a data.eval_train=labelled/train data.eval_val=labelled/val"),
    "finetune": (_classify, "encoder and classifier on few labels",
                 "finetune runs/a finetune.labels=0.01"),
    "localise": (_localise, "how well a checkpoint's maps find the true objects",
                 "localise runs/a data.boxes=boxes.txt\n"
                 "localise runs/a data.boxes=boxes.txt --encoder timm:resnet50.a1_in1k"),
    "detect": (detect.command, "a detector on a checkpoint's or an exported encoder: AP of boxes and masks",
               "detect runs/a configs/detect/coco_1x.yaml data.path=train2017 data.instances=train.json\n"
               "detect encoder.safetensors data.path=photos data.instances=boxes.json detect.steps=1000"),
    "demo": (demo.command, "pretrain on generated scenes with random, guided and true crops",
             "demo runs/demo\ndemo runs/quick run.epochs=4"),
    "report": (_report, "write report.html of a run again, from the files in its folder", "report runs/a"),
    "export": (_export, "the encoder's weights as torchvision or timm names them",
               "export runs/a encoder.safetensors --format timm"),
    "bench": (bench.command, "images per second, memory and waits of methods and guides",
              "bench photos\nbench photos --methods moco --guides none online_crop --csv bench.csv"),
    "keys": (_keys, "every key of a configuration: type, default, meaning",
             "keys\nkeys optim\nkeys guide.saliency"),
    "compare": (compare.command, "several configurations on one budget, in one table",
                "compare A.yaml A.yaml+B.yaml --seeds 3 --out runs/compare"),
}
"""By name: what it does, its help, examples."""
# fmt: on


def _parser() -> Parser:
    told = "Pretrain image encoders with crops where they look. RUN is the folder of a run, or its last.pt."
    parser = Parser(prog=_PROGRAM, examples=EXAMPLES, description=told)
    named = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="answer in one line of JSON")
    of: dict[str, argparse.ArgumentParser] = {}
    for name, (command, help, examples) in _COMMANDS.items():
        lines = "\n".join(f"{_PROGRAM} {line}" for line in examples.splitlines())
        of[name] = named.add_parser(name, help=help, parents=[common], examples=lines)
        of[name].set_defaults(run_command=command)

    bench.add(of["bench"])
    detect.add(of["detect"])
    told = "YAML files, merged in order (configs/... are in the package), or the folder of a run to --resume"
    of["pretrain"].add_argument("config", nargs="+", help=told)
    told = "YAML files (+ joins those of one), and key=value for all"
    of["compare"].add_argument("words", nargs="+", metavar="CONFIG", help=told)
    of["demo"].add_argument("out", type=Path, help="folder for scenes, runs and pictures")
    of["demo"].add_argument("--scenes", type=int, default=demo.SCENES, help="how many; a third is held out")
    for name in ("knn", "linear", "finetune", "localise", "report", "export"):
        of[name].add_argument("run", type=Path, help="run folder, or its last.pt")
    for name in ("knn", "linear", "finetune", "localise", "demo"):
        of[name].add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.1")
    for name in ("pretrain", "compare"):
        of[name].set_defaults(overrides=[])
    for name in ("pretrain", "linear", "finetune"):
        of[name].add_argument(
            "--resume", action="store_true", help="continue an earlier one, if there is one"
        )
    for name, kinds in (("knn", KINDS), ("linear", KINDS), ("finetune", ("trained", "untrained"))):
        of[name].add_argument("--encoder", choices=kinds, default="trained", help="the others are baselines")
    which = "trained, untrained, or another one on the run's data: timm:NAME or torchvision:NAME"
    of["localise"].add_argument("--encoder", default="trained", metavar="WHICH", help=which)
    of["knn"].add_argument("-k", type=int, nargs="+", help="neighbours (knn.k)")
    for name in ("linear", "finetune"):
        of[name].add_argument("--name", help="folder below the run for its checkpoints (the command's name)")
    of["export"].add_argument("out", type=Path, help="safetensors file to write")
    of["export"].add_argument("--format", choices=("torchvision", "timm"), default="torchvision")
    of["keys"].add_argument("section", nargs="?", help="such as optim, or one of its choices: optim.lars")
    of["compare"].add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    of["compare"].add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    of["compare"].add_argument("--linear", action="store_true", help="also a linear probe of each")
    of["compare"].add_argument("--unequal", action="store_true", help="compare although budgets differ")
    return parser
