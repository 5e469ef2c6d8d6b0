"""What all commands of the project share: help, mistakes, exit codes, answers for machines."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..system.machine import full_memory

MISTAKE = 2
"""Exit code of a mistake that the user can fix."""

NEAR = 0.7
"""How alike two words must be, as of `difflib`, before one is taken for a misspelling of the other."""

_REMEDIES = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "free some space or choose a folder on another disk",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EACCES: "change its permissions or choose another path",
    errno.EPERM: "change its permissions or choose another path",
    errno.EROFS: "choose a folder on a disk that may be written to",
    errno.EEXIST: "choose another path, or remove what is there",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EISDIR: "choose another path, or remove the folder",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "choose another path: this is a circle of links",
    errno.EIO: "check the disk",
}
"""What to do about errors of the system, by number."""
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


def counted(number: int, word: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number} {word}{'s' * (number != 1)}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with examples and whose errors are one sentence."""

    def __init__(self, *, examples: str = "", **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._examples = "".join(f"    {line}\n" for line in examples.strip().splitlines())

    def format_help(self) -> str:
        """The help, examples first."""
        return f"{self._examples}\n{super().format_help()}" if self._examples else super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it; a NUL, which no path can have, ends the process with a sentence."""
        for word in sys.argv[1:] if args is None else args:
            if "\0" in word:
                self.error(f"the argument {word!r} holds a NUL character")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process with a sentence; for an unknown word it names the nearest known one."""
        if choice := _CHOICE.search(message):
            known = [word.strip(" '") for word in choice[2].split(",")]
            near = difflib.get_close_matches(choice[1], known, 1, NEAR)
            remedy = f"; did you mean {near[0]}?" if near else f", but {', '.join(known)}"
            message = f"{message[: choice.start()]}there is no {choice[1]!r}{remedy}"
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(MISTAKE)


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    facts: Mapping[str, Any]
    """For machines: JSON values, paths and NumPy scalars."""
    text: str
    """The same for people."""
    code: int = 0
    """Exit code."""


def carry_out(
    command: Callable[[], Answer | int | None],
    *,
    as_json: bool,
    mistakes: tuple[type[Exception], ...],
    warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> int:
    """Runs a command, prints its answer and returns the exit code.

    An error that the user can fix becomes one sentence, with `as_json` also {"error": ...} on the standard
    output; other errors keep their traceback. Ctrl-C ends with 130 and no traceback.

    Args:
        command: Returns its answer or, if it has printed that itself, an exit code or None for 0.
        mistakes: Errors that the user can fix, besides a full memory.
        warn: Shows a line of a warning.
    """
    warnings.showwarning = lambda message, *_, **__: warn(f"warning: {message}")
    try:
        answer = _answer(command, as_json, mistakes)
        if not isinstance(answer, Answer):
            return answer or 0
        if as_json:
            print(json.dumps(_finite(answer.facts), default=_plain, allow_nan=False), flush=True)
        elif answer.text:
            print(answer.text, flush=True)
        return answer.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        _silence()
        return 0
    except OSError as error:  # of the standard output, as a file on a full disk
        _silence()
        print(f"error: the answer cannot be printed ({error.strerror})", file=sys.stderr)
        return MISTAKE


def _silence() -> None:
    """What is still to be printed goes nowhere, and fails no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(
    command: Callable[[], Answer | int | None], as_json: bool, mistakes: tuple[type[Exception], ...]
) -> Answer | int | None:
    try:
        # With JSON, its one line is all that stands on the standard output.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            return command()
    except BrokenPipeError:
        raise
    except Exception as error:
        if memory := full_memory(error):
            message = (
                f"the {memory} is full; lower the batch size (--batch-size, optim.batch), the size of views "
                "or the threads (run.threads), or end what else runs on it"
            )
        elif isinstance(error, mistakes):
            message = _of_system(error) if isinstance(error, OSError) and error.errno else str(error)
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    return Answer({"error": message}, "", MISTAKE)


def _of_system(error: OSError) -> str:
    """A sentence of an error of the system: the file, what is wrong, the remedy."""
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{place}{error.strerror}{f'; {remedy}' if remedy else ''}"


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value.item()  # else a NumPy scalar
