"""The command line of the trainer: `dali-trainers`, or `python -m trainers`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from dali_views.tools.command_line import Answer, Parser, carry_out

from . import commands
from .engine import ranks as distributed
from .evaluate.encoders import KINDS

__all__ = ["main"]

_CHANGE = re.compile(r"\w+(\.\w+)+=")  # section.key=value


# As it was called; torchrun and a checkout take the module.
_PROGRAM = "dali-trainers" if Path(sys.argv[0]).name == "dali-trainers" else "python -m trainers"
_FILES = "configs/imagenet/moco_v2.yaml configs/guide/contrastive_crop.yaml"
_RUN = f"pretrain {_FILES} data.path=photos data.eval_val=null run.out=runs/a"
EXAMPLES = f"""
{_PROGRAM} {_RUN}
{_PROGRAM} {_RUN} --resume
{_PROGRAM} knn runs/a -k 20 200
torchrun --standalone --nproc-per-node 8 -m trainers pretrain {_FILES}
"""
_EXAMPLES = {
    "pretrain": f"{_RUN}\n{_RUN} --resume",
    "knn": "knn runs/a -k 20 200 data.eval_train=labelled/train data.eval_val=labelled/val",
    "linear": "linear runs/a data.eval_train=labelled/train data.eval_val=labelled/val",
    "finetune": "finetune runs/a finetune.labels=0.01",
    "localise": "localise runs/a data.boxes=boxes.txt\n"
    "localise runs/a data.boxes=boxes.txt --encoder timm:resnet50.a1_in1k",
    "compare": "compare A.yaml A.yaml+B.yaml --seeds 3 --out runs/compare",
    "report": "report runs/a",
    "export": "export runs/a encoder.safetensors --format timm",
    "demo": "demo runs/demo\ndemo runs/quick run.epochs=4",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, or 2 with one sentence for a user's mistake.

    A run that Ctrl-C stopped exits with 130, one that another signal stopped with 0. Where torchrun may
    restart it, both exit with 75: when machines join or leave, an agent that has not noticed yet would take 0
    for the end of the work.
    """
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out first: argparse would give them to an option before them, or not know them after one.
    changes = [word for word in words if _CHANGE.match(word)]
    try:
        args = parser.parse_args([word for word in words if word not in changes])
        if changes and not hasattr(args, "overrides"):
            parser.error(f"unrecognized arguments: {' '.join(changes)}")
    except SystemExit as done:  # after the help, or a word that is not known
        return int(done.code or 0)
    if changes:
        args.overrides = [*args.overrides, *changes]

    def command() -> Answer | int | None:
        with distributed.together():
            answer: Answer | int | None = args.run_command(args)
            return answer if distributed.is_main() or not isinstance(answer, Answer) else answer.code

    # What the user can mend is said in one sentence; anything else keeps its traceback.
    mistakes = (ValueError, OSError, FloatingPointError)
    return carry_out(command, as_json=args.json, mistakes=mistakes, warn=_warn)


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        examples=EXAMPLES,
        description="Pretrain image encoders with crops where they look. "
        "RUN is the folder of a run, or its last.pt.",
    )
    named = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="answer in one line of JSON")

    def add(name: str, help: str, command: Callable[[argparse.Namespace], Answer]) -> argparse.ArgumentParser:
        lines = "\n".join(f"{_PROGRAM} {line}" for line in _EXAMPLES[name].splitlines())
        added = named.add_parser(name, help=help, parents=[common], examples=lines)
        added.set_defaults(run_command=command)
        return added

    train = add("pretrain", "train an encoder as a configuration says", commands.pretrain)
    train.add_argument(
        "config", nargs="+", help="YAML files, merged in order; configs/... are in the package"
    )
    knn = add("knn", "weighted kNN of a checkpoint's frozen features", commands.knn)
    knn.add_argument("-k", type=int, nargs="+", default=[200], help="neighbours (200)")
    knn.add_argument("--temperature", type=float, default=0.1, help="of their votes (0.1)")
    probe = add("linear", "a linear classifier on a checkpoint's frozen encoder", commands.linear)
    tune = add("finetune", "encoder and classifier on few labels", commands.finetune)
    find = add("localise", "how well a checkpoint's maps find the true objects", commands.localise)
    find.add_argument("run", type=Path, help="run folder, or its last.pt")
    find.add_argument("--encoder", default="trained", metavar="WHICH", help="trained, untrained, or another "
                      "one on the run's data: timm:NAME or torchvision:NAME, with its weights")  # fmt: skip
    for scored in (knn, probe, tune):
        scored.add_argument("run", type=Path, help="run folder, or its last.pt")
        which = KINDS if scored is not tune else [kind for kind in KINDS if kind != "colours"]
        scored.add_argument(
            "--encoder", choices=which, default="trained", help="or one that any training must beat"
        )
    for taught in (probe, tune):
        taught.add_argument("--name", help="folder below the run for its checkpoints (that of the command)")
    for stopped in (train, probe, tune):
        stopped.add_argument("--resume", action="store_true", help="continue what was begun, if it was")
    show = add("demo", "pretrain on generated scenes, with and without guidance", commands.demo)
    show.add_argument("out", type=Path, help="folder for scenes, runs and pictures")
    train.set_defaults(overrides=[])
    for configured in (knn, find, probe, tune, show):
        configured.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.1")
    page = add("report", "report.html of a run anew, from what is in its folder", commands.report)
    page.add_argument("run", type=Path, help="run folder, or its last.pt")
    out = add("export", "the encoder's weights as torchvision or timm names them", commands.export)
    out.add_argument("run", type=Path, help="run folder, or its last.pt")
    out.add_argument("out", type=Path, help="safetensors file to write")
    out.add_argument("--format", choices=("torchvision", "timm"), default="torchvision")
    many = add("compare", "several configurations on one budget, in one table", commands.compare)
    many.add_argument(
        "words", nargs="+", metavar="CONFIG", help="YAML files (+ joins those of one), and key=value for all"
    )
    many.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    many.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    many.add_argument("--linear", action="store_true", help="a linear probe of each, too")
    many.add_argument("--unequal", action="store_true", help="although their budgets differ")
    many.set_defaults(overrides=[])
    return parser


def _warn(text: str) -> None:
    """A warning is one line, written around the progress bar."""
    tqdm.write(text, file=sys.stderr)
