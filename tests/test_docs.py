"""The documentation's site is complete, leads nowhere astray and needs no network."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from filelock import FileLock
from pydantic import BaseModel

import dali_views
from dali_views import RegionTable, recipes
from dali_views.tools import cli as loader
from trainers import cli as trainer
from trainers import config as cfg

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ["recipes", "saliency", "coordinates", "bad_list", "packing", "check"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built once for all processes of the tests."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    with FileLock(shared / "site.lock"):
        if not (shared / "site").exists():
            command = [sys.executable, "-W", "ignore", SITE / "build.py", shared / "site"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=shared)
            assert done.returncode == 0, done.stderr[-3000:]
    return shared / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Found]:
    return {page: Found(page) for page in site.rglob("*.html")}


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """What makes the pages of public names."""
    monkeypatch.syspath_prepend(SITE)
    yield importlib.import_module("python_names")
    for name in ("python_names", "page"):
        sys.modules.pop(name, None)


def public() -> Iterator[tuple[str, object]]:
    for name in dali_views.__all__:
        yield f"dali_views.{name}", getattr(dali_views, name)
    for name in MODULES:
        module = importlib.import_module(f"dali_views.{name}")
        for function, value in inspect.getmembers(module, inspect.isfunction):
            if f"{value.__module__}.".startswith(f"{module.__name__}.") and not function.startswith("_"):
                yield f"dali_views.{name}.{function}", value


def test_every_public_name_has_a_page_with_its_docstring(pages, site):
    names = dict(public())
    assert len(names) > 30
    for name, value in names.items():
        text = pages[site / "reference" / f"{name}.html"].text
        told = re.split(r"\n(?:Args|Attributes|Returns|Raises):", inspect.getdoc(value) or "")[0]
        assert bare(told) in text, name
        members = inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else []
        for member, function in members:
            if not member.startswith("_") and function.__module__.startswith("dali_views"):
                assert bare((function.__doc__ or "").split("\n\n")[0]) in text, f"{name}.{member}"


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for child in model.__subclasses__():
        yield from sections(child)


def test_every_key_of_the_configuration_is_told_with_its_docstring(pages, site):
    told = "".join(pages[page].text for page in site.glob("reference/configuration.*.html"))
    kinds = [kind for kind in sections(cfg.Section) if kind is not cfg.Config]
    keys = [field for kind in kinds for field in kind.model_fields.values()]
    assert len(keys) > 100
    for field in keys:
        assert bare(field.description or "") in told
    for name, field in cfg.Config.model_fields.items():
        assert bare(field.description or "") in pages[site / "reference" / f"configuration.{name}.html"].text


@pytest.mark.parametrize(
    ("program", "main", "command"),
    [("dali-views", loader.main, "pack"), ("dali-views", loader.main, "doctor"),
     ("dali-trainers", trainer.main, "compare")],
)  # fmt: skip
def test_the_commands_are_told_by_their_own_help(program, main, command, pages, site, capsys):
    assert main([command, "--help"]) == 0
    assert bare(capsys.readouterr().out) in pages[site / "reference" / f"{program}.html"].text


def test_no_link_leads_nowhere(pages, site):
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{page.relative_to(site)}: {link}"


def test_nothing_is_loaded_from_elsewhere(pages, site):
    for page, found in pages.items():
        for source in found.loaded:
            parts = urlsplit(source)
            assert not parts.scheme or parts.scheme == "data", f"{page.relative_to(site)}: {source}"
            assert not parts.netloc
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_every_page_can_be_reached_from_the_first(pages, site):
    start = site / "index.html"
    reached, waiting = {start}, [start]
    for page in waiting:
        for link in pages[page].links:
            target = (page.parent / unquote(urlsplit(link).path)).resolve()
            if target in pages and target not in reached:
                reached.add(target)
                waiting.append(target)
    aside = {site / "search.html", site / "_modules" / "index.html"}
    assert set(pages) - reached == aside


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_pages_fit_a_phone(site, tmp_path):
    names = ["index", "docs/results", "reference/dali_views.SampleIndex", "reference/dali-views",
             "reference/configuration.guide", "configs/README"]  # fmt: skip
    frame = '<iframe style="width:390px;height:900px" src="{}.html"></iframe>'
    frames = "".join(frame.format((site / name).as_uri()) for name in names)
    script = (
        "<script>onload = () => document.title = [...document.querySelectorAll('iframe')].map(each =>"
        "each.contentDocument.documentElement.scrollWidth).join()</script>"
    )
    (tmp_path / "frames.html").write_text(f"<title></title>{frames}{script}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    widths = re.findall(r"<title>([\d,]+)</title>", done.stdout)
    assert widths, done.stderr[-2000:]
    assert [int(width) <= 390 for width in widths[0].split(",")] == [True] * len(names), widths


def test_a_link_to_nowhere_fails_the_build(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "index.md").write_text("# Start\n\n[there](nowhere.md)\n")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", SITE, "in", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr


@pytest.mark.parametrize(("thing", "name"), [(recipes.simclr, "recipes.simclr"), (RegionTable.sync, "sync")])
def test_a_missing_docstring_fails_the_build(thing, name, builder, monkeypatch):
    monkeypatch.setattr(thing, "__doc__", None)
    with pytest.raises(ValueError, match=f"{name} has no docstring"):
        list(builder.pages())


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_code_in_pages_is_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(code, page.name, "exec")


def test_citation_and_changelog_are_of_this_version():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    cited = {reference["doi"].rpartition("arXiv.")[2] for reference in citation["references"]}
    named = set(re.findall(r"arXiv (\d+\.\d+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= cited
