"""What all commands of the project have in common: help, mistakes, exit codes, answers for machines."""

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
from pathlib import Path
from typing import Any, NoReturn

from ..system import gpu_memory

MISTAKE = 2
"""Exit code of a mistake that the user can mend."""

_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with examples, and whose errors are one sentence.

    Args:
        examples: Lines as one types them.
        options: As for argparse's.
    """

    def __init__(self, *, examples: str = "", **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._examples = examples.strip()

    def format_help(self) -> str:
        """The help, examples first."""
        lines = "".join(f"    {line}\n" for line in self._examples.splitlines())
        return f"{lines}\n{super().format_help()}" if lines else super().format_help()

    def error(self, message: str) -> NoReturn:
        """Ends the process with a sentence, which tells the nearest word that there is."""
        choice = _CHOICE.search(message)
        if choice is not None:
            known = [word.strip(" '") for word in choice[2].split(",")]
            near = difflib.get_close_matches(choice[1], known, 1)
            message = (
                message[: choice.start()]
                + f"there is no {choice[1]!r}"
                + (f"; did you mean {near[0]}?" if near else f", but {', '.join(known)}")
            )
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(MISTAKE)


def carry_out(
    command: Callable[[], Answer | int | None],
    *,
    as_json: bool,
    mistakes: tuple[type[Exception], ...],
    warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> int:
    """Runs a command and tells its answer; the exit code.

    An error that the user can mend becomes one sentence, with `as_json` also {"error": ...} on the standard
    output; of any other the traceback stays. Ctrl-C ends with 130 and no traceback.

    Args:
        command: Returns what is to be told or, where it has told it itself, an exit code or None for 0.
        mistakes: Errors that the user can mend, besides a full memory of the GPU.
        warn: Shows a line of a warning.
    """
    warnings.showwarning = lambda message, *_, **__: warn(f"warning: {message}")
    try:
        # The one line of JSON is all that stands on the standard output then.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            answer = _answer(command, mistakes)
        if not isinstance(answer, Answer):
            return answer or 0
        if as_json:
            print(json.dumps(answer.facts, default=_plain, allow_nan=False), flush=True)
        elif answer.text:
            print(answer.text, flush=True)
        return answer.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the answer has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _answer(
    command: Callable[[], Answer | int | None], mistakes: tuple[type[Exception], ...]
) -> Answer | int | None:
    try:
        return command()
    except BrokenPipeError:
        raise
    except Exception as error:
        told = sentence(error) or (str(error) if isinstance(error, mistakes) else None)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return Answer({"error": told}, "", MISTAKE)


class Answer:
    """What a command has found.

    Attributes:
        facts: For machines, JSON-able but for paths and NumPy's numbers.
        text: The same for people.
        code: Exit code.
    """

    def __init__(self, facts: Mapping[str, Any], text: str, code: int = 0) -> None:
        self.facts = _finite(facts)
        self.text = text
        self.code = code


def sentence(error: Exception) -> str | None:
    """What to tell a user of errors whose own words do not help; None of others."""
    if gpu_memory.is_full(error):
        return (
            "the memory of the GPU is full; lower the batch size (--batch-size, optim.batch) or the size of "
            "views, or end what else runs on it"
        )
    return None


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number of."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return value.item()  # a number of NumPy's
