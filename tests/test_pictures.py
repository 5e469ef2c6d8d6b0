"""Pictures of the pages are what their scripts draw, small, legible, and made for light and dark pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import ROOT

PICTURES = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PICTURE = re.compile(r"<picture>(.*?)</picture>", re.DOTALL)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")


def test_charts_are_drawn_from_the_committed_files(bench: None) -> None:
    import charts
    import svg

    assert svg.stale(charts.drawings(), check=True) == [], "run make tables"


def test_pictures_are_drawn_from_the_recorded_run_and_another_run_changes_them(bench: None) -> None:
    import pictures
    import svg

    assert pictures.main(check=True) == 0, "run python tests/bench/pictures.py"
    record = json.loads(pictures.RECORD.read_text(encoding="utf-8"))
    record["scenes"][0]["scene"] += 1
    assert pictures.differs("hero-light.webp", pictures.hero(svg.LIGHT, record))


@pytest.mark.parametrize("file", sorted(PICTURES.iterdir()), ids=lambda file: file.name)
def test_a_picture_is_small_comes_in_two_themes_and_is_shown(file: Path) -> None:
    assert file.stat().st_size < 150_000
    other = "light" if "-dark" in file.name else "dark"
    twin = file.with_name(re.sub("-(light|dark)", f"-{other}", file.name))
    assert twin.is_file()
    assert twin.read_bytes() != file.read_bytes()
    if file.suffix != ".svg":
        with Image.open(file) as image, Image.open(twin) as second:
            assert image.size == second.size
            assert image.width >= 1200
    shown = [page.name for page in PAGES if f"pictures/{file.name}" in page.read_text(encoding="utf-8")]
    assert shown, "no page shows it"


@pytest.mark.parametrize("file", sorted(PICTURES.glob("*.svg")), ids=lambda file: file.name)
def test_letters_of_a_drawing_can_be_read_on_a_telephone_and_lie_within_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())  # type: ignore[union-attr]
    words = re.findall(
        r'<text x="([\d.-]+)" y="([\d.-]+)" font-size="([\d.]+)"[^>]*"(\w+)"[^>]*>([^<]*)', text
    )
    assert words
    for x, y, size, _, told in words:
        assert float(size) * 390 / width > 10, told
        assert 0 <= float(x) <= width
        assert 0 < float(y) <= height


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_on_a_page_exist_in_both_themes_and_say_what_they_show(page: Path) -> None:
    for picture in _PICTURE.findall(page.read_text(encoding="utf-8")):
        (dark,) = re.findall(r'<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">', picture)
        (light,) = re.findall(r'<img [^>]*src="([^"]+)"', picture)
        (told,) = re.findall(r'<img [^>]*alt="([^"]+)"', picture)
        assert dark == light.replace("-light", "-dark") != light
        assert (page.parent / light).is_file()
        assert (page.parent / dark).is_file()
        assert len(told) > 20


def test_every_page_is_found_from_the_index_of_pages() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {
        (ROOT / "docs" / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", index)
    }
    pages = [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs").glob("*.ipynb"),
        *(ROOT / "docs").glob("*.sbatch"),
    ]
    pages += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md")]
    assert {page for page in pages if page != ROOT / "docs" / "README.md"} <= linked
    assert [target for target in linked if not target.exists()] == []


@pytest.mark.slow
def test_the_tour_runs_and_shows_what_it_stored(
    bench: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import notebook

    file = ROOT / "docs" / "tour.ipynb"
    assert file.stat().st_size < 600_000
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    done = notebook.executed(stored, scope)

    def shape(cells: list[dict[str, Any]]) -> list[list[str]]:
        return [["data" if "data" in each else "text" for each in cell.get("outputs", ())] for cell in cells]

    assert shape(done["cells"]) == shape(stored["cells"])
    assert sum(map(len, shape(stored["cells"]))) >= 8
    assert scope["guided_pairs"] > 0.9 > 0.7 > scope["random_pairs"]
    assert len(scope["losses"]) == 10
    assert not (scope["before"] == scope["after"]).all()
    assert scope["same"].min() < 0.9  # some boxes have moved
