"""Storage: whole or not at all, and every passing fault of object storage survived. Against a real server."""

import functools
import io
import os
import socket
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hbi.infra import storage
from tests.support.s3 import Fault, ObjectStorage


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return request.getfixturevalue("remote").uri(tmp_path.name)


def test_what_is_written_is_read(base: str, tmp_path: Path):
    path = storage.join(base, "deep", "er", "é #%1 ?.txt")
    assert not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)
    storage.write_bytes(path, b"one\r\ntw\xffo\n\nlast")
    assert storage.exists(path) and storage.size(path) == 15
    assert storage.read_bytes(path) == b"one\r\ntw\xffo\n\nlast"
    (tmp_path / "copies").mkdir()
    assert Path(storage.local_copy(path, str(tmp_path / "copies"))).read_bytes() == b"one\r\ntw\xffo\n\nlast"
    storage.write_bytes(storage.join(base, "deep", "a.txt"), b"")
    assert storage.read_bytes(storage.join(base, "deep", "a.txt")) == b""
    assert storage.list_files(storage.join(base, "deep")) == [storage.join(base, "deep", "a.txt")]
    assert storage.list_files(storage.join(base, "deep"), recursive=True) == [
        storage.join(base, "deep", "a.txt"),
        path,
    ]
    assert storage.list_files(storage.join(base, "none")) == []
    storage.delete(path)
    storage.delete(path)
    assert not storage.exists(path)


def test_files_are_put_whole(base: str, tmp_path: Path):
    spooled = tmp_path / "spooled"
    spooled.write_bytes(os.urandom(3_000_000))
    storage.put_file(str(spooled), storage.join(base, "put", "copy"))
    assert storage.read_bytes(storage.join(base, "put", "copy")) == spooled.read_bytes()
    content = spooled.read_bytes()
    storage.put_file(str(spooled), storage.join(base, "put", "moved"), move=True)
    assert storage.read_bytes(storage.join(base, "put", "moved")) == content and not spooled.exists()


def test_open_file_seeks(base: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "RANGE_BYTES", 1000)
    content = os.urandom(10_500)
    path = storage.join(base, "ranges")
    storage.write_bytes(path, content)
    with storage.open_file(path) as stream:
        assert stream.read(1500) == content[:1500]
        stream.seek(-300, io.SEEK_END)
        assert stream.read() == content[-300:]
        stream.seek(900)
        assert stream.read(200) == content[900:1100]
    assert storage.read_bytes(path) == content


def test_a_range_is_read_by_itself(base: str, remote: ObjectStorage):
    path = storage.join(base, "rows.jsonl")
    storage.write_bytes(path, b"one two three")
    remote.requests.clear()
    assert storage.read_range(path, 4, 3) == b"two" and storage.read_range(path, 0, 0) == b""
    assert len(remote.requests) == (1 if storage.is_remote(path) else 0)
    with pytest.raises(OSError, match="short read: 5 bytes of 6"):
        storage.read_range(path, 8, 6)


