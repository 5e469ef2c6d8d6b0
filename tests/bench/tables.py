"""Write the tables of speed in the documents from the committed files: no figure stands there by hand.

python tests/bench/tables.py            # writes the pages below
python tests/bench/tables.py --check    # fails if that would change anything

A table stands between `<!-- table: FILE.csv -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dali_views.tools.bench.contest import read_csv

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/speed.md", "docs/sources.md")
_TABLE = re.compile(r"(<!-- table: (\S+\.csv) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """The text with every marked table made anew."""
    return _TABLE.sub(lambda found: found[1] + table(ROOT / found[2]) + found[3], text)


def table(path: Path) -> str:
    """A file of figures as a table, by the columns it has."""
    lines = read_csv(path)
    if "operator" in lines[0]:
        return _markdown(
            ["operator", "ms of one core"], [[line["operator"], line["core_ms_per_view"]] for line in lines]
        )
    if "trial" in lines[0]:
        return _markdown(
            ["instead", "ratio"], [[line["trial"], f"{float(line['ratio']):.2f}"] for line in lines]
        )
    if "mapped_mb" in lines[0]:
        heads = [
            "images",
            "index, MB",
            "s to load it",
            "s to the first batch",
            "ms per batch of 256",
            "own MB",
        ]
        names = ["rows", "file_mb", "s_to_load", "s_to_first_batch", "ms_per_batch", "own_mb"]
        return _markdown(heads, [[_number(line[name]) for name in names] for line in lines])
    if "ms_to_snapshot" in lines[0]:
        heads = [
            "table",
            "ranks",
            "images",
            "ms to freeze",
            "ms per 256 rows",
            "s to sync",
            "own MB",
            "share, MB",
        ]
        names = [
            "rows",
            "ms_to_snapshot",
            "ms_per_256_rows",
            "s_to_sync",
            "written_private_mb",
            "written_pss_mb",
        ]
        return _markdown(
            heads,
            [[line["table"], line["ranks"], *(_number(line[n]) for n in names)] for line in lines],
        )
    if lines[0]["part"] == "loaders":
        return _loaders(lines)
    if lines[0]["part"] == "sources":
        return _markdown(
            ["images from", "images/s", "x folder"],
            [[line["name"], f"{float(line['value']):.0f}", f"{float(line['ratio']):.2f}"] for line in lines],
        )
    return _markdown(["", "", ""], [[line["name"], *_figure(line)] for line in lines])


def _loaders(lines: Sequence[dict[str, str]]) -> str:
    """Peers and limits from slow to fast, ours in their own order."""
    rows, rest = [], []
    for kind in ("peer", "ours", "limit"):
        chosen = [line for line in lines if line["kind"] == kind]
        for line in chosen if kind == "ours" else sorted(chosen, key=lambda line: float(line["value"])):
            if line["measure"] != "images/s":
                rest.append([line["name"], "".join(_figure(line)[:1]), "", "", ""])
                continue
            images, views = float(line["value"]), int(line["views"])
            rows.append(
                [
                    f"**{line['name']}**" if kind == "ours" else line["name"],
                    f"{images:.0f}",
                    f"{images * views:.0f}" if views else "",
                    f"{float(line['ratio']):.2f}",
                    f"{float(line['of_limit']):.2f}",
                ]
            )
    return _markdown(["loader", "images/s", "views/s", "x torchvision", "of decoding alone"], rows + rest)


def _figure(line: dict[str, str]) -> list[str]:
    value = float(line["value"])
    return (
        [f"{value:.2%}", "of the time"] if line["measure"] == "of time" else [f"{value:g}", line["measure"]]
    )


def _number(text: str) -> str:
    """Three figures of a small number, all of a large one's before the point."""
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` tell whether they are as they should be."""
    stale = 0
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = rendered(before)
        if before == after:
            continue
        stale = 1
        if "--check" not in arguments:
            (ROOT / page).write_text(after, encoding="utf-8")
    return stale if "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
