"""The command line of the loader: `dali-views TOOL ...`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib import import_module

from .command_line import Parser, carry_out

__all__ = ["main"]

EXAMPLES = """
dali-views index photos                      which images are usable, and why others are not
dali-views show photos --out views.png       images, boxes, crops and views
dali-views bench photos                      speed, beside other loaders
"""

COMMANDS = {
    "index": ("index", "scan images, report what is left out and why, and cache the result"),
    "check": ("check", "decode every image and list unusable ones"),
    "show": ("show", "draw images, boxes, crops and views into a picture or a page"),
    "bench": ("bench", "speed beside the limits and other loaders, cost in training, memory"),
    "pack": ("pack", "copy a data set to tar shards, smaller if desired; resumes after a kill"),
    "gpu-report": ("gpu_report", "tests, pixels, speed and memory on this GPU, in ten minutes and one page"),
    "scenes": ("scenes", "generate images of small objects with known boxes, for experiments"),
    "doctor": ("doctor", "report what this machine can do, and what to change"),
}
"""Module below `tools` and help of each command. The module has `EXAMPLES`, `add(parser)` and `run(args)`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 1 for a fault that a command was to find, 2 for a mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = _parser(words[:1]).parse_args(words)
    except SystemExit as done:  # after the help, or for an unknown word
        return int(done.code or 0)
    # RuntimeError is what DALI and PyTorch raise for a missing GPU, a full memory, a broken file.
    mistakes = (ValueError, OSError, RuntimeError)
    return carry_out(lambda: args.run(args), as_json=args.json, mistakes=mistakes)


def _parser(used: Collection[str]) -> Parser:
    """Knows all commands, and the options of those that are used.

    Only their modules are imported, so that `doctor` runs where a package that others need is broken.
    """
    parser = Parser(prog="dali-views", examples=EXAMPLES, description="Images for self-supervised learning.")
    named = parser.add_subparsers(dest="command", required=True, metavar="TOOL")
    for name, (place, text) in COMMANDS.items():
        if name not in used:
            named.add_parser(name, help=text)
            continue
        module = import_module(f".{place}", __package__)
        command = named.add_parser(name, help=text, examples=module.EXAMPLES)
        module.add(command)
        command.add_argument("--json", action="store_true", help="print the result as one line of JSON")
        command.set_defaults(run=module.run)
    return parser
