"""Many clips of one film: each as if it were the only one, and no more read than its own groups of pictures."""

import os
from pathlib import Path

import numpy as np
import pytest

from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding import film as films
from hbi.pipelines.decoding import timeline
from hbi.pipelines.decoding.clip import decode_clip
from hbi.pipelines.decoding.film import Film, LastFilm
from tests.support.videos import make, number_of

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
