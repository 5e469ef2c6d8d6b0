"""Write the tables of speed in the documents from the committed files: no figure is typed by hand.

python tests/bench/tables.py            # writes the pages below
python tests/bench/tables.py --check    # fails if that would change anything

A table stands between `<!-- table: FILE.csv -->` and `<!-- end -->`.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/speed.md", "docs/sources.md")
_TABLE = re.compile(r"(<!-- table: (\S+\.csv) -->\n).*?(<!-- end -->)", re.DOTALL)
# A column that only such files have: the columns to show, each with its heading and its number of digits
# (after the point; -1: three figures of a small number, all before the point of a large one; None: as it is).
_COLUMNS: dict[str, dict[str, tuple[str, int | None]]] = {
    "operator": {"operator": ("operator", None), "core_ms_per_view": ("ms of one core", None)},
    "trial": {"trial": ("instead", None), "ratio": ("ratio", 2)},
    "mapped_mb": {
        "rows": ("images", -1), "file_mb": ("index, MB", -1), "s_to_load": ("s to load it", -1),
        "s_to_first_batch": ("s to the first batch", -1), "ms_per_batch": ("ms per batch of 256", -1),
        "own_mb": ("own MB", -1),
    },
    "ms_to_snapshot": {
        "table": ("table", None), "ranks": ("ranks", None), "rows": ("images", -1),
        "ms_to_snapshot": ("ms to freeze", -1), "ms_per_256_rows": ("ms per 256 rows", -1),
        "s_to_sync": ("s to sync", -1), "written_private_mb": ("own MB", -1),
        "written_pss_mb": ("share, MB", -1),
    },
}  # fmt: skip
_SOURCES = {"name": ("images from", None), "value": ("images/s", 0), "ratio": ("x folder", 2)}


def rendered(text: str) -> str:
    """The text with every marked table made anew."""
    return _TABLE.sub(lambda found: found[1] + table(ROOT / found[2]) + found[3], text)


def table(path: Path) -> str:
    """A file of figures as a table, by the columns it has."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    known = [columns for key, columns in _COLUMNS.items() if key in lines[0]]
    if not known and lines[0]["part"] == "loaders":
        return _loaders(lines)
    columns = known[0] if known else _SOURCES
    if not known and lines[0]["part"] != "sources":
        return _markdown(["", "", ""], [[line["name"], *_figure(line)] for line in lines])
    rows = [[_number(line[name], digits) for name, (_, digits) in columns.items()] for line in lines]
    return _markdown([head for head, _ in columns.values()], rows)


def _loaders(lines: Sequence[dict[str, str]]) -> str:
    """Peers and limits from slow to fast, ours in their own order; shares of time last."""
    rows = []
    for kind in ("peer", "ours", "limit"):
        chosen = [line for line in lines if line["kind"] == kind and line["measure"] == "images/s"]
        for line in chosen if kind == "ours" else sorted(chosen, key=lambda line: float(line["value"])):
            name = f"**{line['name']}**" if kind == "ours" else line["name"]
            images, views = float(line["value"]), int(line["views"])
            ratios = [_number(line[key], 2) for key in ("ratio", "of_limit")]
            rows.append([name, f"{images:.0f}", f"{images * views:.0f}" if views else "", *ratios])
    rest = [[line["name"], _figure(line)[0], "", "", ""] for line in lines if line["measure"] != "images/s"]
    return _markdown(["loader", "images/s", "views/s", "x torchvision", "of decoding alone"], rows + rest)


def _figure(line: dict[str, str]) -> list[str]:
    value = float(line["value"])
    of_time = line["measure"] == "of time"
    return [f"{value:.2%}", "of the time"] if of_time else [f"{value:g}", line["measure"]]


def _number(text: str, digits: int | None) -> str:
    if digits is None:
        return text
    value = float(text)
    if digits >= 0:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` tell whether they are as they should be."""
    stale = 0
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = rendered(before)
        if before != after and "--check" in arguments:
            stale = 1
        elif before != after:
            (ROOT / page).write_text(after, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
