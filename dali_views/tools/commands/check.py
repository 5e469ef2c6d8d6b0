"""dali-views check: decode every image and list those that cannot be used."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ...data import bad_list
from ..command_line import Answer
from . import common

EXAMPLES = """
dali-views check photos --out bad.txt
dali-views index photos --leave-out bad.txt
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "check",
        parents=[common.images(), common.options()],
        examples=EXAMPLES,
        help="decode every image and list those that cannot be used",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, default=Path("bad.txt"), help="list to write (bad.txt)")
    parser.add_argument(
        "--device", choices=["gpu", "cpu"], help="whose decoder to ask; default: gpu if there is one"
    )
    parser.add_argument(
        "--batch-size", type=common.at_least(1), default=64, help="images decoded at a time (64)"
    )
    parser.add_argument("--workers", type=common.at_least(1), help="CPU threads (default: all cores)")


def run(args: argparse.Namespace) -> Answer:
    """Carries it out; exit code 1 if there is a bad one."""
    from ..check import check

    index = common.open_index(args)
    print(index.summary())
    refused = check(index, device=common.device(args), batch_size=args.batch_size, threads=args.workers)
    for path, reason in refused.items():
        print(f"  {path}: {reason}")
    bad = {os.path.join(index.root, path): reason for path, reason in index.left_out} | refused
    for row in range(len(index)):  # what is left out because it is listed twice is good nevertheless
        if (path := index.path(row)) not in refused:
            bad.pop(path, None)
    bad_list.save(args.out, bad)
    text = (
        f"{len(index) - len(refused)} images decoded, {len(refused)} not, "
        f"{len(index.left_out)} left out before\n"
        f"{args.out}: the {len(bad)} that cannot be used, for --leave-out and data.leave_out"
    )
    facts = {"decoded": len(index) - len(refused), "undecodable": refused, "bad": bad, "out": args.out}
    return Answer(facts, text, int(bool(bad)))
