"""`dali-views show` as a page: whatever the set, the table and the recipe, it stands alone and is true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from conftest import noise_images
from pages import Page
from PIL import Image

from dali_views import RegionTable, SampleIndex, ViewLoader, recipes
from dali_views.tools import show
from dali_views.tools.cli import main
from dali_views.tools.page import render
from dali_views.tools.sample import drawings
from dali_views.tools.scenes import make_scenes

HOSTILE = '"><img src=x onerror=alert(1)>&amp;\u202egnp'


def shown(where: object, out: Path, *options: object) -> Page:
    """The page that the command makes."""
    words = ["show", where, "--out", out, "--device", "cpu", "--size", 32, *options]
    assert main([str(word) for word in words]) == 0
    return Page(out)


def boxes_on(page: Page, style: str) -> np.ndarray:
    """(N, 4) the boxes of a style, as y0, x0, y1, x1."""
    found = page.tags("rect", **{"class": style})
    boxes = np.array([[float(each[key]) for key in ("y", "x", "height", "width")] for each in found])
    return boxes + np.pad(boxes[:, :2], ((0, 0), (2, 0)))


def test_every_sample_has_its_image_and_its_views(tmp_path, capsys):
    found = shown(noise_images(tmp_path / "photos", 10), tmp_path / "page.html", "--count", 4)
    assert len(found.tags("article")) == 4
    assert len(found.pictures()) == 4 * (1 + 2)
    assert re.findall(r"\d{4}\.jpg", found.text) == ["0000.jpg", "0003.jpg", "0006.jpg", "0009.jpg"]
    assert found.has("no box yet")
    assert main(["show", str(tmp_path / "photos"), "--partner"]) == 2
    assert "--partner needs the --regions" in capsys.readouterr().err
    shown(tmp_path / "photos", tmp_path / "page.html", "--crop", "contrastive")
    assert "without --regions there are no boxes, so contrastive crops are random" in capsys.readouterr().err


def test_multi_crop_shows_all_views_and_a_model_its_heatmap(tmp_path):
    photos = noise_images(tmp_path / "photos", 3)
    options = ("--recipe", "dino", "--model", "resnet18", "--count", 2)
    found = shown(photos, tmp_path / "deep" / "page.html", *options)
    assert len(found.pictures()) == 2 * (1 + 1 + 10)
    assert found.text.count("heatmap and boxes") == 2
    assert {"view 0 (32 px)", "view 1 (32 px)", "view 9 (96 px)"} <= set(found.words)
    found = shown(photos, tmp_path / "few.html", "--recipe", "dino", "--locals", 1, "--local-size", 24)
    legend = [word for word in found.words if word.endswith(" px)")]
    assert legend == ["view 0 (32 px)", "view 1 (32 px)", "view 2 (24 px)"]


def test_the_caption_of_a_view_says_how_it_is_turned(tmp_path):
    photos = noise_images(tmp_path / "photos", 3)
    options = ("--vflip", 1, "--rotate90", 0, "--count", 3)
    found = shown(photos, tmp_path / "page.html", *options)
    captions = [word for word in found.words if word.startswith("view 0, ") or word.startswith("view 1, ")]
    assert len(captions) == 6
    assert {word[8:] for word in captions} == {"flipped, rotated 180", "rotated 180"}


def test_the_region_drawn_from_stands_out_and_true_boxes_and_partner_are_there(tmp_path):
    images, instances = make_scenes(tmp_path / "scenes", 8, size=48)
    index = SampleIndex.from_coco(images, instances, progress=False)
    regions = RegionTable(len(index), 3, index.fingerprint)
    boxes = np.array([[0, 0, 0.3, 0.3], [0.2, 0.3, 0.8, 0.9], [0.5, 0.5, 1, 1]], np.float32)
    partner = (np.arange(8) + 3) % 8
    regions.update(np.arange(8), np.tile(boxes, (8, 1, 1)), np.tile([0.0, 0.7, 0.0], (8, 1)), partner)
    regions.save(tmp_path / "regions")
    options = ("--coco", instances, "--regions", tmp_path / "regions", "--crop", "inside", "--count", 3)
    found = shown(images, tmp_path / "page.html", "--partner", *options)
    assert len(found.pictures()) == 3 * (1 + 1 + 2)
    assert found.text.count("weight 0.7,") == 3
    np.testing.assert_allclose(boxes_on(found, "dashed"), np.tile(boxes[1], (3, 1)), atol=1e-4)
    assert len(boxes_on(found, "faint")) == 3 * (2 + 3)  # the others of the image, and all of its partner
    # linspace takes rows 0, 3 and 7.
    assert len(boxes_on(found, "thin")) == sum(len(index.truth(row)) for row in (0, 3, 7)) > 0
    names = [Path(index.path(int(partner[row]))).name for row in (0, 3, 7)]
    assert re.findall(r"partner (\d+\.jpg)", found.text) == names

    found = shown(images, tmp_path / "page.html", *options, "--partner", "add")
    assert len(found.pictures()) == 3 * (1 + 1 + 3)
    words = ["show", str(images), *map(str, options), "--partner", "--out", str(tmp_path / "views.png")]
    assert main(words) == 0
    assert Image.open(tmp_path / "views.png").width > 4 * 200  # a picture has the partner, too


def test_each_view_is_outlined_on_the_image_it_was_cut_from_here_an_array(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    index = SampleIndex.from_arrays(pixels, [0, 1, 0, 1], ["ant", "bee"])
    loader = ViewLoader(index, recipes.moco_v2(32), 4, device="cpu", shuffle=False)
    batch, template = next(iter(loader)), Path(show.__file__).with_suffix(".html")
    samples = drawings(index, batch, loader.views, RegionTable(len(index)))
    (tmp_path / "page.html").write_text(render(template, title="views", samples=samples))
    found = Page(tmp_path / "page.html")
    np.testing.assert_allclose(boxes_on(found, "strong").reshape(4, 2, 4), batch.crops, atol=2e-4)
    assert len({each["stroke"] for each in found.tags("rect", **{"class": "strong"})}) == 2
    assert {picture.size for picture in found.pictures()} == {(32, 32)}
    assert found.text.count("class bee") == 2


def test_names_of_files_and_classes_are_text_and_nothing_else(tmp_path):
    folder = tmp_path / "photos" / "<b>bold"
    noise_images(folder, 2)
    (folder / "0000.jpg").rename(folder / f"{HOSTILE}.jpg")
    (folder / "0001.jpg").rename(folder / "broken\udcff.jpg")
    found = shown(tmp_path / "photos", tmp_path / "page.html")
    assert len(found.tags("img")) == 2 * 3
    assert not found.tags("b")
    assert found.has('"><img src=x onerror=alert(1)>&amp;\ufffdgnp.jpg', "broken\ufffd.jpg", "class <b>bold")
    assert main(["show", str(tmp_path / "photos"), "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0


def test_a_page_of_24_large_images_is_below_3_mb_however_hard_they_compress(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for number in range(24):
        pixels = draw.integers(0, 256, (500, 700, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{number}.jpg", quality=80)
    found = shown(tmp_path / "noise", tmp_path / "page.html", "--count", 24, "--size", 224)
    assert len(found.pictures()) == 24 * 3
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
