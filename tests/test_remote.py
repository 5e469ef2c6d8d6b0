"""Objects of a store: listed, read in parts, and what its failures cost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from s3 import PAGE, REGION, Bucket
from tars import write_shard

from dali_views import SourceGoneError
from dali_views.data.remote import Bucket as Objects
from dali_views.data.remote import Part, as_url, bucket_of, is_remote
from dali_views.data.remote_file import RemoteFile

BODY = bytes(range(256)) * 300
PASSING = ["503", "500", "429", "408", "reset", "cut", "silent", "stall"]


def opened(bucket: Bucket, key: str = "") -> Objects:
    return bucket_of(bucket.url(key))[0]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (Path("s3://bucket/a/b"), "s3://bucket/a/b"),
        ("gs://bucket/", "gs://bucket"),
        ("https://host:80/a%20b.jpg", "https://host:80/a%20b.jpg"),
    ],
)
def test_urls_are_known_also_after_pathlib(given, url):
    assert is_remote(given)
    assert as_url(given) == url


@pytest.mark.parametrize("path", ["/s3://x", "s3", "s3:", "s3://", "./s3/x", "file:///x", "c:/x"])
def test_paths_are_no_urls(path):
    assert not is_remote(path)


def test_all_pages_of_a_listing_are_in_order_and_relative(bucket):
    names = sorted(f"{i % 3}/{i}.bin" for i in range(PAGE + 20))
    for name in names:
        bucket.put(f"set/{name}", name.encode())
    bucket.put("setting/other.bin", b"")
    found = opened(bucket).entries("set")
    assert [(one.name, one.size) for one in found] == [(name, len(name)) for name in names]
    assert len({one.version for one in found}) == len(names)
    assert found == opened(bucket).entries("/set/")
    assert opened(bucket).entries("nothing") == []


def test_a_glob_keeps_to_its_folder(bucket):
    for key in ("a/x-0.tar", "a/x-1.tar", "a/x-1.txt", "a/b/x-2.tar", "x-3.tar", "b/x-4.tar"):
        bucket.put(key, b"x")
    globbed = [[one.name for one in opened(bucket).glob(p)] for p in ("a/x-?.tar", "*/x-*.tar", "x*")]
    assert globbed == [["a/x-0.tar", "a/x-1.tar"], ["a/x-0.tar", "a/x-1.tar", "b/x-4.tar"], ["x-3.tar"]]


def test_names_of_any_characters_are_read(bucket):
    names = ["a b", "a%20b", "ü#?+&=", "~x!'()*", "日本", "a\\b", "[x]{y}", "%2F", "|^`<>"]
    for name in names:
        bucket.put(f"odd/{name}", name.encode())
    found = [one.name for one in opened(bucket).entries("odd")]
    assert found == sorted(names)
    assert [opened(bucket).read(f"odd/{name}").decode() for name in found] == found


def test_a_name_that_cannot_be_asked_for_is_named(bucket):
    bucket.put("odd/a//b.jpg", b"x")
    with pytest.raises(ValueError, match=r"odd/a//b.jpg.*rename"):
        opened(bucket).entries("odd")
    with pytest.raises(OSError, match="no name that can be asked for"):
        opened(bucket).read("odd/a//b.jpg")


def test_parts_are_those_of_the_object(bucket):
    bucket.put("x.bin", BODY)
    bucket.put("empty", b"")
    objects = opened(bucket)
    version = objects.stat("x.bin").version
    parts = [Part("x.bin", 5, 1000), Part("x.bin"), Part("x.bin", 70_000), Part("x.bin", 9, 0), Part("empty")]
    assert objects.read_parts(parts) == [BODY[5:1005], BODY, BODY[70_000:], b"", b""]
    assert objects.read("x.bin", len(BODY) - 3, 10, version) == BODY[-3:]
    with pytest.raises(OSError, match="shorter than it was"):
        objects.read("x.bin", len(BODY), 10)


def test_an_object_that_has_changed_is_not_read(bucket):
    bucket.put("x.bin", BODY)
    (listed,) = opened(bucket).entries()
    assert opened(bucket).read("x.bin", 0, 9, listed.version) == BODY[:9]
    bucket.put("x.bin", BODY[::-1])
    with pytest.raises(OSError, match="has changed since it was indexed"):
        opened(bucket).read("x.bin", 0, 9, listed.version)


def test_what_is_not_there_and_what_is_denied_are_told_apart(bucket, monkeypatch):
    bucket.put("x.bin", BODY)
    with pytest.raises(FileNotFoundError):
        opened(bucket).read("y.bin")
    with pytest.raises(FileNotFoundError):
        opened(bucket).stat("y.bin")
    nowhere = bucket_of("s3://no-such-bucket/x")[0]
    for ask in (lambda: nowhere.read("x"), lambda: nowhere.stat("x"), nowhere.entries):
        with pytest.raises(SourceGoneError, match="There is no bucket s3://no-such-bucket; check"):
            ask()
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(SourceGoneError, match=f"{bucket.url()} may not be read .403 Forbidden.*credentials"):
        opened(bucket).read("x.bin")
    bucket.put("x.bin", BODY, ACL="public-read")
    assert opened(bucket).read("x.bin") == BODY


@pytest.mark.parametrize(
    ("status", "told"), [("401", "credentials"), ("301", "AWS_REGION"), ("400", "refuses the request")]
)
def test_what_no_patience_mends_ends_at_once(bucket, status, told):
    bucket.proxy.always = status
    for ask in (lambda: opened(bucket).read("x"), opened(bucket).entries):
        bucket.proxy.log.clear()
        with pytest.raises(SourceGoneError, match=told):
            ask()
        assert len(bucket.proxy.log) == 1


@pytest.mark.parametrize("fault", PASSING)
def test_a_failure_that_passes_costs_nothing(bucket, fault, monkeypatch):
    if fault in ("silent", "stall"):
        monkeypatch.setenv("DALI_VIEWS_RETRY_SECONDS", "2")  # of which a silence takes a quarter
    bucket.put("x.bin", BODY)
    objects = opened(bucket)
    for ask, answer in (
        (lambda: objects.read("x.bin"), BODY),
        (lambda: objects.read("x.bin", 10, 70_000), BODY[10:70_010]),
        (lambda: [one.name for one in objects.entries()], ["x.bin"]),
    ):
        bucket.proxy.faults = [fault]
        assert ask() == answer
        assert not bucket.proxy.faults


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_listing_goes_on_where_it_failed(bucket, fault):
    for i in range(3 * PAGE):
        bucket.put(f"{i:03d}", b"x")
    bucket.proxy.faults = ["", fault, "", fault]
    assert [one.name for one in opened(bucket).entries()] == [f"{i:03d}" for i in range(3 * PAGE)]


@pytest.mark.parametrize(
    ("fault", "told"),
    [("503", "503 Service Unavailable"), ("silent", "no answer in time"), ("refused", "no connection")],
)
def test_a_store_without_an_answer_is_given_up_and_taken_up_again(bucket, fault, told, monkeypatch):
    monkeypatch.setenv("DALI_VIEWS_RETRY_SECONDS", "2")
    bucket.put("x.bin", BODY)
    objects = opened(bucket)
    assert objects.read("x.bin") == BODY
    if fault == "refused":
        bucket.proxy.stop()
    else:
        bucket.proxy.always = fault
    with pytest.raises(SourceGoneError, match=f"{bucket.url()} did not answer for 2 s .{told}"):
        objects.read_parts([Part("x.bin")] * 20)
    bucket.proxy.log.clear()
    with pytest.raises(SourceGoneError):
        objects.read("x.bin")
    assert len(bucket.proxy.log) <= 4  # obstore's own tries: nobody waits a second time
    if fault == "refused":
        bucket.proxy.start()
    bucket.proxy.always = ""
    assert objects.read("x.bin") == BODY
    bucket.proxy.faults = ["503"] * 9
    assert objects.read("x.bin") == BODY  # the patience is back


def test_a_file_over_an_object_is_read_by_tarfile_and_pillow(bucket, tmp_path):
    picture = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(picture, "PNG")
    members = [(f"{i}.png", picture.getvalue()) for i in range(20)]
    shard = write_shard(tmp_path / "x.tar", members)
    bucket.put("x.tar", shard.read_bytes())
    bucket.put("x.png", picture.getvalue())
    bucket.proxy.log.clear()
    with RemoteFile(bucket.url("x.tar"), block=1 << 20) as file, tarfile.open(fileobj=file) as tar:
        found = [(one.name, tar.extractfile(one).read()) for one in tar.getmembers()]  # type: ignore[union-attr]
    assert found == members
    assert len(bucket.proxy.log) <= 2 + shard.stat().st_size / (1 << 20)
    with Image.open(RemoteFile(bucket.url("x.png"), block=4096)) as image:
        assert (image.size, image.tobytes()) == ((300, 200), Image.open(picture).tobytes())
    file = RemoteFile(bucket.url("x.png"), block=64)
    assert (file.seek(-8, os.SEEK_END), file.read(99)) == (len(picture.getvalue()) - 8, members[0][1][-8:])
    file.seek(3)
    assert file.read(1000) == members[0][1][3:1003]
    bucket.put("x.png", b"x" * 100_000)
    with pytest.raises(OSError, match="has changed"):
        file.read()


def test_credentials_of_a_profile_are_used(bucket, tmp_path, monkeypatch):
    bucket.put("x.bin", BODY)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    profiles = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(SourceGoneError, match=r"No credentials for s3://.*AWS_SKIP_SIGNATURE"):
        opened(bucket)
    profiles.write_text("[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert opened(bucket).read("x.bin") == BODY
    assert f"Credential=LABKEY/{bucket.proxy.log[-1][3].split('/')[1]}/{REGION}" in bucket.proxy.log[-1][3]


def test_google_s_store_and_a_web_server_are_read_alike(bucket, monkeypatch):
    # What obstore asks of Google's bucket is what moto's server answers, too.
    bucket.put("set/x.bin", BODY, ACL="public-read")
    monkeypatch.setenv("GOOGLE_BASE_URL", bucket.proxy.url)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    objects, key = bucket_of(f"gs://{bucket.name}/set/x.bin")
    (listed,) = objects.entries("set")
    assert (key, listed.name, listed.size) == ("set/x.bin", "x.bin", len(BODY))
    assert objects.read(key, 3, 9, listed.version) == BODY[3:12]
    with pytest.raises(SourceGoneError, match="There is no bucket gs://no-such-bucket"):
        bucket_of("gs://no-such-bucket")[0].entries()
    server, key = bucket_of(f"{bucket.proxy.url}/{bucket.name}/set%2Fx.bin")
    assert server.read(key, 3, 9, listed.version) == BODY[3:12]
    with pytest.raises(SourceGoneError, match="cannot be listed"):
        server.entries(bucket.name)


def test_a_forked_process_is_told_so_and_does_not_wait_for_ever(bucket):
    bucket.put("x.bin", BODY)
    code = (
        "import os, sys; from dali_views.data.remote import bucket_of\n"
        "bucket, key = bucket_of(sys.argv[1])\n"
        "bucket.read(key)\n"
        "if os.fork() == 0:\n"
        "    try: bucket_of(sys.argv[1])[0].read(key)\n"
        "    except OSError as error: print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait(); print(len(bucket.read(key)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, bucket.url("x.bin")], capture_output=True, text=True, timeout=30
    )
    child, parent = told.stdout.splitlines()
    assert child.startswith(f"{bucket.url()} cannot be read, for this process was forked")
    assert parent == str(len(BODY))


def test_without_obstore_it_is_said_what_to_install(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another bucket")
    with pytest.raises(ValueError, match="pip install obstore"):
        opened(bucket)


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan"])
def test_a_patience_that_is_no_number_is_refused(bucket, monkeypatch, seconds):
    monkeypatch.setenv("DALI_VIEWS_RETRY_SECONDS", seconds)
    with pytest.raises(ValueError, match="DALI_VIEWS_RETRY_SECONDS is a number of seconds"):
        opened(bucket)
