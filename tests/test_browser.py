"""A page as a browser shows it, wide and narrow: all of it is there, can be read, and fits."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pages import small_config
from runs import scenes_in

from dali_views.tools.cli import main
from trainers.config import file as config_file
from trainers.pretrain import pretrain
from trainers.report import page as run_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]
WIDTHS = (1280, 390)

# Windows have a least width, frames do not: each is as wide as a screen, and lays its page out for that.
FRAME = '<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{page}"></iframe>'
MEASURE = """
<script>addEventListener("load", () => {
const size = element => element.getBoundingClientRect();
const edges = (element, around) => [[element, around].map(size)].flatMap(([one, all]) =>
  [one.left - all.left, one.top - all.top, all.right - one.right, all.bottom - one.bottom]);
const found = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const all = query => [...page.querySelectorAll(query)];
  const visible = all("body, body *").filter(each => each.checkVisibility()
    && [...each.childNodes].some(node => node.nodeType == 3 && node.data.trim()));
  return {
    width: root.clientWidth, scroll: root.scrollWidth,
    broken: [...page.images].filter(each => !each.complete || !each.naturalWidth).length,
    images: [...page.images].map(each => [size(each).width, size(each).height]),
    curves: all(".chart > svg").map(each =>
      [size(each).width, size(each).height, each.querySelectorAll("path").length]),
    texts: all(".chart > svg text").map(each => edges(each, each.closest("svg"))),
    boxes: all(".picture rect").map(each => edges(each, each.closest(".picture").firstElementChild)),
    // Letters of a drawing are as large as the drawing makes them.
    letters: visible.map(each => parseFloat(getComputedStyle(each).fontSize) * (each.closest("svg")
      ? size(each.closest("svg")).width / each.closest("svg").viewBox.baseVal.width : 1)),
  };
});
document.body.innerHTML = '<pre id="found"></pre>';
document.getElementById("found").textContent = JSON.stringify(found);
})</script>
"""


def measured(file: Path, folder: Path) -> list[dict]:
    """What the browser makes of a page at each width. Checks what holds for every page."""
    page = html.escape(file.read_text(encoding="utf-8"))
    frames = "".join(FRAME.format(width=width, page=page) for width in WIDTHS)
    copy = folder / "measured.html"
    copy.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{MEASURE}", encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--hide-scrollbars",
               "--virtual-time-budget=10000"]  # fmt: skip
    command = [str(BROWSER), *options, copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    result = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stdout[-500:] + done.stderr[-500:]
    found: list[dict] = json.loads(html.unescape(result[1]))
    assert [page["width"] for page in found] == list(WIDTHS)
    for page in found:
        assert page["scroll"] <= page["width"]
        assert page["broken"] == 0
        assert np.min(page["images"]) >= 20
        assert len(page["letters"]) > 10
        assert min(page["letters"]) >= 11
        assert np.min(page["boxes"]) > -3  # they lie on their pictures
    return found


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return scenes_in(tmp_path_factory.mktemp("scenes"))


@pytest.mark.filterwarnings("ignore:half of the boxes")
def test_the_report_of_a_run_is_whole_and_fits_wide_and_narrow_screens(scenes, tmp_path):
    out = tmp_path / ("a-rather-long-name-of-a-run-without-a-single-space-in-it" * 2)
    changes = {"run": {"evaluate_every": 3, "out": str(out)}, "optim": {"lr": 1e-3, "batch": 16}}
    pretrain(config_file.load(small_config(tmp_path, scenes, **changes)))
    bad = [f"/data/{'deep/' * 30}image-{number}.jpg\tcut off\n" for number in range(3)]
    (out / "quarantine.txt").write_text("".join(bad))
    found = measured(run_page.write(out), tmp_path)
    for page in found:
        assert len(page["images"]) == 12 + 2 * 6 + 1
        assert len(page["curves"]) >= 9
        assert (np.min(page["curves"], axis=0) >= (300, 120, 3)).all()  # width, height, paths
        assert np.min(page["texts"]) >= 0  # no letters beyond the edge of their drawing
    assert found[0]["curves"][0][0] != found[1]["curves"][0][0]  # laid out anew, not scaled


def test_the_page_of_show_is_whole_and_fits(scenes, tmp_path):
    words = ["show", scenes["path"], "--coco", scenes["instances"], "--recipe", "dino", "--count", "3"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "page.html")]) == 0
    found = measured(tmp_path / "page.html", tmp_path)
    assert [len(page["images"]) for page in found] == [3 * (1 + 10)] * 2
