"""The command line of the trainer.

python -m trainers pretrain CONFIG [key=value ...] [--resume]
python -m trainers knn CHECKPOINT [key=value ...]
python -m trainers demo OUT
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoint, config_file, distributed
from .amp import device_kind
from .data import open_data
from .evaluate import knn
from .methods import method_of
from .pretrain import pretrain
from .report import table

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, or 2 with one sentence for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("pretrain", help="train an encoder as a configuration says")
    train.add_argument("config", type=Path, help="YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as optim.lr=0.1")
    train.add_argument("--resume", action="store_true", help="continue the run in run.out, if there is one")
    score = commands.add_parser("knn", help="weighted kNN of a checkpoint's frozen features")
    score.add_argument("checkpoint", type=Path, help="run folder, or its last.pt")
    score.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as data.eval_val=DIR")
    score.add_argument("-k", type=int, default=200, help="neighbours (200)")
    score.add_argument("--temperature", type=float, default=0.1, help="of their votes (0.1)")
    show = commands.add_parser("demo", help="pretrain on generated scenes, with and without guidance")
    show.add_argument("out", type=Path, help="folder for scenes, runs and pictures")
    args, rest = parser.parse_known_args(arguments)
    if rest:
        # argparse gives up on key=value after an option; we take it wherever it stands.
        if not hasattr(args, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    warnings.showwarning = _show_warning
    try:
        match args.command:
            case "pretrain":
                _pretrain(args)
            case "knn":
                _knn(args)
            case _:
                from .demo import demo

                demo(args.out)
    except (ValueError, OSError, FloatingPointError) as error:
        # What the user can mend is said in one sentence; anything else keeps its traceback.
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.cleanup()
    return 0


def _show_warning(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
    """A warning is one line for the user, written around the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def _pretrain(args: argparse.Namespace) -> None:
    config = config_file.load(args.config, args.overrides)
    result = pretrain(config, resume=args.resume)
    if not distributed.is_main():
        return
    if result.scores:
        print(table(result.scores))
    state = "finished" if result.finished else "stopped and saved; continue with --resume"
    print(f"{config.run.out}: {state} after {result.step} steps")


def _knn(args: argparse.Namespace) -> None:
    folder = args.checkpoint.parent if args.checkpoint.is_file() else args.checkpoint
    saved = checkpoint.load(folder)
    config = config_file.override(config_file.parse(saved["config"]), args.overrides)
    device = distributed.init(device_kind(config))
    method = method_of(config)
    method.load_state_dict(saved["method"])
    data = open_data(config.data, config.run.seed)
    if data.queries is None:
        raise ValueError("kNN needs labels; name labelled folders by data.eval_train=DIR data.eval_val=DIR")
    encoder = method.encoder.to(device).to(memory_format=torch.channels_last)
    scores = knn(config, encoder, data.bank, data.queries, device, args.k, args.temperature)
    if distributed.is_main():
        bank, queries = len(data.bank), len(data.queries)
        print(f"kNN (k {args.k}, {bank} neighbours, {queries} queries) after {saved['step']} steps: "
              f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}")  # fmt: skip
