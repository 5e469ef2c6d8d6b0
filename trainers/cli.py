"""The command line of the trainer.

python -m trainers pretrain CONFIG [key=value ...] [--resume]
python -m trainers knn RUN [key=value ...]
python -m trainers localise RUN [--encoder timm:NAME] [key=value ...]
python -m trainers linear RUN [key=value ...] [--resume]
python -m trainers finetune RUN finetune.labels=0.01 [key=value ...] [--resume]
python -m trainers compare CONFIG CONFIG ... --seeds 3 --out OUT [key=value ...]
python -m trainers report RUN
python -m trainers export RUN OUT [--format timm]
python -m trainers demo OUT

RUN is the folder of a run, or its last.pt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import config_file, distributed
from .amp import device_kind
from .backbones import Backbone
from .data import open_data
from .evaluate import knn
from .evaluate.encoders import KINDS, encoder_of, load_run, method_with
from .evaluate.linear import linear_probe
from .evaluate.map_scores import map_scores, seen_maps
from .evaluate.map_scores import table as map_table
from .evaluate.semi_supervised import finetune
from .evaluate.supervised import Result
from .frozen import frozen_encoder
from .localise import input_size
from .methods import Method
from .pretrain import pretrain
from .report import table as scores_table

__all__ = ["main"]

_CHANGE = re.compile(r"\w+(\.\w+)+=")  # section.key=value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, or 2 with one sentence for a user's mistake.

    A run that a signal stopped exits with 75 where torchrun may restart it: when machines join or leave, an
    agent that has not noticed yet would take 0 for the end of the work.
    """
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out first: argparse would give them to an option before them, or not know them after one.
    changes = [word for word in words if _CHANGE.match(word)]
    args = parser.parse_args([word for word in words if word not in changes])
    if changes and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(changes)}")
    if changes:
        args.overrides = [*args.overrides, *changes]
    warnings.showwarning = _show_warning
    command: Callable[[argparse.Namespace], int | None] = args.run_command
    try:
        with distributed.together():
            return command(args) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        # What the user can mend is said in one sentence; anything else keeps its traceback.
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, help: str, command: Callable[[argparse.Namespace], int | None]
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.set_defaults(run_command=command)
        return added

    train = add("pretrain", "train an encoder as a configuration says", _pretrain)
    train.add_argument("config", type=Path, help="YAML file, see configs/")
    knn = add("knn", "weighted kNN of a checkpoint's frozen features", _knn)
    knn.add_argument("-k", type=int, nargs="+", default=[200], help="neighbours (200)")
    knn.add_argument("--temperature", type=float, default=0.1, help="of their votes (0.1)")
    probe = add("linear", "a linear classifier on a checkpoint's frozen encoder", _linear)
    tune = add("finetune", "encoder and classifier on few labels", _finetune)
    find = add("localise", "how well a checkpoint's maps find the true objects", _localise)
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
    for configured in (train, knn, find, probe, tune):
        configured.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.1")
    page = add("report", "report.html of a run anew, from what is in its folder", _report)
    page.add_argument("run", type=Path, help="run folder, or its last.pt")
    out = add("export", "the encoder's weights as torchvision or timm names them", _export)
    out.add_argument("run", type=Path, help="run folder, or its last.pt")
    out.add_argument("out", type=Path, help="safetensors file to write")
    out.add_argument("--format", choices=("torchvision", "timm"), default="torchvision")
    many = add("compare", "several configurations on one budget, in one table", _compare)
    many.add_argument("words", nargs="+", metavar="CONFIG", help="YAML files, and key=value for all of them")
    many.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    many.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    many.add_argument("--linear", action="store_true", help="a linear probe of each, too")
    many.add_argument("--unequal", action="store_true", help="although their budgets differ")
    many.set_defaults(overrides=[])
    show = add("demo", "pretrain on generated scenes, with and without guidance", _demo)
    show.add_argument("out", type=Path, help="folder for scenes, runs and pictures")
    return parser


