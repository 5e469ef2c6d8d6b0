"""Objects of a store: listed, read in parts, and what its failures cost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from s3 import PAGE, REGION, Bucket

from dali_views import SourceGoneError
from dali_views.data.remote import Bucket as Objects
from dali_views.data.remote import as_url, bucket_of, is_remote

BODY = bytes(range(256)) * 300
LISTED = [f"{i:03d}" for i in range(2 * PAGE)]


def opened(bucket: Bucket) -> Objects:
    return bucket_of(bucket.url())[0]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (Path("s3://bucket/a/b"), "s3://bucket/a/b"),
        ("gs://bucket/", "gs://bucket"),
        ("https://host:80/a%20b.jpg", "https://host:80/a%20b.jpg"),
        *((path, None) for path in ("/s3://x", "s3", "s3:", "s3://", "./s3/x", "file:///x", "c:/x")),
    ],
)
def test_urls_are_told_from_paths_also_after_pathlib(given, url):
    assert is_remote(given) == (url is not None)
    assert url is None or as_url(given) == url


def test_a_listing_has_all_pages_in_order_and_a_glob_keeps_to_its_folder(bucket):
    names = sorted(f"{i % 3}/{i}.bin" for i in range(PAGE + 20))
    for name in names:
        bucket.put(f"set/{name}", name.encode())
    bucket.put("setting/other.bin", b"")
    objects = opened(bucket)
    found = objects.entries("/set/")
    assert [(one.name, one.size) for one in found] == [(name, len(name)) for name in names]
    assert len({one.version for one in found}) == len(names)
    assert objects.entries("nothing") == []
    for pattern, expected in (("set/1/?.bin", "147"), ("set/*/2.bin", "2"), ("s*/0/9.bin", "9"), ("*", "")):
        assert [Path(one.name).stem for one in objects.glob(pattern)] == list(expected)


def test_names_of_any_characters_are_read_and_impossible_ones_are_named(bucket):
    names = ["a b", "a%20b", "ü#?+&=", "~x!'()*", "日本", "a\\b", "[x]{y}", "%2F", "|^`<>"]
    for name in names:
        bucket.put(f"odd/{name}", name.encode())
    found = [one.name for one in opened(bucket).entries("odd")]
    assert found == sorted(names)
    assert [opened(bucket).read(f"odd/{name}").decode() for name in found] == found
    bucket.put("odd/a//b.jpg", b"x")
    with pytest.raises(ValueError, match=r"odd/a//b.jpg.*rename"):
        opened(bucket).entries("odd")
    with pytest.raises(OSError, match="name cannot be used"):
        opened(bucket).read("odd/a//b.jpg")


def test_parts_are_those_of_the_object_until_it_changes(bucket):
    bucket.put("x.bin", BODY)
    bucket.put("empty", b"")
    objects = opened(bucket)
    (_, listed) = objects.entries()
    version = objects.stat("x.bin").version
    assert version == listed.version
    parts = [
        ("x.bin", 5, 1000, version),
        ("x.bin", 0, None, version),
        ("x.bin", 9, 0, 0),
        ("empty", 0, None, 0),
    ]
    assert objects.read_parts(parts) == [BODY[5:1005], BODY, b"", b""]
    assert objects.read("x.bin", len(BODY) - 3, 10, version) == BODY[-3:]
    with pytest.raises(OSError, match="shorter than it was"):
        objects.read("x.bin", len(BODY), 10)
    bucket.put("x.bin", BODY[::-1])
    with pytest.raises(OSError, match="has changed since it was indexed"):
        objects.read_parts(parts)


def test_what_is_absent_or_denied_ends_at_once_with_its_own_sentence(bucket, monkeypatch):
    bucket.put("x.bin", BODY)
    for ask in (opened(bucket).read, opened(bucket).stat):
        with pytest.raises(FileNotFoundError):
            ask("y.bin")
    nowhere = bucket_of("s3://no-such-bucket/x")[0]
    for ask in (nowhere.read, nowhere.stat, nowhere.entries):
        with pytest.raises(SourceGoneError, match="There is no bucket s3://no-such-bucket; check"):
            ask("x")
    for status in ("301", "400", "401"):
        bucket.proxy.always = status
        for ask in (opened(bucket).read, opened(bucket).entries):
            bucket.proxy.log.clear()
            with pytest.raises(SourceGoneError, match=r"may not be read .*the credentials and AWS_REGION"):
                ask("x")
            assert len(bucket.proxy.log) == 1
    bucket.proxy.always = ""
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(SourceGoneError, match=f"{bucket.url()} may not be read .403 Forbidden.*credentials"):
        opened(bucket).read("x.bin")
    bucket.put("x.bin", BODY, ACL="public-read")
    assert opened(bucket).read("x.bin") == BODY


@pytest.mark.parametrize("fault", ["503", "429", "408", "reset", "cut", "silent", "stall"])
def test_a_failure_that_passes_costs_nothing(bucket, fault, monkeypatch):
    if fault in ("silent", "stall"):
        monkeypatch.setenv("DALI_VIEWS_RETRY_SECONDS", "2")  # of which a silence takes a quarter
    monkeypatch.setattr("dali_views.data.remote._PAGE", PAGE)
    for name in LISTED:
        bucket.put(f"list/{name}", b"x")
    bucket.put("x.bin", BODY)
    objects = opened(bucket)
    for ask, faults, answer in (
        (lambda: objects.read("x.bin"), [fault], BODY),
        (lambda: objects.read("x.bin", 10, 70_000), [fault], BODY[10:70_010]),
        (lambda: [one.name for one in objects.entries("list")], [fault] * 2 + [""] + [fault] * 2, LISTED),
    ):
        bucket.proxy.faults = faults
        assert ask() == answer
        assert not bucket.proxy.faults


@pytest.mark.parametrize(
    ("fault", "told"),
    [("503", "503 Service Unavailable"), ("silent", "HTTP error"), ("refused", "HTTP error")],
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
        objects.read_parts([("x.bin", 0, None, 0)] * 20)
    with pytest.raises(SourceGoneError):
        objects.read("y.bin")  # whose requests are not those of the twenty, which may still be on their way
    assert sum("y.bin" in path for _, path, *_ in bucket.proxy.log) <= 1  # nobody waits a second time
    if fault == "refused":
        bucket.proxy.start()
    bucket.proxy.always = ""
    assert objects.read("x.bin") == BODY
    bucket.proxy.faults = ["503"] * 3
    assert objects.read("x.bin") == BODY  # the patience is back


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
    asked = bucket.proxy.log[-1][2]
    assert f"Credential=LABKEY/{asked.split('/')[1]}/{REGION}" in asked


def test_google_s_store_and_a_web_server_are_read_alike(bucket, monkeypatch):
    # The requests of obstore to Google's store are such that moto's server answers them.
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
    words = [sys.executable, "-c", code, bucket.url("x.bin")]
    child, parent = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout.splitlines()
    assert child.startswith(f"{bucket.url()} cannot be read, because this process was forked")
    assert parent == str(len(BODY))


def test_a_missing_package_and_wrong_settings_are_told(bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "obstore", None)
        patch.setitem(sys.modules, "obstore.store", None)
        patch.setenv("AWS_SESSION_TOKEN", "another bucket")
        with pytest.raises(ValueError, match="obstore, which is not installed; pip install"):
            opened(bucket)
    for seconds in ("soon", "-1", "nan"):
        monkeypatch.setenv("DALI_VIEWS_RETRY_SECONDS", seconds)
        with pytest.raises(ValueError, match="is not a number of seconds"):
            opened(bucket)


class _Metadata(BaseHTTPRequestHandler):
    """A proxy through which Google's metadata server is unknown by its name and denied by its number."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if "169.254" in self.path:
            self.send_error(403)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def test_a_bucket_of_google_without_credentials_is_told_at_once(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Metadata) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in [name for name in os.environ if name.lower().endswith("_proxy") or "GOOGLE" in name]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HOME", "/nonexistent")  # no credentials of the user's own
        with pytest.raises(SourceGoneError, match=r"403 Forbidden.*GOOGLE_APPLICATION_CREDENTIALS"):
            bucket_of("gs://somewhere")[0].entries()
        server.shutdown()
    assert len(server.asked) == 2, "once by name, once by number"
