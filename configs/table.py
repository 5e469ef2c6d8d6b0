"""The tables of configs/README.md, made of the files' first lines and values: python configs/table.py"""

from __future__ import annotations

import re
from pathlib import Path

from trainers.config.file import load

CONFIGS = Path(__file__).resolve().parent
README = CONFIGS / "README.md"
MARKS = ("<!-- made by configs/table.py -->\n", "<!-- end -->\n")


def rows(file: Path) -> list[tuple[str, str, str, str]]:
    """A row for each line "# Aims at" of a run: its files, what it is, the published figure, ours."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# Aims at "):
            aim, _, ours = line.removeprefix("# Aims at ").partition("; ours: ")
            parts = re.findall(r"(?:data|guide)/\w+\.yaml", aim)
            names = [str(file.relative_to(CONFIGS)), *parts]
            config = load([CONFIGS / name for name in names])
            what = f"{config.method.name}, {config.run.epochs} epochs, batch {config.optim.batch}"
            aim = re.sub(r" with (?:data|guide)/[^(]*", " ", aim)
            found.append((" ".join(f"`{name}`" for name in names), what, aim, ours))
    return found


def tables() -> str:
    """The runs, then the parts with their first comments."""
    kinds = ("data", "detect", "guide", "transfer")
    parts = sorted(file for kind in kinds for file in CONFIGS.glob(f"{kind}/*.yaml"))
    text = "| run | what it is | aims at | ours |\n|---|---|---|---|\n"
    for file in sorted(set(CONFIGS.rglob("*.yaml")) - set(parts)):
        text += "".join(f"| {' | '.join(row)} |\n" for row in rows(file))
    text += "\n| part | what it is |\n|---|---|\n"
    for file in parts:
        comment = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        text += f"| `{file.relative_to(CONFIGS)}` | {comment} |\n"
    return text


def readme() -> str:
    """The text of README.md with its tables made anew."""
    before, _, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    return before + MARKS[0] + tables() + MARKS[1] + rest.partition(MARKS[1])[2]


if __name__ == "__main__":
    README.write_text(readme(), encoding="utf-8")
