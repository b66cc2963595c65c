"""Files whose times are not what they seem: the right frames at the right times, and a word of it."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import STOOD, Clip, DecodeError, decode_clip
from tests.support.videos import make, number_of

MANY = FrameSettings(400, 64)
SMALL = FrameSettings(100, 64)


def numbers(clip: Clip) -> list[int]:
    """The 12-bit bar codes of the upper half, most significant bit first."""
    found = []
    for frame in clip.frames:
        bits = [frame[16, (2 * i + 1) * 64 // 24, 1] > 120 for i in range(12)]
        found.append(int("".join(str(int(bit)) for bit in bits), 2))
    return found


def test_the_default_of_two_streams_is_shown(media: Path) -> None:
    assert numbers(decode_clip(media / "cases" / "t_two_default2.mp4", MANY)) == list(range(240))


def test_one_tie_costs_no_other_time(media: Path) -> None:
    path = media / "cases" / "u_vfr_one_tie.mp4"
    clip = decode_clip(path, MANY)
    assert numbers(clip) == list(range(100)) and clip.timestamps[48] == pytest.approx(7.0, abs=0.001)
    assert (np.diff(clip.timestamps) > 0).all() and clip.timing == ["1 times nudged that stood twice"]
    inside = decode_clip(path, MANY, 2.02, 3.1)
    assert numbers(inside) == [47] and STOOD in inside.timing


def test_a_clip_inside_a_still_stretch_shows_the_picture_that_stood_there(media: Path) -> None:
    clip = decode_clip(media / "cases" / "u_vfr_clean.mp4", MANY, 2.02, 3.1)
    assert numbers(clip) == [47] and clip.timing == [STOOD] and (clip.start, clip.end) == (2.02, 3.1)


def test_pieces_of_a_transport_stream_follow_each_other(media: Path) -> None:
    path = media / "cases" / "t_joined.ts"
    clip = decode_clip(path, MANY)
    assert len(clip.frames) == 196 and clip.fps == pytest.approx(24) and not clip.truncated
    assert clip.timestamps[-1] == pytest.approx(8.25, abs=0.01) and (np.diff(clip.timestamps) > 0).all()
    assert clip.timing == ["1 jumps of the clock joined"]
    assert numbers(decode_clip(path, MANY, 2.02, 3.1)) == list(range(49, 75))


def test_a_reordered_avi_is_put_right(media: Path) -> None:
    path = media / "cases" / "t_h264.avi"
    clip = decode_clip(path, MANY)
    assert (numbers(clip), clip.fps, clip.duration) == (list(range(240)), 24.0, 10.0)
    assert clip.timing == ["reordered AVI: times in the order of decoding"]
    assert numbers(decode_clip(path, MANY, 2.02, 3.1)) == list(range(49, 75))


def test_a_file_cut_short_says_how_much_is_there(media: Path) -> None:
    clip = decode_clip(media / "cases" / "t_truncated.mp4", MANY)
    assert clip.truncated and numbers(clip) == list(range(120)) and clip.duration == pytest.approx(5.0)
    with pytest.raises(DecodeError, match=r"between 6 s and 8 s: .* 4\.96 s"):
        decode_clip(media / "cases" / "t_truncated.mp4", MANY, 6.0, 8.0)


# --- Their kinds, made here -----------------------------------------------------------------------------------------


CUT = {
    "matroska": {},
    "avi": {},
    "mp4": {},  # its index in front, as of files that one can watch while they load
    "fragmented mp4": {"container": "mp4", "movflags": "frag_keyframe+empty_moov"},
    "flv": {},
    "mpegts": {},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("part", [0.75, 0.9])
def test_any_container_cut_short(kind: str, part: float, tmp_path: Path) -> None:
    given: dict[str, Any] = {"container": kind, "options": {"g": "10", "bf": "0"}} | CUT[kind]
    if kind == "gif":
        given["options"] = {}
    whole = make(60, **given)
    if kind == "mp4":
        whole = faststart(whole, tmp_path / "whole.mp4")
    assert not decode_clip(whole, SMALL).truncated
    clip = decode_clip(whole[: int(len(whole) * part)], SMALL)
    shown = [number_of(frame) for frame in clip.frames]
    assert clip.truncated and shown == list(range(len(shown))) and 5 < len(shown) < 60
    assert clip.timestamps == pytest.approx(np.arange(len(shown)) / 10, abs=0.002)
    assert clip.duration == pytest.approx(len(shown) / 10, abs=0.11)


def test_a_fragment_without_its_pictures_is_a_file_cut_short() -> None:
    whole = make(60, options={"g": "10", "bf": "0"}, movflags="frag_keyframe+empty_moov")
    clip = decode_clip(whole[: whole.rindex(b"mdat") - 2], SMALL)
    assert clip.truncated and 5 < len(clip.frames) < 60
    assert clip.duration == pytest.approx(len(clip.frames) / 10)  # not what the fragment says of itself


def faststart(video: bytes, path: Path) -> bytes:
    """The mp4 with its index in front; written at `path` on the way."""
    with (
        av.open(io.BytesIO(video)) as source,
        av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    return content


def test_a_still_screen_recording() -> None:
    pts = [0, 40, 80, 5000, 5040, 9000]
    video = make(6, pts=pts, container="matroska", options={"bf": "0"})
    for start, end, number in ((1.0, 2.0, 2), (0.09, 4.9, 2), (6.0, 7.0, 4)):
        clip = decode_clip(video, SMALL, start, end)
        assert [number_of(frame) for frame in clip.frames] == [number] and clip.timing == [STOOD]
    assert [number_of(frame) for frame in decode_clip(video, SMALL, 4.0, 9.5).frames] == [3, 4, 5]


def test_the_last_picture_stands_as_long_as_the_file_goes_on() -> None:
    """By its own length, or while sound goes on."""
    long = make(3, pts=[0, 40, 30000], container="matroska", options={"bf": "0"})
    sound = with_sound(make(60, container="matroska"), 12)
    for video, start, number in ((long, 20.0, 1), (sound, 10.0, 59), (sound, 11.4, 59)):
        clip = decode_clip(video, SMALL, start, start + 0.5)
        assert [number_of(frame) for frame in clip.frames] == [number] and clip.timing == [STOOD]
        assert clip.end == start + 0.5 and clip.duration > start
    with pytest.raises(DecodeError, match=r"between 12\.5 s and the end: .* and 5\.90 s"):
        decode_clip(sound, SMALL, 12.5)


def with_sound(video: bytes, seconds: int) -> bytes:
    """The video as Matroska with so much silence beside it."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format="matroska") as target:
        pictures = target.add_stream_from_template(source.streams.video[0])
        sound = target.add_stream("pcm_s16le", rate=8000)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                target.mux(packet)
        for second in range(seconds):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.sample_rate, silence.pts = 8000, second * 8000
            target.mux(sound.encode(silence))
        target.mux(sound.encode(None))
    return buffer.getvalue()