def _show_warning(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
    """A warning is one line for the user, written around the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def _pretrain(args: argparse.Namespace) -> int:
    config = config_file.load(args.config, args.overrides)
    result = pretrain(config, resume=args.resume)
    if distributed.is_main():
        if result.scores:
            print(scores_table(result.scores))
        state = "finished" if result.finished else "stopped and saved; continue with --resume"
        print(f"{config.run.out}: {state} after {result.step} steps")
    stopped = not result.finished and result.step != config.run.max_steps
    return os.EX_TEMPFAIL if stopped and distributed.restartable() else 0


def _knn(args: argparse.Namespace) -> None:
    folder, config, saved = load_run(args.run, args.overrides)
    device = distributed.init(device_kind(config))
    data = open_data(config.data, config.run.seed)
    if data.queries is None:
        raise ValueError("kNN needs labels; name labelled folders by data.eval_train=DIR data.eval_val=DIR")
    encoder = encoder_of(config, saved, args.encoder, device)
    for k, scores in knn(config, encoder, data.bank, data.queries, device, args.k, args.temperature).items():
        told = f"k {k}, {len(data.bank)} neighbours, {len(data.queries)} queries"
        _tell(folder, args, saved, {"k": k, **scores}, f"kNN ({told}): top-1 {scores['top1']:.2%}, "
              f"top-5 {scores['top5']:.2%}")  # fmt: skip


def _localise(args: argparse.Namespace) -> None:
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
    if distributed.is_main():
        how = config.localise
        layer = how.layer or "the last stage"
        print(f"{args.encoder} encoder, {layer} at {input_size(config, how)} pixels, "
              f"{scores['whole']['images']} images with true boxes\n{map_table(scores)}")  # fmt: skip
    for name, row in scores.items():
        _record(folder, args, saved, {"boxes": name, **row})


def _linear(args: argparse.Namespace) -> None:
    _learn(args, linear_probe, "linear probe")


def _finetune(args: argparse.Namespace) -> None:
    _learn(args, finetune, "fine-tuning")


def _learn(args: argparse.Namespace, evaluate: Callable[..., Result], title: str) -> None:
    folder, config, saved = load_run(args.run, args.overrides)
    device = distributed.init(device_kind(config))
    data = open_data(config.data, config.run.seed)
    encoder = encoder_of(config, saved, args.encoder, device)
    name = args.name or args.command + ("" if args.encoder == "trained" else f"-{args.encoder}")
    result = evaluate(config, encoder, data, device, folder / name, args.resume)
    scores = {"top1": result.top1, "top5": result.top5, "best_top1": result.best_top1}
    _tell(folder, args, saved, {"name": name, "epochs": result.epochs, **scores}, f"{title} ({result.epochs} "
          f"epochs): top-1 {result.top1:.2%}, top-5 {result.top5:.2%} (best epoch on the test images: "
          f"{result.best_epoch}, {result.best_top1:.2%})")  # fmt: skip


def _tell(
    folder: Path, args: argparse.Namespace, saved: Mapping[str, Any], scores: Mapping[str, Any], text: str
) -> None:
    """Print a score and add it to the run's evaluations.jsonl, on the main rank."""
    if not distributed.is_main():
        return
    print(f"{args.encoder} encoder, {saved['step']} steps: {text}")
    _record(folder, args, saved, scores)


def _record(
    folder: Path, args: argparse.Namespace, saved: Mapping[str, Any], scores: Mapping[str, Any]
) -> None:
    """Add scores to the run's evaluations.jsonl, on the main rank."""
    if not distributed.is_main():
        return
    line = {"evaluation": args.command, "encoder": args.encoder, "step": saved["step"], **scores}
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({**line, "overrides": args.overrides}) + "\n")


def _compare(args: argparse.Namespace) -> None:
    from .compare import compare
    from .compare_table import table

    words = [*args.words, *args.overrides]
    configs = [Path(word) for word in words if "=" not in word]
    rows = compare(
        configs, args.seeds, args.out, [word for word in words if "=" in word],
        ("knn", "linear") if args.linear else ("knn",), args.unequal,
    )  # fmt: skip
    if distributed.is_main():
        print(table(rows))
    failed = sum(bool(run.failure) for row in rows for run in row.runs)
    if failed:
        raise ValueError(f"{failed} runs did not come to their end; {args.out}/compare.csv says why")


def _report(args: argparse.Namespace) -> None:
    from . import run_page

    folder = args.run if args.run.suffix != ".pt" else args.run.parent
    print(f"{run_page.write(folder)}: {run_page.state_of(folder).told}")


def _export(args: argparse.Namespace) -> None:
    from .export import export

    written = export(args.run, args.out, args.format)
    print(f"{written.path}: {written.tensors} tensors for {args.format}'s {written.architecture}")
    print(f"Loaded there, its features differ from ours by {written.difference:.1e} of the largest.")


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo

    demo(args.out)
