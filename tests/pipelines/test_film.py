"""Many clips of one film: each as if it were the only one, and no more read than its own groups of pictures."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest

from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding import film as films
from hbi.pipelines.decoding import timeline
from hbi.pipelines.decoding.clip import Clip, DecodeError, decode_clip
from hbi.pipelines.decoding.film import Film, LastFilm
from tests.support.videos import make, noisy, number_of

FEW = FrameSettings(5, 64)
CUTS = [(0.5, 2.0), (2.0, 4.5), (9.0, 12.0), (3.0, 3.4), (14.5, 15.0), (0.0, 15.0)]
KINDS = {
    "mp4, B-frames": {"options": {"g": "20", "bf": "3"}},
    "mp4, open groups": {"options": {"x264-params": "keyint=20:open-gop=1:bframes=3"}},
    "mkv": {"container": "matroska", "options": {"g": "20", "bf": "3"}},
    "ts": {"container": "mpegts", "options": {"g": "20", "bf": "2"}},
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=20"}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [True, False])
def test_clips_of_an_open_film_are_those_of_the_file(
    tmp_path: Path, kind: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(timeline, "KEPT_PACKETS_BYTES", 0)
    path = tmp_path / "film"
    path.write_bytes(make(150, **KINDS[kind]))  # type: ignore[arg-type]
    film = Film(path)
    for start, end in CUTS:
        alone, shared = decode_clip(path, FEW, start, end), decode_clip(film, FEW, start, end)
        assert [number_of(frame) for frame in shared.frames] == [number_of(frame) for frame in alone.frames]
        assert np.array_equal(shared.frames, alone.frames) and shared.timestamps == alone.timestamps
        first = number_of(shared.frames[0])
        assert shared.timestamps[0] == pytest.approx(first / 10, abs=0.011) and first == round(start * 10)
    film.close()


def test_a_clip_costs_its_own_group_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "KEPT_PACKETS_BYTES", 0)
    path = tmp_path / "film.mp4"
    path.write_bytes(make(250, options={"g": "25", "bf": "0"}))
    film = Film(path)
    assert film.timeline is not None and film.timeline.packets is None
    seen: list[int] = []
    real = films.demuxed

    def counted(*given):  # type: ignore[no-untyped-def]
        for packet in real(*given):
            seen.append(packet.size)
            yield packet

    monkeypatch.setattr(films, "demuxed", counted)
    decode_clip(film, FrameSettings(3, 64), 20.0, 20.5)
    assert 5 <= len(seen) <= 30
    film.close()


def test_the_last_film_stays_open_until_another_comes_or_its_file_changes(tmp_path: Path) -> None:
    last = LastFilm()
    one, two = tmp_path / "one.mp4", tmp_path / os.fsdecode(b"\xff.mp4")
    one.write_bytes(make(5))
    two.write_bytes(make(6))
    with last.of(one) as first:
        pass
    with last.of(str(one)) as again:
        assert again is first
    with last.of(two) as other:
        assert other is not first
    two.write_bytes(make(9))
    os.utime(two, ns=(1, 1))
    with last.of(two) as changed:
        assert changed is not other and len(decode_clip(changed, FrameSettings(20, 64)).frames) == 9
    with last.of(make(3)) as bytes_of_its_own:
        assert len(decode_clip(bytes_of_its_own, FEW).frames) == 3
    assert last.film is None


# --- Long films, by their index -------------------------------------------------------------------------------------


def described(clip: Clip) -> tuple[object, ...]:
    return (
        clip.timestamps, clip.fps, clip.duration, clip.start, clip.end, clip.timing, [f.tobytes() for f in clip.frames]
    )  # fmt: skip


def large(monkeypatch: pytest.MonkeyPatch, path: Path) -> Film:
    """A film that is taken for a large one, its packets not kept."""
    with monkeypatch.context() as patch:
        patch.setattr(films, "KEPT_PACKETS_BYTES", 0)
        return Film(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_film_gives_by_its_index_what_it_gives_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "film"
    path.write_bytes(make(150, **KINDS[kind]))  # type: ignore[arg-type]
    film = large(monkeypatch, path)
    for start, end in [*CUTS, (None, 2.0), (13.0, None), (None, None)]:
        assert described(decode_clip(film, FEW, start, end)) == described(decode_clip(path, FEW, start, end))
    for start, end in ((20.0, 21.0), (2.01, 2.05)):
        found = []
        for each in (film, path):
            try:
                found.append(decode_clip(each, FEW, start, end).timing)
            except DecodeError as error:
                found.append(str(error))
        assert found[0] == found[1]
    # Of Matroska only the clips that are most of the film are cut of the whole.
    reasons = {"ts": "MPEG-TS (MPEG-2 Transport Stream)", "mkv": "Matroska / WebM"}
    assert film.whole == (
        f"the index of {reasons[kind]} does not list every packet" if kind in reasons else ""
    )
    film.close()


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    seen = 0

    def read(self, length: int = -1, /) -> bytes:  # type: ignore[override]
        content = super().read(length)
        Counted.seen += len(content)
        return content


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_of_a_large_film_little_is_read(
    tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "film"
    path.write_bytes(noisy(container))

    @contextmanager
    def counted(data: Path) -> Iterator[BinaryIO]:
        with Counted(data) as source:
            yield cast("BinaryIO", source)

    monkeypatch.setattr(films, "video_file", counted)
    film = large(monkeypatch, path)
    Counted.seen = 0
    for start in (20.0, 7.0):
        decode_clip(film, FrameSettings(3, 64), start, start + 0.5)
    assert 0 < Counted.seen < path.stat().st_size / 4 and not film.whole
    film.close()


def test_an_index_that_calls_everything_a_keyframe_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "film.mp4"
    video = make(60, options={"g": "20", "bf": "0"})
    place = video.index(b"stss")
    path.write_bytes(
        video[:place] + b"free" + video[place + 4 :]
    )  # without that box every packet is a keyframe
    film = large(monkeypatch, path)
    clip = decode_clip(film, FEW, 1.5, 1.9)
    assert [number_of(frame) for frame in clip.frames] == [15, 16, 17, 18]
    assert film.whole == "it calls a packet a keyframe that is none"
    film.close()


@pytest.mark.parametrize(
    ("pts", "reason"),
    [
        (
            [*range(0, 2000, 100), *range(4000, 14000, 500)],
            "its frames do not come at the rate that its header states",
        ),
        ([*range(0, 1500, 100), 1400, *range(1500, 15000, 100)], "not every frame has a time of its own"),
    ],
)
def test_cues_of_a_film_whose_rate_varies_are_not_enough(
    tmp_path: Path, pts: list[int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "film.mkv"
    path.write_bytes(make(len(pts), pts=pts, container="matroska", options={"bf": "0", "g": "10"}))
    film = large(monkeypatch, path)
    assert described(decode_clip(film, FEW, 1.0, 2.0)) == described(decode_clip(path, FEW, 1.0, 2.0))
    assert film.whole == reason
    film.close()
