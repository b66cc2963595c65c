"""What may be named and played: inside the roots alone, in pieces, with ranges."""

import os
import time
from pathlib import Path

import pytest

from hbi.serving.index.rows import rows_of
from hbi.serving.index.table import ClipTable
from hbi.serving.media import STRAY_SECONDS, MediaRoots, keep_upload, look_at, parse_range, remove_strays
from hbi.serving.refusal import Refused
from tests.serving.test_index import METADATA, clip, encoded


@pytest.fixture
def roots(tmp_path: Path) -> MediaRoots:
    for name in ("inside/deep/a.mp4", "inside-not/b.mp4", "outside/secret.mp4", "index/uploads/u.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / "inside" / "link.mp4").symlink_to(tmp_path / "outside" / "secret.mp4")
    (tmp_path / "inside" / "within.mp4").symlink_to(tmp_path / "inside" / "deep" / "a.mp4")
    (tmp_path / "inside" / "folder-link").symlink_to(tmp_path / "outside")
    return MediaRoots.of(
        [str(tmp_path / "inside"), "s3://bucket/videos"], str(tmp_path / "index" / "uploads"), 1000
    )


@pytest.mark.parametrize("video", ["{}/inside/deep/a.mp4", "file://{}/inside/deep/a.mp4", "deep/a.mp4",
                                   "{}/inside/within.mp4", "{}/outside/../inside/deep/a.mp4"])  # fmt: skip
def test_what_lies_in_a_root_is_allowed_by_its_real_place(
    roots: MediaRoots, tmp_path: Path, video: str
) -> None:
    assert roots.to_add(video.format(tmp_path)) == os.path.realpath(tmp_path / "inside" / "deep" / "a.mp4")


@pytest.mark.parametrize(
    "video",
    ["{}/outside/secret.mp4", "{}/inside/../outside/secret.mp4", "{}/inside/link.mp4", "{}/inside-not/b.mp4",
     "{}/inside/folder-link/secret.mp4", "../outside/secret.mp4", "/etc/passwd", "file:///etc/passwd", "{}/inside",
     "http://127.0.0.1/a.mp4", "s3://bucket/videos-not/a.mp4", "s3://bucket/videos/../secret.mp4",
     "s3://other/videos/a.mp4", "s3://bucket/videos", "{}/inside/a\0.mp4", "", "{}/outside/not there", "gs://b/a"],
)  # fmt: skip
def test_whatever_lies_outside_is_403_whether_it_is_there_or_not(
    roots: MediaRoots, tmp_path: Path, video: str
) -> None:
    with pytest.raises(Refused) as refused:
        roots.to_add(video.format(tmp_path))
    assert refused.value.status == 403


def test_s3_prefixes_hold_what_is_below_them(roots: MediaRoots) -> None:
    assert roots.inside("s3://bucket/videos/a/./b.mp4") == "s3://bucket/videos/a/b.mp4"


def test_no_root_allows_uploads_alone(tmp_path: Path, roots: MediaRoots) -> None:
    none = MediaRoots.of([], roots.uploads, 1000)
    assert none.inside(f"{tmp_path}/index/uploads/u.mp4")
    with pytest.raises(Refused, match="no --media-root is set"):
        none.inside(f"{tmp_path}/inside/deep/a.mp4")
    with pytest.raises(ValueError, match=r"--media-root .*: not a folder"):
        MediaRoots.of([str(tmp_path / "absent")], roots.uploads, 1000)


def test_an_upload_belongs_to_the_clip_that_it_came_with(tmp_path: Path, roots: MediaRoots) -> None:
    for allowed in (roots, MediaRoots.of([str(tmp_path)], roots.uploads, 1000)):
        assert allowed.inside(f"{tmp_path}/index/uploads/u.mp4")
        with pytest.raises(Refused) as refused:  # removing that clip would take this one's video
            allowed.to_add(f"{tmp_path}/index/uploads/u.mp4")
        assert refused.value.status == 403


def test_uploads_that_no_clip_has_go_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ClipTable.create(str(tmp_path / "index"), METADATA)

    def upload() -> str:
        (tmp_path / "sent").write_bytes(b"a video")
        return keep_upload(str(tmp_path / "sent"), "a.MP4", table.uploads)

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - STRAY_SECONDS - 5)
    kept, moved, stray = upload(), upload(), upload()
    monkeypatch.undo()
    young = upload()
    foreign = Path(table.uploads, "mine.mp4")
    foreign.write_bytes(b"another's")
    os.utime(foreign, (0, 0))
    # One of the index before it was moved to where it is.
    sources = [kept, f"/where/it/was/uploads/{Path(moved).name}"]
    clips = [clip(f"v{i}", part="request:1", source=source) for i, source in enumerate(sources)]
    table.add(rows_of(clips, [encoded(1), encoded(2)]))
    remove_strays(table)
    left = {str(path) for path in Path(table.uploads).iterdir()}
    assert left == {kept, moved, young, str(foreign)} and stray.endswith(".mp4")


def test_what_is_no_regular_file_is_refused_before_it_is_read(roots: MediaRoots, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "inside" / "pipe.mp4")
    (tmp_path / "inside" / "huge.mp4").write_bytes(b"x" * 1001)
    for name, status in (("pipe.mp4", 422), ("deep", 422), ("absent.mp4", 422), ("huge.mp4", 413)):
        with pytest.raises(Refused) as refused:
            roots.to_add(str(tmp_path / "inside" / name))
        assert refused.value.status == status, name


@pytest.mark.parametrize(
    "content", [b"", b"just text", b"#EXTM3U\nfile.ts", b"ffconcat version 1.0", b"PK\x03\x04zip"]
)
def test_what_is_no_video_by_its_first_bytes_is_422(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(Refused) as refused:
        look_at(str(tmp_path / "a.mp4"))
    assert refused.value.status == 422


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 0)), ("bytes=0-", (0, 99)), ("bytes=10-19", (10, 19)), ("bytes=90-500", (90, 99)),
        ("bytes=-10", (90, 99)), ("bytes=-500", (0, 99)), ("bytes=100-", ()), ("bytes=-0", ()),
        ("bytes=5-4", None), ("bytes=0-1,3-4", None), ("lines=0-1", None), ("bytes=-", None), ("bytes=a-b", None),
        ("bytes=99999999999999999999-", None),
    ],
)  # fmt: skip
def test_ranges(header: str, expected: object) -> None:
    assert parse_range(header, 100) == expected
