"""Adding, removing and playing over HTTP: the contract, as a client tries it."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from hbi.serving.index.table import ClipTable
from tests.serving.conftest import CLIPS
from tests.support.asking import ask, form
from tests.support.clips import video
from tests.support.waiting import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_a_path_inside_a_root_is_added_found_and_removed(chain: Path, address: str, index: str) -> None:
    source = str(chain / "corpus" / "videos" / "clip-000000.mp4")
    odd = "a new/one 🎬 'q' <b>"
    added = ask(address, "POST", "/videos", {"video": source, "id": odd, "captions": ["mine"]})
    assert (added.status, added.json["id"]) == (201, odd)

    def found() -> dict[str, Any]:
        results = ask(address, "POST", "/search", {"text": "red", "k": 100}).json["results"]
        return {result["id"]: result for result in results}

    # Another replica sees it a moment later.
    wait_for(lambda: odd in found(), 30, "the added clip is never found")
    results = found()
    assert results[odd]["score"] == pytest.approx(results["clip-000000"]["score"], abs=1e-3)
    assert results[odd]["captions"] == ["mine"]
    assert ClipTable.open(index).snapshot().clip(odd).source == os.path.realpath(
        source
    )  # for who comes later
    again = ask(address, "POST", "/videos", {"video": source, "id": odd})
    assert (again.status, "is in use" in again.detail) == (409, True)
    assert ask(address, "POST", "/videos", {"video": source, "id": odd, "replace": True}).status == 201
    wait_for(
        lambda: ask(address, "GET", f"/videos/{quote(odd)}").json["captions"] == [], 30, "the old one stays"
    )
    assert ask(address, "DELETE", f"/videos/{quote(odd)}").status == 200
    assert ask(address, "DELETE", f"/videos/{quote(odd)}").status == 404
    wait_for(lambda: ask(address, "GET", "/health").json["videos"] == CLIPS, 30, "the removed clip stays")


def test_two_clients_cannot_take_the_same_id(chain: Path, address: str) -> None:
    body = {"video": str(chain / "corpus" / "videos" / "clip-000001.mp4"), "id": "once"}
    with ThreadPoolExecutor(4) as pool:
        statuses = sorted(pool.map(lambda _: ask(address, "POST", "/videos", body).status, range(4)))
    assert statuses == [201, 409, 409, 409]
    assert ask(address, "DELETE", "/videos/once").status == 200


def test_what_lies_outside_the_roots_is_403(address: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video(1))
    for place in (
        str(tmp_path / "a.mp4"),
        "/etc/passwd",
        "http://127.0.0.1/a.mp4",
        "s3://bucket/a.mp4",
        "../a.mp4",
    ):
        assert ask(address, "POST", "/videos", {"video": place}).status == 403, place


def test_an_upload_is_kept_beside_the_table_and_goes_with_its_clip(address: str, index: str) -> None:
    content = video(2)
    sent = form(("my clip.mp4", content), captions=["one", "two"])
    assert ask(address, "POST", "/videos", sent).json["id"] == "my clip"
    clip = ClipTable.open(index).snapshot().clip("my clip")
    assert clip.captions == ["one", "two"] and clip.video == "my clip.mp4"
    assert Path(clip.source).parent == Path(index) / "uploads" and Path(clip.source).read_bytes() == content
    assert ask(address, "GET", "/media/my%20clip").body == content
    assert ask(address, "POST", "/videos", sent).status == 409
    assert len(list((Path(index) / "uploads").iterdir())) == 1
    assert ask(address, "DELETE", "/videos/my%20clip").status == 200
    assert not list((Path(index) / "uploads").iterdir())


def test_what_is_no_video_is_refused_and_not_kept(
    chain: Path, address: str, index: str, tmp_path: Path
) -> None:
    for name, content in (("a.mp4", b"hello"), ("b.mp4", b"\x89PNG\r\n\x1a\n" + b"\0" * 500), ("c.mp4", b""),
                          ("d.mp4", b"#EXTM3U\n/etc/passwd\n"), ("e.mp4", video(1)[:900])):  # fmt: skip
        assert ask(address, "POST", "/videos", form((name, content))).status == 422, name
    assert ask(address, "POST", "/videos", form(None, id="x")).status == 422
    assert ask(address, "POST", "/videos", ("text/plain", b"x")).status == 415
    assert ask(address, "POST", "/videos", ("multipart/form-data", b"x")).status == 422
    os.mkfifo(chain / "corpus" / "pipe.mp4")
    for name in ("pipe.mp4", "videos", "manifest.jsonl", "absent.mp4"):
        assert ask(address, "POST", "/videos", {"video": str(chain / "corpus" / name)}).status == 422, name
    assert not list((Path(index) / "uploads").glob("*"))
    wait_for(lambda: ask(address, "GET", "/health").json["videos"] == CLIPS, 30, "something was added")


def test_media_by_ranges_and_tags(chain: Path, address: str) -> None:
    content = (chain / "corpus" / "videos" / "clip-000002.mp4").read_bytes()
    whole = ask(address, "GET", "/media/clip-000002")
    assert (whole.status, whole.body, whole.headers["content-type"]) == (200, content, "video/mp4")
    assert float(whole.headers["clip-start"]) == 0.0 < float(whole.headers["clip-end"])
    tag = whole.headers["etag"]
    part = ask(address, "GET", "/media/clip-000002", headers={"Range": "bytes=10-19"})
    assert (part.status, part.body) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
    assert ask(address, "GET", "/media/clip-000002", headers={"Range": "bytes=-5"}).body == content[-5:]
    beyond = ask(address, "GET", "/media/clip-000002", headers={"Range": f"bytes={len(content)}-"})
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(content)}")
    assert ask(address, "GET", "/media/clip-000002", headers={"If-None-Match": tag}).status == 304
    stale = ask(address, "GET", "/media/clip-000002", headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    assert (stale.status, stale.body) == (200, content)
    head = ask(address, "HEAD", "/media/clip-000002")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(content)))


def test_a_source_that_became_a_link_out_of_the_roots_is_not_played(
    chain: Path, address: str, tmp_path: Path
) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    source = chain / "corpus" / "videos" / "clip-000007.mp4"
    kept = source.read_bytes()
    source.unlink()
    assert ask(address, "GET", "/media/clip-000007").status == 404
    source.symlink_to(tmp_path / "secret.mp4")
    assert ask(address, "GET", "/media/clip-000007").status == 403
    source.unlink()
    source.write_bytes(kept)


def test_clients_that_do_not_read_cost_no_memory(chain: Path, address: str, index: str) -> None:
    large = chain / "corpus" / "videos" / "clip-000006.mp4"
    kept = large.read_bytes()
    with large.open("ab") as stream:
        stream.truncate(300_000_000)
    before, lines = psutil.Process().memory_info().rss, []
    try:
        for _ in range(8):
            line = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])))
            line.sendall(b"GET /media/clip-000006 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert line.recv(12) == b"HTTP/1.1 200"
            lines.append(line)
        assert ask(address, "GET", "/health").status == 200
        assert psutil.Process().memory_info().rss - before < 100_000_000
    finally:
        for line in lines:
            line.close()
        large.write_bytes(kept)
