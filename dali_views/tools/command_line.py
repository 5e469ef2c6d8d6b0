"""What all commands of the project share: help, mistakes, exit codes, answers for machines."""

from __future__ import annotations

import argparse
import difflib
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

from ..system.machine import is_full

MISTAKE = 2
"""Exit code of a mistake that the user can fix."""

_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with examples and whose errors are one sentence."""

    def __init__(self, *, examples: str = "", **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._examples = "".join(f"    {line}\n" for line in examples.strip().splitlines())

    def format_help(self) -> str:
        """The help, examples first."""
        return f"{self._examples}\n{super().format_help()}" if self._examples else super().format_help()

    def error(self, message: str) -> NoReturn:
        """Ends the process with a sentence; for an unknown word it names the nearest known one."""
        if choice := _CHOICE.search(message):
            known = [word.strip(" '") for word in choice[2].split(",")]
            near = difflib.get_close_matches(choice[1], known, 1)
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
        mistakes: Errors that the user can fix, besides a full memory of the GPU.
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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
        if is_full(error):
            message = (
                "the memory of the GPU is full; lower the batch size (--batch-size, optim.batch) or the size "
                "of views, or end what else runs on it"
            )
        elif isinstance(error, mistakes):
            message = str(error)
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    return Answer({"error": message}, "", MISTAKE)


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value.item()  # else a NumPy scalar
