"""Clips of films in object storage: only what they need is fetched, and an outage in the middle loses nothing."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hbi.infra import storage
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.manifest import Row
from hbi.pipelines.sharding import fetch, shards
from hbi.pipelines.sharding.fetch import Video, fetched
from hbi.pipelines.sharding.records import Failure
from hbi.pipelines.sharding.settings import ShardSettings
from tests.support.s3 import Fault, ObjectStorage, object_storage
from tests.support.videos import noisy

CUTS = [(50.0, 52.0), (3.0, 5.0), (30.5, 31.0)]
Clips = list[tuple[list[float], list[bytes], float]]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with shards.decoder(ShardSettings(frames=3, size=32)) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorage]:
    with object_storage(tmp_path_factory.mktemp("s3")) as running:
        for kind, name in (("mp4", "mp4"), ("matroska", "mkv"), ("mpegts", "ts")):
            running.put(f"film.{name}", noisy(kind))
        yield running


@pytest.fixture
def lengths(server: ObjectStorage, monkeypatch: pytest.MonkeyPatch, decoder: Decoder) -> Iterator[list[int]]:
    """Bytes of each range that is asked for; all films are taken for large ones."""
    server.use(monkeypatch)
    monkeypatch.setattr(fetch, "IN_PARTS_BYTES", 1 << 20)
    real, asked = storage.read_range, []

    def counted(path: str, start: int, length: int) -> bytes:
        asked.append(length)
        return real(path, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    yield asked
    server.faults.clear()
    decoder.close()


def clips(video: str, decoder: Decoder, staging: Path) -> tuple[Clips, list[Failure]]:
    """The clips of CUTS, and the failures of those that there are none of."""
    rows = [(str(number), Row(video, str(number), [], "train", *cut)) for number, cut in enumerate(CUTS)]
    found: Clips = []
    failures = []
    for _, row, fetched_video in fetched(rows, str(staging)):
        clip = fetched_video.clip(decoder, row) if isinstance(fetched_video, Video) else fetched_video
        if isinstance(clip, Failure):
            failures.append(clip)
        else:
            found.append((clip.timestamps, clip.jpegs, clip.duration))
    assert not list(staging.iterdir())
    return found, failures


@pytest.mark.parametrize(("name", "part"), [("mp4", 0.6), ("mkv", 0.75), ("ts", 1.0)])
def test_clips_are_those_of_the_local_file(
    name: str, part: float, server: ObjectStorage, decoder: Decoder, tmp_path: Path, lengths: list[int]
) -> None:
    found, failures = clips(server.uri(f"film.{name}"), decoder, tmp_path)
    size = server.path(f"film.{name}").stat().st_size
    assert not failures and sum(lengths) < size * part + (1 << 20) * (name == "ts")
    assert found == clips(str(server.path(f"film.{name}")), decoder, tmp_path)[0]


@pytest.mark.parametrize("kind", ["503", "cut", "short", "drop"])
def test_what_passes_is_tried_again(
    kind: str, server: ObjectStorage, decoder: Decoder, tmp_path: Path, lengths: list[int]
) -> None:
    server.faults.append(Fault(kind, "film.mp4", times=2))
    found, failures = clips(server.uri("film.mp4"), decoder, tmp_path)
    assert not failures and not server.faults[0].times
    assert found == clips(str(server.path("film.mp4")), decoder, tmp_path)[0]


def test_an_outage_in_the_middle_is_the_storage_s_failure(
    server: ObjectStorage,
    decoder: Decoder,
    tmp_path: Path,
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = storage.read_range

    def until_the_second_clip(path: str, start: int, length: int) -> bytes:
        if len(lengths) == 5:
            server.faults.append(Fault("503", "film.mp4", times=storage.TRIES))
        return real(path, start, length)

    monkeypatch.setattr(storage, "read_range", until_the_second_clip)
    found, failures = clips(server.uri("film.mp4"), decoder, tmp_path)
    assert [(failure.stage, failure.passing) for failure in failures] == [("read", True)]
    assert "storage kept failing" in failures[0].reason
    whole = clips(str(server.path("film.mp4")), decoder, tmp_path)[0]
    assert len(found) == 2 and all(clip in whole for clip in found)


@contextmanager
def web(folder: Path, handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Plain(SimpleHTTPRequestHandler):
    """Gives the whole of a file, whatever is asked for."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class Ranged(Plain):
    """Gives ranges, and says so."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(Path(self.translate_path(self.path)).stat().st_size))
        self.end_headers()

    def do_GET(self) -> None:
        begin, end = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        content = Path(self.translate_path(self.path)).read_bytes()[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.mark.parametrize("handler", [Plain, Ranged])
def test_of_the_web_in_parts_where_the_server_says_that_it_gives_them(
    handler: type[Plain], server: ObjectStorage, decoder: Decoder, tmp_path: Path, lengths: list[int]
) -> None:
    with web(server.path(), handler) as address:
        found, failures = clips(f"{address}/film.mp4", decoder, tmp_path)
    assert not failures and bool(lengths) == (handler is Ranged)
    assert found == clips(str(server.path("film.mp4")), decoder, tmp_path)[0]
