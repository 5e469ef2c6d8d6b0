"""Run the cells of a notebook in this process, in a folder of their own, and store what they print and show.

python tests/bench/notebook.py docs/tour.ipynb      # part of `make pictures`

Needs no Jupyter: a notebook is a JSON file (nbformat 4.5), a cell is Python. Pictures are stored as JPEG.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

Cell = dict[str, Any]


def executed(notebook: dict[str, Any], scope: dict[str, Any]) -> dict[str, Any]:
    """The notebook with new outputs. `scope` holds the names that the cells leave. Errors are raised."""
    cells, number = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            cell = {
                **cell,
                "execution_count": number,
                "outputs": _run("".join(cell["source"]), number, scope),
            }
        cells.append(cell)
    return {**notebook, "cells": cells}


def _run(code: str, number: int, scope: dict[str, Any]) -> list[Cell]:
    tree = ast.parse(code, f"cell {number}")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), scope)
    outputs: list[Cell] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        data: Cell = {"text/plain": _lines(repr(value))}
        if isinstance(value, Image.Image):
            jpeg = io.BytesIO()
            value.save(jpeg, "JPEG", quality=82, optimize=True)
            told = f"<picture, {value.width} x {value.height} pixels>"
            data = {"image/jpeg": base64.b64encode(jpeg.getvalue()).decode(), "text/plain": [told]}
        outputs.append(
            {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
        )
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(file: Path) -> None:
    notebook = json.loads(file.read_text(encoding="utf-8"))
    file, home = file.resolve(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            done = executed(notebook, {"__name__": "__main__"})
        finally:
            os.chdir(home)
    file.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
