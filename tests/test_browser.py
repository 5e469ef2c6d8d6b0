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

from dali_views import RegionTable, SampleIndex
from dali_views.tools.cli import main
from trainers.config import file as config_file
from trainers.pretrain import pretrain
from trainers.report import page as run_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
WIDTHS = (1280, 390)

# Windows have a least width, frames do not: each is as wide as a screen, and lays its page out for that.
FRAME = '<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{page}"></iframe>'
MEASURE = """
<script>
const found = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const size = element => element.getBoundingClientRect();
  const texts = document.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  const letters = [];
  for (let node; (node = texts.nextNode());) {
    const parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility()) continue;
    // Letters of a drawing are as large as the drawing makes them.
    const drawing = parent.closest("svg");
    const scale = drawing ? size(drawing).width / drawing.viewBox.baseVal.width : 1;
    letters.push([parseFloat(getComputedStyle(parent).fontSize) * scale, node.data.trim()]);
  }
  return {
    width: root.clientWidth, scroll: root.scrollWidth,
    broken: [...page.images].filter(each => !each.complete || !each.naturalWidth).length,
    images: [...page.images].map(each => [size(each).width, size(each).height]),
    curves: [...page.querySelectorAll(".chart > svg")].map(each => [size(each).width, size(each).height,
      each.querySelectorAll("path").length]),
    cut: [...page.querySelectorAll(".chart > svg text")].filter(each => {
      const [one, all] = [size(each), size(each.closest("svg"))];
      return one.left < all.left || one.right > all.right || one.top < all.top || one.bottom > all.bottom;
    }).map(each => each.textContent),
    boxes: [...page.querySelectorAll(".picture rect")].map(each => {
      const [one, all] = [size(each), size(each.closest(".picture").firstElementChild)];
      return [one.left - all.left, one.top - all.top, one.right - all.right, one.bottom - all.bottom];
    }),
    least: letters.sort((a, b) => a[0] - b[0])[0], words: letters.length,
  };
});
const result = document.createElement("pre");
result.id = "found";
result.textContent = JSON.stringify(found);
document.body.replaceChildren(result);
</script>
"""


def measured(file: Path, folder: Path) -> list[dict]:
    """What the browser makes of a page at each width; it has nothing to complain of."""
    page = html.escape(file.read_text(encoding="utf-8"))
    frames = "".join(FRAME.format(width=width, page=page) for width in WIDTHS)
    copy = folder / "measured.html"
    # The script runs once both frames have loaded.
    script = MEASURE.replace("<script>", "<script>addEventListener('load', () => {").replace(
        "</script>", "})</script>"
    )
    copy.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{script}", encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--hide-scrollbars",
               "--virtual-time-budget=10000"]  # fmt: skip
    done = subprocess.run(
        [str(BROWSER), *options, copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    result = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stdout[-500:] + done.stderr[-500:]
    found: list[dict] = json.loads(html.unescape(result[1]))
    return found


def check(found: list[dict]) -> None:
    """What holds for every page."""
    assert [page["width"] for page in found] == list(WIDTHS)
    for page in found:
        assert page["scroll"] <= page["width"]
        assert page["broken"] == 0
        assert page["images"]
        assert min(min(size) for size in page["images"]) >= 20
        assert page["words"] > 10
        assert page["least"][0] >= 11, page["least"]
        # Boxes lie on their pictures.
        edges = np.array(page["boxes"])
        assert len(edges)
        assert (edges[:, :2] > -3).all()
        assert (edges[:, 2:] < 3).all()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return scenes_in(tmp_path_factory.mktemp("scenes"))


@pytest.mark.filterwarnings("ignore:half of the boxes")
def test_the_report_of_a_run_is_whole_and_fits_wide_and_narrow_screens(scenes, tmp_path):
    out = tmp_path / ("a-rather-long-name-of-a-run-without-a-single-space-in-it" * 2)
    pretrain(config_file.load(small_config(tmp_path, scenes, run={"evaluate_every": 3, "out": str(out)},
                                           optim={"lr": 1e-3, "batch": 16})))  # fmt: skip
    bad = [f"/data/{'deep/' * 30}image-{number}.jpg\tcut off\n" for number in range(3)]
    (out / "quarantine.txt").write_text("".join(bad))
    found = measured(run_page.write(out), tmp_path)
    check(found)
    for page in found:
        assert len(page["images"]) == 12 + 2 * 6 + 1
        assert len(page["curves"]) >= 9
        for width, height, paths in page["curves"]:
            assert width >= 300
            assert height >= 120
            assert paths >= 3
        assert not page["cut"]  # letters beyond the edge of their drawing
    assert found[0]["curves"][0][0] != found[1]["curves"][0][0]  # laid out anew, not scaled


def test_the_page_of_show_is_whole_and_fits(scenes, tmp_path, monkeypatch):
    index = SampleIndex.from_coco(scenes["path"], scenes["instances"], progress=False)
    regions = RegionTable(len(index), 2, index.fingerprint)
    boxes = np.tile(np.array([[0, 0, 0.6, 0.5], [0.3, 0.4, 1, 1]], np.float32), (len(index), 1, 1))
    regions.update(np.arange(len(index)), boxes, partner=np.roll(np.arange(len(index)), 1))
    regions.save(tmp_path / "regions")
    out = tmp_path / "page.html"
    words = ["show", scenes["path"], "--coco", scenes["instances"], "--regions", tmp_path / "regions",
             "--recipe", "dino", "--crop", "contrastive", "--partner", "--count", 3, "--device", "cpu",
             "--out", out]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    found = measured(out, tmp_path)
    check(found)
    assert [len(page["images"]) for page in found] == [3 * (2 + 10)] * 2
