"""Images in a bucket: the batches of the folder they came from, and what its failures cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import two_classes
from s3 import PAGE, Bucket
from tars import pack_folder, write_shard
from test_loader import VIEWS, digest

from dali_views import BadImageError, SampleIndex, SourceGoneError, ViewLoader, bad_list
from dali_views.tools import cli
from trainers.config import Data
from trainers.data import open_data

pytestmark = pytest.mark.filterwarnings("ignore:Left out while running")
COUNT = 16
HALF = COUNT // 2
CHANGED = "cannot be read (it has changed since it was indexed; index the images again)"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight images each."""
    return two_classes(tmp_path_factory.mktemp("classes"), HALF)


@pytest.fixture(scope="module")
def local(classes: Path) -> SampleIndex:
    return SampleIndex.from_folder(classes, cache=False, progress=False)


@pytest.fixture(scope="module")
def names(local: SampleIndex) -> list[str]:
    return [str(Path(local.path(row)).relative_to(local.root)) for row in range(len(local))]


@pytest.fixture
def train(bucket: Bucket, classes: Path) -> str:
    """Their URL in the bucket."""
    return bucket.put_folder(classes, "train")


def from_folder(url: str, **options: Any) -> SampleIndex:
    return SampleIndex.from_folder(url, progress=False, **options)


def loader_of(index: SampleIndex) -> ViewLoader:
    return ViewLoader(index, VIEWS, 2, device="cpu", seed=3, max_bad_share=0.2)


def epoch(index: SampleIndex) -> list[str]:
    return [digest(batch) for batch in loader_of(index)]


def asked(bucket: Bucket) -> list[str]:
    """The objects that were read since this was asked last."""
    keys = [path for method, path, *_ in bucket.proxy.log if method == "GET" and "?" not in path]
    bucket.proxy.log.clear()
    return [path.removeprefix(f"/{bucket.name}/") for path in keys]


def same(index: SampleIndex, local: SampleIndex) -> None:
    """The same images, in the same order, with the same labels."""
    assert np.array_equal(index.sizes, local.sizes)
    assert (index.labels.tolist(), index.classes) == (local.labels.tolist(), local.classes)
    assert [index.encoded(i) for i in range(len(index))] == [local.encoded(i) for i in range(len(local))]


def test_a_bucket_is_the_data_set_of_its_folder_also_when_saved(train, local, tmp_path):
    index = from_folder(train)
    same(index, local)
    assert (index.fingerprint, epoch(index)) == (local.fingerprint, epoch(local))
    index.save(tmp_path / "index")
    part = SampleIndex.load(tmp_path / "index").subset([10, 3, 7]).subset([2, 0])
    assert [part.encoded(0), part.encoded(1)] == [local.encoded(7), local.encoded(10)]


def test_a_folder_in_a_bucket_is_listed_by_the_rules_of_a_local_one(bucket, train, classes, local):
    picture = next((classes / "ant").iterdir()).read_bytes()
    for name in (".hidden/x.jpg", "ant/.cache/x.jpg", "beside.jpg"):
        bucket.put(f"train/{name}", picture)
    bucket.put("trainer/ant/x.jpg", picture)
    for name, content in (
        ("bee/broken.jpg", picture[:300]),
        ("bee/empty.jpg", b""),
        ("ant/notes.txt", b"text"),
    ):
        bucket.put(f"train/{name}", content)
    index = from_folder(f"{train}/")
    same(index, local)
    left_out = {path: told.split(" ")[0] for path, told in index.left_out}
    assert left_out == {"beside.jpg": "lies", "bee/broken.jpg": "truncated", "bee/empty.jpg": "empty"}
    bees = from_folder(Path(train), classes=["bee"])
    assert (bees.classes, len(bees)) == (["bee"], HALF)
    with pytest.raises(ValueError, match="holds no image"):
        from_folder(bucket.url("nothing"))
    with pytest.raises(SourceGoneError, match="There is no bucket s3://no-such-bucket"):
        from_folder("s3://no-such-bucket/train")