def test_small_reads_share_a_request(remote: ObjectStorage):
    lines = [f"line {number}" for number in range(20_000)]
    remote.put("text", "\n".join(lines).encode())
    with io.TextIOWrapper(storage.open_file(remote.uri("text"))) as stream:
        assert stream.read().splitlines() == lines
    assert len([method for method, _ in remote.requests if method == "GET"]) == 1


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "kept"
    storage.write_bytes(str(path), b"before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(str(path), b"after")
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("kind", ["503", "500", "hang", "cut", "short", "drop"])
def test_reading_survives_faults_that_pass(remote: ObjectStorage, kind: str):
    content = os.urandom(100_000)
    remote.put("faulty", content)
    remote.faults[:] = [Fault(kind, "faulty", times=2), Fault("503", "faulty", "HEAD")]
    remote.hang_seconds = 1.5
    assert storage.read_bytes(remote.uri("faulty")) == content
    assert all(fault.times == 0 for fault in remote.faults)


@pytest.mark.parametrize("kind", ["503", "500", "drop", "hang"])
def test_writing_survives_faults_that_pass(remote: ObjectStorage, kind: str):
    remote.hang_seconds = 1.5
    remote.faults[:] = [Fault(kind, "written", "PUT", times=2)]
    storage.write_bytes(remote.uri("written"), b"x" * 50_000)
    assert remote.path("written").read_bytes() == b"x" * 50_000
    assert remote.faults[0].times == 0


def test_faults_that_last_are_named(remote: ObjectStorage):
    remote.put("down", b"x")
    remote.faults[:] = [Fault("503", "down", times=1000)]
    with pytest.raises(storage.StorageError, match=r"s3://corpus/down: .*6 tries.*"):
        storage.read_bytes(remote.uri("down"))
    assert sum("down" in path for method, path in remote.requests if method == "GET") == storage.TRIES


def test_a_missing_object_is_asked_for_once(remote: ObjectStorage):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(remote.uri("missing"))
    assert len(remote.requests) <= 3  # HEAD, and s3fs's look whether it is a folder


def test_wrong_credentials_are_not_retried(remote: ObjectStorage, monkeypatch: pytest.MonkeyPatch):
    remote.put("secret", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage._s3.cache_clear()
    try:
        with pytest.raises(PermissionError):
            storage.read_bytes(remote.uri("secret"))
    finally:
        storage._s3.cache_clear()
    assert len(remote.requests) <= 3


def test_paths():
    assert storage.join("s3://b/data", "v/a.mp4") == "s3://b/data/v/a.mp4"
    assert storage.join("s3://b/data/", "../v/a.mp4") == "s3://b/v/a.mp4"
    assert storage.join("/data", "s3://b/a.mp4") == "s3://b/a.mp4"
    assert storage.join("s3://b/data", "/abs.mp4") == "/abs.mp4"
    assert storage.join("/data", "x", "y.mp4") == "/data/x/y.mp4"
    assert storage.absolute("file:///data/x") == "/data/x" and storage.absolute("s3://b/x") == "s3://b/x"
    assert storage.absolute("x") == os.path.abspath("x")  # noqa: PTH100
    assert storage.parent("s3://b/data/m.jsonl") == "s3://b/data" and storage.parent("/a/b") == "/a"
    with pytest.raises(ValueError, match="gs://"):
        storage.read_bytes("gs://b/x")


def test_the_web_is_read_with_ranges_or_without(tmp_path: Path) -> None:
    """`https://` and its like go through fsspec; Python's own server knows no ranges."""
    content = bytes(range(256)) * 40
    (tmp_path / "a b.bin").write_bytes(content)
    handler = functools.partial(SilentHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}/a%20b.bin"
            assert storage.read_bytes(address) == content
            assert storage.read_range(address, 300, 50) == content[300:350]
            assert Path(storage.local_copy(address, str(tmp_path))).read_bytes() == content
            with pytest.raises(FileNotFoundError):
                storage.read_bytes(address + "x")
        finally:
            server.shutdown()
    assert storage.parent(address) == address.rsplit("/", 1)[0]
    assert storage.join("https://h/a/b", "../c.mp4") == "https://h/a/c.mp4"


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, name, None)
    storage._other.cache_clear()
    with pytest.raises(ValueError, match="gs:// needs a package: pip install gcsfs"):
        storage.size("gs://bucket/a.mp4")
    with pytest.raises(ValueError, match="az:// needs a package: pip install adlfs"):
        storage.size("az://container/a.mp4")
    with pytest.raises(ValueError, match=r"ftp:// is not read here: use a local path or one of s3://, gs://"):
        storage.is_remote("ftp://host/a.mp4")


def test_a_hub_that_does_not_answer_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setattr(storage, "PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(storage, "LONGEST_PAUSE_SECONDS", 0.01)
        storage._other.cache_clear()
        with pytest.raises(storage.StorageError, match=r"hf://datasets/a/b/c\.mp4: storage kept failing"):
            storage.size("hf://datasets/a/b/c.mp4")
    storage._other.cache_clear()


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_what_the_hub_speaks_by_fails_like_any_storage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = pytest.importorskip(name)
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(storage, "LONGEST_PAUSE_SECONDS", 0.01)

    def request() -> None:
        raise spoken.ConnectError("Name or service not known")

    with pytest.raises(storage.StorageError, match="hf://x: storage kept failing, 6 tries"):
        storage._persist("hf://x", request)
