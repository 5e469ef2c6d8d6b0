"""The documentation's site is complete, leads nowhere astray and needs no network."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from runs import ROOT, once

import dali_views
from dali_views.tools import cli as loader_cli
from trainers import cli as trainer_cli
from trainers import config as cfg

for package in ("sphinx", "furo", "myst_parser", "sphinxcontrib.autoprogram"):
    pytest.importorskip(package)
pytest.importorskip("sphinxcontrib.autodoc_pydantic")

WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BUILD = [sys.executable, "-W", "ignore", "-m", "sphinx", "-W", "--keep-going", "-q", "-E"]


class Found(HTMLParser):
    """Anchors, links and what is loaded of a page, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.words: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" or "src" in given:
            self.loaded.add(given.get("src") or given["href"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return bare("".join(self.words))


def bare(text: str) -> str:
    """The letters and figures of a text: neither marks of code nor line breaks."""
    return "".join(re.findall(r"\w", text))


def build(folder: Path) -> None:
    command = [*BUILD, "-d", folder / "doctrees", "-c", "docs/site", ".", folder / "site"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "documentation", build) / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Found]:
    return {page: Found(page) for page in site.rglob("*.html")}


def public() -> Iterator[tuple[str, object]]:
    """The names that the reference lists, with what they stand for."""
    for line in (ROOT / "docs/reference/python.rst").read_text().split(":toctree: generated")[1].split():
        module = importlib.import_module(line)
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        for name in names:
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("dali_views") and inspect.isroutine(
                value
            ) | inspect.isclass(value):
                yield f"{line}.{name}", value


NAMES = dict(public())


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_and_member_has_a_docstring(name):
    assert inspect.getdoc(NAMES[name])
    members = inspect.getmembers(NAMES[name], inspect.isfunction) if inspect.isclass(NAMES[name]) else []
    own = [one for member, one in members if not member.startswith("_") and "dali_views" in one.__module__]
    assert [member.__qualname__ for member in own if not member.__doc__] == []


@pytest.mark.slow
def test_every_public_name_has_a_page_with_its_docstring(pages, site):
    assert len(NAMES) > 30
    whole = [name for name in dali_views.__all__ if not inspect.ismodule(getattr(dali_views, name))]
    assert {f"dali_views.{name}" for name in whole} <= set(NAMES)
    for name, value in NAMES.items():
        page = site / "docs/reference/generated" / f"{name}.html"
        if value.__module__ != name.rpartition(".")[0] and not page.exists():
            continue  # imported by a module without __all__
        docstring = str(inspect.getdoc(value))
        told = re.split(r"\n(?:Args|Arguments.*|Attributes|Returns|Raises|Yields):", docstring)
        assert bare(told[0]) in pages[page].text, name


@pytest.mark.slow
def test_every_key_of_the_configuration_is_told_with_its_docstring(pages, site):
    told = "".join(pages[page].text for page in site.glob("docs/reference/generated/trainers.config.*.html"))
    kinds = [cfg.Section]
    for kind in kinds:
        kinds += kind.__subclasses__()
    keys = [field for kind in kinds for field in kind.model_fields.values()]
    assert len(keys) > 100
    for field in keys:
        assert field.description or typing.get_origin(field.annotation) is typing.Literal
        assert bare(field.description or "") in told


@pytest.mark.slow
def test_no_link_leads_nowhere(pages, site):
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            code = page.is_relative_to(site / "_modules")  # Sphinx keeps one name per module there
            if parts.fragment and target in pages and not code:
                assert unquote(parts.fragment) in pages[target].anchors, f"{page.relative_to(site)}: {link}"


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(pages, site):
    for page, found in pages.items():
        for source in found.loaded:
            parts = urlsplit(source)
            assert not parts.scheme or parts.scheme == "data", f"{page.relative_to(site)}: {source}"
            assert not parts.netloc
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_code_in_pages_is_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(code, page.name, "exec")


def test_commands_have_one_form_in_pages_comments_and_help(capsys):
    texts = [*WRITTEN, *ROOT.glob("configs/**/*.*"), *ROOT.glob("docs/reference/*.rst")]
    said = "".join(file.read_text(encoding="utf-8") for file in texts)
    assert not re.search(r"dali-trainers|-m dali_views|venv/bin/(?!activate)", said)
    for main, program in ((loader_cli.main, "dali-views"), (trainer_cli.main, "python -m trainers")):
        assert main(["--help"]) == 0
        assert f"usage: {program} " in capsys.readouterr().out


def test_citation_and_changelog_are_of_this_version():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    cited = {reference["doi"].rpartition("arXiv.")[2] for reference in citation["references"]}
    named = set(re.findall(r"arXiv (\d+\.\d+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= cited
