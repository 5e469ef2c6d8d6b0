"""The command line of the trainer: `python -m trainers COMMAND ...`, which torchrun starts as well."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from dali_views.tools.command_line import Answer, Parser, carry_out, counted

from . import bench, compare, demo
from . import config as cfg
from .config import file as config_file
from .config import keys
from .detect import command as detect
from .engine import checkpoint, interrupt, ranks
from .evaluate import command as evaluate
from .export import export as export_encoder
from .pretrain import pretrain as train
from .report import CONFIG
from .report import page as run_page
from .report.report import table

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


def _keys(args: argparse.Namespace) -> Answer:
    """`keys`: what a configuration may say."""
    found = keys.listed(args.section)
    return Answer({"keys": found}, keys.table(found))


# fmt: off
_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Answer], str, str]] = {
    "pretrain": (_pretrain, "train an encoder by a configuration", f"{_RUN}\n{_RUN} --resume"),
    "knn": (evaluate.command, "weighted kNN on a checkpoint's frozen features",
            "knn runs/a -k 20 200 data.eval_train=labelled/train data.eval_val=labelled/val"),
    "linear": (evaluate.command, "train a linear classifier on a checkpoint's frozen encoder",
               "linear runs/a data.eval_train=labelled/train data.eval_val=labelled/val\n"
               "linear runs/a --multilabel data.kind=coco data.path=photos data.instances=boxes.json"),
    "finetune": (evaluate.command, "train encoder and classifier on few labels",
                 "finetune runs/a finetune.labels=0.01"),
    "svm": (evaluate.command, "VOC 2007's classification by linear SVMs, with all images and with few",
            "svm runs/a data.kind=folder data.path=VOCdevkit "
            "detect.instances=[VOCdevkit/VOC2007/ImageSets/Main/trainval.txt] "
            "detect.val_instances=[VOCdevkit/VOC2007/ImageSets/Main/test.txt] --shots 1 2 4 8 16 32 64 96"),
    "transfer": (evaluate.command, "kNN and linear classifiers on several labelled sets, in one table",
                 "transfer runs/a --sets configs/transfer/sets.yaml"),
    "localise": (evaluate.command, "measure how well a checkpoint's maps find the true objects",
                 "localise runs/a data.boxes=boxes.txt\n"
                 "localise runs/a data.boxes=boxes.txt --encoder timm:resnet50.a1_in1k"),
    "detect": (detect.command, "train a detector on a run's or an exported encoder: AP of boxes and masks",
               "detect runs/a configs/detect/coco_1x.yaml data.path=train2017 data.instances=train.json\n"
               "detect encoder.safetensors data.path=photos data.instances=boxes.json detect.steps=1000"),
    "demo": (demo.command, "pretrain on generated scenes with random, guided and true crops",
             "demo runs/demo\ndemo runs/quick run.epochs=4"),
    "report": (_report, "write report.html of a run again, from the files in its folder", "report runs/a"),
    "export": (_export, "write the encoder's weights under torchvision's or timm's names",
               "export runs/a encoder.safetensors --format timm"),
    "bench": (bench.command, "measure images per second, memory and waits of methods and guides",
              "bench photos\nbench photos --methods moco --guides none online_crop --csv bench.csv"),
    "keys": (_keys, "list every key of a configuration: type, default, meaning",
             "keys\nkeys optim\nkeys guide.saliency"),
    "compare": (compare.command, "train several configurations on one budget, in one table",
                "compare A.yaml A.yaml+B.yaml --seeds 3 --out runs/compare\n"
                "compare A.yaml A.yaml+B.yaml --out runs/compare --detect configs/detect/small.yaml"),
}
"""By name: what it does, its help, examples."""
# fmt: on


def _parser() -> Parser:
    told = (
        "Pretrain image encoders with crops that follow their heatmaps. RUN: a run's folder, or its last.pt."
    )
    parser = Parser(prog=_PROGRAM, examples=EXAMPLES, description=told)
    named = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    of: dict[str, argparse.ArgumentParser] = {}
    for name, (command, help, examples) in _COMMANDS.items():
        lines = "\n".join(f"{_PROGRAM} {line}" for line in examples.splitlines())
        of[name] = named.add_parser(name, help=help, parents=[common], examples=lines)
        of[name].set_defaults(run_command=command)

    bench.add(of["bench"])
    detect.add(of["detect"])
    told = "YAML files, merged in order (configs/... are in the package), or the folder of a run to --resume"
    of["pretrain"].add_argument("config", nargs="+", help=told)
    told = "YAML files (+ joins the files of one arm), and key=value for all"
    of["compare"].add_argument("words", nargs="+", metavar="CONFIG", help=told)
    of["demo"].add_argument("out", type=Path, help="folder for scenes, runs and pictures")
    of["demo"].add_argument(
        "--scenes", type=int, default=demo.SCENES, help="number of scenes; a third is held out"
    )
    for name in evaluate.COMMANDS:
        evaluate.add(name, of[name])
    for name in ("report", "export"):
        of[name].add_argument("run", type=Path, help="run folder, or its last.pt")
    of["demo"].add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.1")
    for name in ("pretrain", "compare"):
        of[name].set_defaults(overrides=[])
    told = "continue an earlier run, if there is one"
    of["pretrain"].add_argument("--resume", action="store_true", help=told)
    of["export"].add_argument("out", type=Path, help="safetensors file to write")
    of["export"].add_argument("--format", choices=("torchvision", "timm"), default="torchvision")
    of["keys"].add_argument("section", nargs="?", help="such as optim, or one of its choices: optim.lars")
    of["compare"].add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    of["compare"].add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    of["compare"].add_argument("--linear", action="store_true", help="also a linear probe of each")
    told = "also mAP of the classes of all objects in its images"
    of["compare"].add_argument("--multilabel", action="store_true", help=told)
    told = "also the mean over labelled sets of this file, see transfer"
    of["compare"].add_argument("--transfer", type=Path, metavar="FILE", help=told)
    told = "also AP of a detector by these files, on the run's images unless they name others"
    of["compare"].add_argument("--detect", type=Path, nargs="+", default=[], metavar="FILE", help=told)
    of["compare"].add_argument("--unequal", action="store_true", help="compare although budgets differ")
    return parser
