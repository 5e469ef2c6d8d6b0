"""What the command lines say of themselves."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from unittest import mock

from page import Page

from dali_views.tools import cli as loader
from trainers import cli as trainer

Main = Callable[[Sequence[str]], int]

PROGRAMS: dict[str, Main] = {"dali-views": loader.main, "dali-trainers": trainer.main}
_COMMAND = re.compile(r"^    (\w+) ", re.MULTILINE)


def pages() -> Iterator[Page]:
    """A page for each program, with the help of each of its commands."""
    for program, main in PROGRAMS.items():
        told = _help(main, [])
        text = f"# {program}\n\n{_block(told)}"
        for command in _COMMAND.findall(told.split("COMMAND\n", 1)[1]):
            text += f"\n## {command}\n\n{_block(_help(main, [command]))}"
        yield Page(f"reference/{program}.md", text, top=True)


def _help(main: Main, words: Sequence[str]) -> str:
    told = io.StringIO()
    with redirect_stdout(told), mock.patch.dict(os.environ, {"COLUMNS": "88", "NO_COLOR": "1"}):
        code = main([*words, "--help"])
    if code:
        raise ValueError(f"{' '.join(words)} --help ends with exit code {code}")
    return told.getvalue()


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"
