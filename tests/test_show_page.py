"""`dali-views show` as a page: whatever the set, the table and the recipe, it stands alone and is true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from conftest import noise_images
from pages import Page
from PIL import Image
from tars import pack_folder

from dali_views import RegionTable, SampleIndex, ViewLoader, recipes
from dali_views.tools import show
from dali_views.tools.cli import main
from dali_views.tools.page import jpeg, render
from dali_views.tools.sample import drawings
from dali_views.tools.scenes import make_scenes

TEMPLATE = Path(show.__file__).with_suffix(".html")
HOSTILE = '"><img src=x onerror=alert(1)>&amp;\u202egnp'


def shown(where: object, out: Path, *options: object) -> Page:
    """The page that the command makes."""
    words = ["show", where, "--out", out, "--device", "cpu", "--size", 32, *options]
    assert main([str(word) for word in words]) == 0
    found = Page(out)
    found.check_alone()
    return found


def test_every_sample_has_its_image_and_its_views(tmp_path):
    photos = noise_images(tmp_path / "photos", 10)
    found = shown(photos, tmp_path / "page.html", "--count", 4)
    assert len(found.tags("article")) == 4
    assert len(found.pictures()) == 4 * (1 + 2)
    assert [name for name in found.words if re.fullmatch(r"\d{4}\.jpg", name)] == [
        "0000.jpg", "0003.jpg", "0006.jpg", "0009.jpg",
    ]  # fmt: skip
    assert "no box yet" in found.text


def test_multi_crop_shows_all_views_and_a_model_its_heatmap(tmp_path):
    photos = noise_images(tmp_path / "photos", 3)
    options = ("--recipe", "dino", "--model", "resnet18", "--count", 2)
    found = shown(photos, tmp_path / "deep" / "page.html", *options)
    assert len(found.pictures()) == 2 * (1 + 1 + 10)
    assert found.text.count("heatmap and boxes") == 2
    assert {f"view {number} ({size} px)" for number, size in ((0, 32), (1, 32), (9, 96))} <= set(found.words)
    found = shown(photos, tmp_path / "few.html", "--recipe", "dino", "--locals", 1, "--local-size", 24)
    assert {word for word in found.words if word.endswith(" px)")} == {
        "view 0 (32 px)", "view 1 (32 px)", "view 2 (24 px)",
    }  # fmt: skip


def test_the_region_drawn_from_stands_out_and_true_boxes_and_partner_are_there(tmp_path):
    images, instances = make_scenes(tmp_path / "scenes", 8, size=48)
    index = SampleIndex.from_coco(images, instances, progress=False)
    regions = RegionTable(len(index), 3, index.fingerprint)
    boxes = np.array([[0, 0, 0.3, 0.3], [0.2, 0.3, 0.8, 0.9], [0.5, 0.5, 1, 1]], np.float32)
    partner = (np.arange(8) + 3) % 8
    regions.update(np.arange(8), np.tile(boxes, (8, 1, 1)), np.tile([0.0, 0.7, 0.0], (8, 1)), partner)
    regions.save(tmp_path / "regions")
    options = ("--coco", instances, "--regions", tmp_path / "regions", "--crop", "inside", "--partner")
    found = shown(images, tmp_path / "page.html", *options, "--count", 3)
    assert len(found.pictures()) == 3 * (1 + 1 + 2)
    assert found.text.count("weight 0.7,") == 3

    rectangles = found.tags("rect")
    dashed = [each for each in rectangles if each["class"] == "dashed"]
    assert len(dashed) == 3
    assert all((each["x"], each["y"], each["width"]) == ("0.3000", "0.2000", "0.6000") for each in dashed)
    faint = [each for each in rectangles if each["class"] == "faint"]
    assert len(faint) == 3 * (2 + 3)  # the others of the image, and all of its partner
    true = [each for each in rectangles if each["class"] == "thin"]
    assert len(true) == sum(len(index.truth(row)) for row in (0, 3, 7)) > 0
    # linspace takes rows 0, 3 and 7, whose partners are these.
    names = [Path(index.path(int(partner[row]))).name for row in (0, 3, 7)]
    assert re.findall(r"partner (\d+\.jpg)", found.text) == names


def test_each_view_is_outlined_on_the_image_it_was_cut_from(tmp_path):
    images, instances = make_scenes(tmp_path / "scenes", 4, size=48)
    index = SampleIndex.from_coco(images, instances, progress=False)
    loader = ViewLoader(index, recipes.moco_v2(32), 4, device="cpu", shuffle=False)
    batch = next(iter(loader))
    samples = drawings(index, batch, loader.views, RegionTable(4))
    (tmp_path / "page.html").write_text(render(TEMPLATE, title="views", samples=samples))
    crops = [each for each in Page(tmp_path / "page.html").tags("rect") if each["class"] == "strong"]
    drawn = np.array([[float(each[key]) for key in ("y", "x", "height", "width")] for each in crops])
    drawn[:, 2:] += drawn[:, :2]
    np.testing.assert_allclose(drawn.reshape(4, 2, 4), batch.crops.numpy(), atol=2e-4)
    assert len({each["stroke"] for each in crops}) == 2


def test_lists_shards_and_arrays_have_pages_too(tmp_path):
    photos = noise_images(tmp_path / "photos", 6)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{file}\n" for file in sorted(photos.iterdir())))
    for where in (listed, pack_folder(photos, tmp_path / "shards", 2).replace("{000..001}", "000")):
        found = shown(where, tmp_path / "page.html", "--count", 2)
        assert len(found.pictures()) == 6
    index = SampleIndex.from_arrays(
        np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8),
        [0, 1, 0, 1, 1],
        ["ant", "bee"],
    )
    loader = ViewLoader(index, recipes.simclr(32), 5, device="cpu", shuffle=False)
    samples = drawings(index, next(iter(loader)), loader.views, RegionTable(5))
    (tmp_path / "page.html").write_text(render(TEMPLATE, title="arrays", samples=samples))
    found = Page(tmp_path / "page.html")
    found.check_alone()
    assert {picture.size for picture in found.pictures()} == {(32, 32)}
    assert found.text.count("class bee") == 3


def test_names_of_files_and_classes_are_text_and_nothing_else(tmp_path):
    folder = tmp_path / "photos" / "<b>bold"
    noise_images(folder, 2)
    (folder / "0000.jpg").rename(folder / f"{HOSTILE}.jpg")
    (folder / "0001.jpg").rename(folder / "broken\udcff.jpg")
    found = shown(tmp_path / "photos", tmp_path / "page.html")
    assert len(found.tags("img")) == 2 * 3
    assert not found.tags("b")
    assert '"><img src=x onerror=alert(1)>&amp;\ufffdgnp.jpg' in found.text
    assert "broken\ufffd.jpg" in found.text
    assert "class <b>bold" in found.text


def test_a_page_of_24_large_images_is_below_3_mb_however_hard_they_compress(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for number in range(24):
        pixels = draw.integers(0, 256, (500, 700, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{number}.jpg", quality=80)
    out = tmp_path / "page.html"
    found = shown(tmp_path / "noise", out, "--count", 24, "--size", 224)
    assert len(found.pictures()) == 24 * 3
    assert out.stat().st_size < 3_000_000
    noise = Image.fromarray(draw.integers(0, 256, (900, 900, 3), dtype=np.uint8))
    assert len(jpeg(noise, 900, 900)) < 900 * 4 / 3 + 40


def test_partners_need_a_table(tmp_path, capsys):
    photos = noise_images(tmp_path / "photos", 3)
    assert main(["show", str(photos), "--device", "cpu", "--partner"]) == 2
    assert "--partner needs the --regions" in capsys.readouterr().err
