"""The command line of the loader: `dali-views`, or `python -m dali_views`."""

from __future__ import annotations

from collections.abc import Sequence

from . import commands
from .command_line import Parser, carry_out

__all__ = ["main"]

EXAMPLES = """
dali-views index photos                      which images are usable, and why others are not
dali-views show photos --out views.png       images, boxes, crops and views
dali-views bench photos                      how fast, beside other loaders
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 1 if `check` or `doctor` finds fault, 2 with a sentence for a mistake."""
    parser = Parser(prog="dali-views", examples=EXAMPLES, description="Images for self-supervised learning.")
    named = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands.ALL:
        command.add(named)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as done:  # after the help, or a word that is not known
        return int(done.code or 0)
    # RuntimeError is what DALI and PyTorch raise for a missing GPU, a full memory, a broken file.
    mistakes = (ValueError, OSError, RuntimeError)
    return carry_out(lambda: args.run(args), as_json=args.json, mistakes=mistakes)
