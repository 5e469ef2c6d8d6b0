"""An object store for tests: moto's server in a process of its own, behind a proxy that can fail."""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REGION = "us-east-1"
PAGE = 10  # objects in a page of a listing
_HOST = "127.0.0.1"


class Proxy:
    """Passes requests on to a server, but fails as it is told for the next ones.

    A fault is a status ("503"), "cut" or "stall" (in the middle of the body), "silent" or "reset".
    """

    def __init__(self, upstream: int) -> None:
        self.upstream, self.port = upstream, 0
        self.faults: list[str] = []
        self.always = ""  # fault of every request after those
        self.log: list[tuple[str, str, str]] = []  # method, path and header Authorization of every request
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.open: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def start(self) -> None:
        """Listens, after `stop` at the same port again."""
        self.ended.clear()
        self._server = _Server((_HOST, self.port), type("Handler", (_Handler,), {"proxy": self}))
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """Refuses connections and breaks those that stand."""
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self.lock:
            for connection in self.open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def next_fault(self) -> str:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is no error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        with self.proxy.lock:
            self.proxy.open.add(self.connection)

    def finish(self) -> None:
        with self.proxy.lock:
            self.proxy.open.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """The tests read `Proxy.log`."""

    def do_GET(self) -> None:
        fault = self.proxy.next_fault()
        self.proxy.log.append((self.command, self.path, self.headers.get("Authorization") or ""))
        if fault.isdigit():
            self._answer(int(fault), [], b"")
        elif fault == "silent":
            self._leave(wait=True)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._leave()
        else:
            self._pass_on(fault)

    do_HEAD = do_GET

    def _pass_on(self, fault: str) -> None:
        upstream = http.client.HTTPConnection(_HOST, self.proxy.upstream)
        upstream.request(self.command, self.path, None, dict(self.headers.items()))
        reply = upstream.getresponse()
        self._answer(reply.status, reply.getheaders(), reply.read(), fault)
        upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str = "") -> None:
        self.send_response(status)
        size = str(len(body))
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
            elif name.lower() == "content-length" and self.command == "HEAD":
                size = value
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault else body)
        if fault:
            self._leave(wait=fault == "stall")

    def _leave(self, wait: bool = False) -> None:
        """Ends the connection: at once, or when the proxy stops."""
        if wait:
            self.proxy.ended.wait()
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


@dataclass
class Bucket:
    """One bucket in the server, which the environment of the test leads to by way of the proxy."""

    proxy: Proxy
    client: Any
    """boto3's, past the proxy."""
    name: str

    def url(self, key: str = "") -> str:
        return f"s3://{self.name}/{key}".rstrip("/")

    def put(self, key: str, content: bytes, **options: Any) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content, **options)

    def put_folder(self, folder: Path, prefix: str) -> str:
        """The files below a folder; their URL."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())
        return self.url(prefix)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[Any]:
    """A client of moto's server."""
    pytest.importorskip("boto3")
    pytest.importorskip("moto")
    with served() as client:
        yield client


@contextmanager
def served() -> Iterator[Any]:
    """Runs moto's server; gives a client of it."""
    import boto3

    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)},
    )
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": REGION}
    config = boto3.session.Config(retries={"total_max_attempts": 1})
    client = boto3.client("s3", endpoint_url=f"http://{_HOST}:{port}", config=config, **keys)
    try:
        while True:
            assert process.poll() is None, "moto's server has ended"
            with suppress(Exception):  # botocore's own, as long as nobody listens
                client.list_buckets()
                break
        yield client
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(
    moto_server: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Bucket]:
    """A new bucket, and a patience of ten seconds."""
    port = int(moto_server.meta.endpoint_url.rpartition(":")[2])
    name = f"bucket{abs(hash(request.node.nodeid)):x}"
    moto_server.create_bucket(Bucket=name)
    proxy = Proxy(port)
    for variable in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", REGION)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("DALI_VIEWS_RETRY_SECONDS", "10")
    yield Bucket(proxy, moto_server, name)
    proxy.stop()