@pytest.mark.parametrize("where", ["list and root there", "list here, root there", "URLs in a list here"])
def test_lists_name_objects(bucket, train, local, names, tmp_path, where):
    start = f"{train}/" if where.startswith("URLs") else ""
    lines = [f"{start}{name}\t{Path(name).parent}" for name in names]
    lines += [f"{start}ant/absent.jpg", f"{train}/ant/absent.png" if start else "s3://elsewhere/x.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(["# images", "", *lines]))
    bucket.put("train/list.txt", (tmp_path / "list.txt").read_bytes())
    file = f"{train}/list.txt" if where.startswith("list and") else tmp_path / "list.txt"
    index = SampleIndex.from_list(file, train if where.startswith("list here") else None, progress=False)
    same(index, local)
    elsewhere = {"s3://elsewhere/x.jpg": f"not below the root {train}"}
    told = {"ant/absent.png": "no such object"} if start else elsewhere
    assert dict(index.left_out) == {"ant/absent.jpg": "no such object", **told}


def test_lists_that_are_absent_or_name_several_buckets_are_refused(bucket, tmp_path):
    (tmp_path / "list.txt").write_text("s3://one/x.jpg\ns3://two/x.jpg\n")
    with pytest.raises(ValueError, match="several buckets"):
        SampleIndex.from_list(tmp_path / "list.txt", progress=False)
    with pytest.raises(FileNotFoundError, match=r"list .*absent.txt.* does not exist"):
        SampleIndex.from_list(bucket.url("absent.txt"), progress=False)


def test_coco_s_images_and_instances_may_lie_in_a_bucket(bucket, train, local, names, tmp_path):
    images = [{"id": i, "file_name": name, "height": 40, "width": 40} for i, name in enumerate(names)]
    marks = [{"image_id": row, "category_id": 5, "bbox": [1, 2, 10, 9]} for row in range(0, COUNT, 2)]
    told = json.dumps({"images": images, "annotations": marks, "categories": [{"id": 5, "name": "beetle"}]})
    (tmp_path / "instances.json").write_text(told)
    bucket.put("instances.json", told.encode())
    expected = SampleIndex.from_coco(local.root, tmp_path / "instances.json", cache=False, progress=False)
    for instances in (tmp_path / "instances.json", bucket.url("instances.json")):
        index = SampleIndex.from_coco(train, instances, progress=False)
        same(index, expected)
        assert (index.boxes == expected.boxes).all()


def test_shards_in_a_bucket_are_those_of_a_folder(bucket, classes, tmp_path):
    pack_folder(classes, tmp_path / "shards", 3)
    local = SampleIndex.from_shards(tmp_path / "shards" / "*.tar", cache=False, progress=False)
    names = [f"part-{number:03d}.tar" for number in range(3)]
    for name in names:
        bucket.put(f"shards/{name}", (tmp_path / "shards" / name).read_bytes(), ACL="public-read")
    bucket.put("shards/list.txt", "\n".join(names).encode())
    (tmp_path / "list.txt").write_text("\n".join(bucket.url(f"shards/{name}") for name in names))
    for pattern in (
        bucket.url("shards/part-{000..002}.tar"),
        Path(bucket.url("shards/part-*.tar")),
        tmp_path / "list.txt",
        bucket.url("shards/list.txt"),
        f"{bucket.proxy.url}/{bucket.name}/shards/part-{{000..002}}.tar",
    ):
        index = SampleIndex.from_shards(pattern, cache=tmp_path / "cache", progress=False)
        same(index, local)
        index.save(tmp_path / "index")
        assert SampleIndex.load(tmp_path / "index").encoded(7) == local.encoded(7)
        asked(bucket)
        assert len(SampleIndex.from_shards(pattern, cache=tmp_path / "cache", progress=False)) == COUNT
        assert not [key for key in asked(bucket) if key.endswith(".tar")]


def test_shards_that_are_absent_damaged_or_have_changed_cost_their_images(bucket, classes, tmp_path):
    pack_folder(classes, tmp_path, 3)
    whole = [(tmp_path / f"part-{number:03d}.tar").read_bytes() for number in range(3)]
    bucket.put("0.tar", whole[0])
    bucket.put("1.tar", whole[1][:10_000])
    index = SampleIndex.from_shards(bucket.url("{0..2}.tar"), progress=False)
    told = dict(index.left_out)
    assert (told["2.tar"], told["1.tar"].split(" ")[0]) == ("no such file", "damaged")
    assert 6 < len(index) < 12  # of six and six
    bucket.put("0.tar", whole[2])
    loader = ViewLoader(index, VIEWS, 2, device="cpu", max_bad_share=1.0)
    assert {row for batch in loader for row in batch.index.tolist()} == set(range(6, len(index)))
    assert set(index.quarantine.values()) == {CHANGED}
    again = SampleIndex.from_shards(bucket.url("{0..2}.tar"), progress=False)
    assert len(again) == len(index) - 6 + 4
    assert again.encoded(0) == (classes / "bee" / "0004.jpg").read_bytes()
    with pytest.raises(ValueError, match="in one bucket"):
        SampleIndex.from_shards([bucket.url("0.tar"), tmp_path / "part-000.tar"], progress=False)


def test_only_what_has_changed_is_looked_at_again(bucket, train, classes):
    first = from_folder(train)
    assert len(set(asked(bucket))) == COUNT
    assert from_folder(train).sizes.tolist() == first.sizes.tolist()
    assert asked(bucket) == []
    picture = (classes / "bee" / "0000.jpg").read_bytes()
    bucket.put("train/ant/0003.jpg", picture)
    bucket.put("train/cat/new.jpg", picture)
    bucket.delete("train/bee/0001.jpg")
    index = from_folder(train)
    assert set(asked(bucket)) == {"train/ant/0003.jpg", "train/cat/new.jpg"}
    assert (index.classes, len(index)) == (["ant", "bee", "cat"], COUNT)
    assert index.encoded(3) == picture


def test_many_objects_of_a_list_are_looked_up_by_listing(bucket, train, names, tmp_path, monkeypatch):
    monkeypatch.setattr("dali_views.data.remote._SINGLY", 5)
    (tmp_path / "list.txt").write_text("\n".join([*names, "ant/absent.jpg"]))
    bucket.proxy.log.clear()
    index = SampleIndex.from_list(tmp_path / "list.txt", train, progress=False)
    assert [row[0] for row in bucket.proxy.log].count("HEAD") == 0
    assert (len(index), dict(index.left_out)) == (COUNT, {"ant/absent.jpg": "no such object"})
    assert COUNT > PAGE  # of more than one page


def test_an_object_that_is_gone_or_another_costs_that_image(bucket, train, classes):
    index = from_folder(train)
    bucket.delete("train/ant/0005.jpg")
    bucket.put("train/bee/0003.jpg", (classes / "ant" / "0001.jpg").read_bytes())
    rows = [row for batch in loader_of(index) for row in batch.index.tolist()]
    assert (len(rows), set(rows)) == (COUNT, set(range(COUNT)) - {5, HALF + 3})
    assert index.quarantine == {f"{train}/ant/0005.jpg": "no such file", f"{train}/bee/0003.jpg": CHANGED}


def test_a_bucket_that_denies_ends_scan_and_run_at_once(train, monkeypatch):
    index = from_folder(train)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    denied = r"may not be read .403 Forbidden.*check its name, the credentials"
    with pytest.raises(SourceGoneError, match=denied):
        from_folder(train, cache=False)
    with pytest.raises(BadImageError, match=denied):
        epoch(index)
    assert not index.quarantine


def test_a_server_that_dies_ends_the_run_which_is_resumed_when_it_is_back(bucket, train, local, monkeypatch):
    monkeypatch.setenv("DALI_VIEWS_RETRY_SECONDS", "2")
    index, expected = from_folder(train), epoch(local)
    loader = loader_of(index)
    batches = iter(loader)
    seen = [digest(next(batches))]
    bucket.proxy.stop()
    with pytest.raises(BadImageError, match=r"did not answer for 2 s .*restore it"):
        seen.extend(map(digest, batches))
    assert seen == expected[: len(seen)]
    assert len(seen) < len(expected)
    assert not index.quarantine
    bucket.proxy.start()
    resumed = loader_of(index)
    resumed.load_state_dict(loader.state_dict())
    assert [digest(batch) for batch in resumed] == expected[len(seen) :]


def test_a_web_server_s_urls_are_written_with_escapes_and_mean_what_they_stand_for(bucket, classes, tmp_path):
    pictures = [file.read_bytes() for file in sorted((classes / "ant").iterdir())[:2]]
    shard = write_shard(tmp_path / "x.tar", [("0.jpg", pictures[0]), ("1.jpg", pictures[1])])
    for key, content in (("a b.jpg", pictures[0]), ("50%.jpg", pictures[1]), ("a b.tar", shard.read_bytes())):
        bucket.put(key, content, ACL="public-read")
    server = f"{bucket.proxy.url}/{bucket.name}"
    (tmp_path / "list.txt").write_text(f"{server}/a%20b.jpg\n{server}/50%25.jpg\n")
    for _ in range(2):  # the second time from the scan that is kept
        listed = SampleIndex.from_list(tmp_path / "list.txt", progress=False)
        shards = SampleIndex.from_shards(f"{server}/a%20b.tar", progress=False)
        for index in (listed, shards):
            assert [index.encoded(row) for row in range(len(index))] == pictures


def test_a_cache_spares_the_bucket_until_an_object_changes(bucket, train, classes, local, tmp_path):
    index = from_folder(train).cached(tmp_path / "kept", 1)
    asked(bucket)
    assert epoch(index) == epoch(index.subset(range(COUNT))) == epoch(local)
    assert len(asked(bucket)) == COUNT
    bucket.proxy.stop()
    assert epoch(index) == epoch(local)
    bucket.proxy.start()
    picture = (classes / "ant" / "0004.jpg").read_bytes()
    bucket.put("train/ant/0003.jpg", picture)
    assert from_folder(train).cached(tmp_path / "kept", 1).encoded(3) == picture
    with pytest.raises(TypeError, match="local already"):
        local.cached(tmp_path / "kept", 1)


def test_bad_lists_and_the_command_line_take_urls(bucket, train, tmp_path, capsys):
    bad_list.save(tmp_path / "bad.txt", {f"{train}/ant/0000.jpg": "ugly", "ant/0001.jpg": "ugly"})
    assert len(from_folder(train).without(tmp_path / "bad.txt")) == COUNT - 2
    for where, told in (
        (train, f"{COUNT} images in 2 classes ({train})"),
        ("s3://no-such-bucket/train", "error: There is no bucket s3://no-such-bucket"),
        (bucket.url("{0..9}.parquet"), "error: Tables are read from local files alone"),
    ):
        assert cli.main(["index", where]) == (2 if told.startswith("error") else 0)
        assert told in "".join(capsys.readouterr())


def test_a_run_s_data_may_lie_in_a_bucket(bucket, train, classes, local, tmp_path):
    kept = str(tmp_path / "kept")
    data = Data(kind="folder", path=train, eval_val=str(classes), cache_dir=kept, cache_gb=1)
    sets = open_data(data, kept=tmp_path / "index.npz")
    for _ in range(2):
        same(sets.train, local)
    asked(bucket)
    same(open_data(data, kept=tmp_path / "index.npz").train, local)
    assert asked(bucket) == []
