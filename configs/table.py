"""The tables of configs/README.md, made of the files' first lines and values: python configs/table.py"""

from __future__ import annotations

import re
from pathlib import Path

from trainers.config.file import load

CONFIGS = Path(__file__).resolve().parent
README = CONFIGS / "README.md"
_MARKS = ("<!-- made by configs/table.py -->\n", "<!-- end -->\n")


def rows(file: Path) -> list[tuple[str, str, str, str]]:
    """A row for each line "# Aims at" of a run: its files, what it is, the published figure, ours."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# Aims at "):
            aim, _, ours = line.removeprefix("# Aims at ").partition("; ours: ")
            parts = re.findall(r"(?:data|guide)/\w+\.yaml", aim)
            for part in parts:
                aim = aim.replace(f" {part}", "")
            names = [str(file.relative_to(CONFIGS)), *parts]
            config = load([CONFIGS / name for name in names])
            what = f"{config.method.name}, {config.run.epochs} epochs, batch {config.optim.batch}"
            found.append((" ".join(f"`{name}`" for name in names), what, aim.replace(" with (", " ("), ours))
    return found


def tables() -> str:
    """Runs by folder, then what each part is, from its first comment."""
    runs = [file for file in sorted(CONFIGS.rglob("*.yaml")) if file.parent.name not in ("data", "guide")]
    text = "| run | what it is | aims at | ours |\n|---|---|---|---|\n"
    text += "".join(f"| {' | '.join(row)} |\n" for file in runs for row in rows(file))
    text += "\n| part | what it is |\n|---|---|\n"
    for file in sorted([*CONFIGS.glob("data/*.yaml"), *CONFIGS.glob("guide/*.yaml")]):
        first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        text += f"| `{file.relative_to(CONFIGS)}` | {first} |\n"
    return text


def readme() -> str:
    """The text of README.md with its tables made anew."""
    before, rest = README.read_text(encoding="utf-8").split(_MARKS[0])
    return before + _MARKS[0] + tables() + _MARKS[1] + rest.split(_MARKS[1])[1]


if __name__ == "__main__":
    README.write_text(readme(), encoding="utf-8")
