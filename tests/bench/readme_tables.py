"""Write the README's tables of speed from the committed files, so that no figure stands there by hand.

python tests/bench/readme_tables.py            # writes README.md
python tests/bench/readme_tables.py --check    # fails if that would change anything

A table stands between `<!-- table: FILE.csv -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dali_views.bench import read_csv

ROOT = Path(__file__).resolve().parents[2]
_TABLE = re.compile(r"(<!-- table: (\S+\.csv) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """The text with every marked table made anew."""
    return _TABLE.sub(lambda found: found[1] + _table(ROOT / found[2]) + found[3], text)


def _table(path: Path) -> str:
    lines = read_csv(path)
    if lines[0]["part"] == "loaders":
        return _loaders(lines)
    return _figures(lines)


def _loaders(lines: list[dict[str, str]]) -> str:
    rows = ["| loader | images/s | views/s | x torchvision | of decoding alone |", "|---|---|---|---|---|"]
    for kind in ("peer", "ours", "limit"):
        chosen = [line for line in lines if line["kind"] == kind]
        for line in chosen if kind == "ours" else sorted(chosen, key=lambda line: float(line["value"])):
            images, views = float(line["value"]), int(line["views"])
            name = f"**{line['name']}**" if kind == "ours" else line["name"]
            cells = [name, f"{images:.0f}", f"{images * views:.0f}" if views else ""]
            cells += [f"{float(line['ratio']):.2f}", f"{float(line['of_limit']):.2f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _figures(lines: list[dict[str, str]]) -> str:
    rows = ["| | | |", "|---|---|---|"]
    for line in lines:
        value = float(line["value"])
        share = line["measure"] == "of time"
        rows.append(f"| {line['name']} | {f'{value:.1%}' if share else f'{value:g}'} | {line['measure']} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """Write README.md, or with `--check` tell whether it is as it should be."""
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = rendered(before)
    if arguments == ["--check"]:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
