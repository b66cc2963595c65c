"""Exactly the right frames, at the right times, the right way up; and reasons where there are none."""

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hbi.model.frames import FrameSettings, resize_crop
from hbi.pipelines.decoding.clip import Clip, DecodeError, decode_clip, probe
from hbi.pipelines.decoding.decoder import Decoder
from tests.support.videos import make, number_of, numbered

FEW = FrameSettings(num_frames=6, size=64)


def numbers(clip: Clip) -> list[int]:
    return [number_of(frame) for frame in clip.frames]


KINDS = {
    "h264 mp4, B-frames": ("decord", {"options": {"bf": "3", "g": "12"}}),
    "h264, one keyframe": ("decord", {"options": {"g": "1000"}}),
    "h264 mkv": ("decord", {"container": "matroska"}),
    "h264, open groups": ("pyav", {"options": {"x264-params": "keyint=8:open-gop=1:bframes=3"}}),
    "h264, refreshed bit by bit": ("pyav", {"options": {"x264-params": "keyint=8:intra-refresh=1"}}),
    "h264 flv": ("pyav", {"container": "flv"}),
    "h264 avi, B-frames": ("pyav", {"container": "avi", "options": {"bf": "3", "g": "12"}}),
    "h264 fragmented": ("decord", {"container": "mp4"}),
    "mpeg4 avi": ("pyav", {"codec": "mpeg4", "container": "avi"}),
    "mpeg4 mp4": ("decord", {"codec": "mpeg4", "options": {"bf": "0"}}),
    "mpeg4 mp4, B-frames": ("pyav", {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}}),
    "mpeg4 mkv, B-frames": ("pyav", {"codec": "mpeg4", "container": "matroska", "options": {"bf": "2"}}),
    "vp8 webm": ("decord", {"codec": "libvpx", "container": "webm"}),
    "vp9 webm": ("decord", {"codec": "libvpx-vp9", "container": "webm", "options": {"deadline": "realtime"}}),
    "hevc mp4": ("pyav", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
    "h264 ts, B-frames": ("pyav", {"container": "mpegts", "options": {"bf": "3", "g": "12"}}),
    "mpeg2 ps": ("pyav", {"codec": "mpeg2video", "container": "mpeg", "fps": 25}),
    "raw h264": ("pyav", {"container": "h264", "options": {"bf": "2"}}),
    "mjpeg": ("pyav", {"codec": "mjpeg", "container": "mjpeg", "pix_fmt": "yuvj420p"}),
    "raw av1": ("pyav", {"codec": "libsvtav1", "container": "obu", "options": {"preset": "12"}}),
    "av1 mp4": ("pyav", {"codec": "libsvtav1", "options": {"preset": "12"}}),
    "gif": ("pyav", {"codec": "gif", "container": "gif", "pix_fmt": "rgb8"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_frames_are_those_of_a_full_decode(kind: str) -> None:
    decoder, options = KINDS[kind]
    try:
        video = make(30, **options)  # type: ignore[arg-type]
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this PyAV cannot encode {kind}: {error}")
    clip = decode_clip(video, FEW)
    assert numbers(clip) == [0, 5, 11, 17, 23, 29]
    assert clip.decoder == "pyav" and not clip.truncated
    assert clip.picture == (["full range"] if kind == "mjpeg" else [])
    counted = any("counted" in note for note in clip.timing)
    assert counted == (kind in ("raw h264", "raw av1", "mjpeg"))
    fps = options.get("fps", 10)
    if kind not in ("raw h264", "raw av1", "mjpeg"):  # which carry no times
        assert np.diff(clip.timestamps) == pytest.approx(np.diff(numbers(clip)) / fps, abs=0.011)
        assert clip.duration == pytest.approx(30 / fps, abs=0.25)
    other = decode_clip(video, FEW, decoders=("decord",))
    assert numbers(other) == numbers(clip) and other.timestamps == clip.timestamps
    assert other.decoder == decoder
    assert np.abs(np.stack(other.frames).astype(int) - np.stack(clip.frames)).mean() < 1


def test_start_and_end_cut_exactly() -> None:
    video = make(30, options={"bf": "2", "g": "10"})
    many = FrameSettings(num_frames=40, size=64)
    for decoders in (("decord",), ("pyav",)):
        clip = decode_clip(video, many, 0.7, 1.5, decoders)
        assert numbers(clip) == [7, 8, 9, 10, 11, 12, 13, 14]  # start <= time < end
        assert clip.timestamps == pytest.approx([number / 10 for number in numbers(clip)])
        assert (clip.start, clip.end) == (0.7, 1.5)
    past = decode_clip(video, many, 2.5, 99.0)
    assert numbers(past) == [25, 26, 27, 28, 29] and past.end == past.duration == pytest.approx(3.0)


def test_a_clip_outside_the_video_says_where_the_video_is() -> None:
    with pytest.raises(DecodeError, match=r"no frame between 7 s and 9 s: .* 0\.00 s and 2\.90 s"):
        decode_clip(make(30), FEW, 7.0, 9.0)
    with pytest.raises(DecodeError, match=r"ends \(2 s\) before it starts \(3 s\)"):
        decode_clip(make(30), FEW, 3.0, 2.0)


def test_times_of_a_variable_frame_rate() -> None:
    pts = [0, 40, 80, 1000, 1010, 1500, 3000, 3040, 3080, 9000]
    video = make(10, pts=pts, container="matroska", options={"bf": "0"})
    clip = decode_clip(video, FrameSettings(num_frames=20, size=64))
    assert clip.timestamps == pytest.approx([time / 1000 for time in pts], abs=0.002)
    assert numbers(clip) == list(range(10))
    ticks = decode_clip(video, FrameSettings(num_frames=20, size=64, sampling="fps", fps=1.0))
    assert numbers(ticks) == [0, 3, 5, 6, 8, 9]  # what is shown at 0, 1, 2, …, 9 s


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_honoured(rotation: int) -> None:
    video = make(8, rotation=rotation, width=96, height=64)
    upright = np.rot90(numbered(5, 96, 64), rotation // 90)
    for decoders in (("decord",), ("pyav",)):
        clip = decode_clip(video, FrameSettings(num_frames=8, size=64), decoders=decoders)
        assert (clip.width, clip.height) == (upright.shape[1], upright.shape[0])
        difference = np.abs(clip.frames[5].astype(int) - resize_crop(np.ascontiguousarray(upright), 64))
        assert difference.mean() < 6, decoders


def test_pixels_that_are_not_square() -> None:
    wide = decode_clip(make(3, width=64, height=64, aspect=Fraction(2, 1)), FEW)
    expected = resize_crop(np.asarray(numbered(2).repeat(2, axis=1)), 64)
    assert np.abs(wide.frames[2].astype(int) - expected).mean() < 8
    assert (wide.width, wide.height) == (64, 64)


def test_fewer_frames_than_asked_for_are_not_repeated() -> None:
    clip = decode_clip(make(3), FrameSettings(num_frames=12, size=64))
    assert numbers(clip) == [0, 1, 2] and len(clip.timestamps) == 3
    single = decode_clip(make(1), FrameSettings(num_frames=12, size=64))
    assert numbers(single) == [0] and single.timestamps == [0.0]


def test_a_picture_that_stands_still_keeps_its_frames() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        for _ in range(10):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(3), format="rgb24")))
        out.mux(stream.encode(None))
    clip = decode_clip(buffer.getvalue(), FrameSettings(num_frames=5, size=64))
    assert numbers(clip) == [3] * 5 and len(set(clip.timestamps)) == 5


def test_damage_in_the_middle_leaves_the_frames_that_decode() -> None:
    video = bytearray(make(60, container="matroska", options={"g": "10", "bf": "0"}))
    video[len(video) // 2 : len(video) // 2 + 60] = bytes(60)
    clip = decode_clip(bytes(video), FrameSettings(num_frames=60, size=64), decoders=("pyav",))
    assert 10 < len(clip.frames) <= 60
    assert clip.timestamps == sorted(set(clip.timestamps))


REFUSED = {
    "the file is empty": b"",
    "zero byte": b"\0",
    "text file": b"this is not a video, whatever its name says\n" * 20,
    "HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "an HLS playlist: playlists are never followed": b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n",
    "an ffconcat script: playlists are never followed": b"ffconcat version 1.0\nfile 'a.mp4'\n",
    "a DASH manifest": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    "an SDP session": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
    "an XML document": b'<?xml version="1.0"?><svg></svg>',
    "a PDF document": b"%PDF-1.7\n\0\0\0",
    "a ZIP archive": b"PK\x03\x04" + bytes(40),
    "known video format": bytes(range(7, 250)) * 20,
    "incomplete": make(30)[:2000],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_video_is_refused_with_a_reason(reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_clip(REFUSED[reason], FEW)


def test_a_playlist_behind_a_byte_order_mark_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "secret.mp4"
    other.write_bytes(make(5))
    for head in (b"\xef\xbb\xbf", b"\n\n  "):
        (tmp_path / "list.mp4").write_bytes(head + f"#EXTM3U\n#EXTINF:1,\n{other}\n".encode())
        with pytest.raises(DecodeError, match="HLS playlist"):
            decode_clip(tmp_path / "list.mp4", FEW)


def test_only_a_cover_picture_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        sound = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    with pytest.raises(DecodeError, match="no video in it, only audio"):
        decode_clip(buffer.getvalue(), FEW)


def test_paths_of_any_name(tmp_path: Path) -> None:
    video = make(6)
    names = [
        "-rf.mp4",
        ".hidden",
        "a b.mp4",
        "100%.mp4",
        "'\"$(id);`x`.mp4",
        "new\nline.mp4",
        "*?[a]{b}.mp4",
        "ü.mp4",
    ]
    names += ["🎬.MP4", "no extension", "x" * 245 + ".mp4", os.fsdecode(b"\xff\xfe.mp4")]
    for name in names:
        (tmp_path / name).write_bytes(video)
        assert numbers(decode_clip(tmp_path / name, FEW)) == [0, 1, 2, 3, 4, 5]


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    reasons = {
        "x.mp4": "is a folder",
        "dangling.mp4": "No such file",
        "loop.mp4": "symbolic links",
        "pipe.mp4": "no regular file",
        "nul\0.mp4": "null",
    }
    for name, reason in reasons.items():
        with pytest.raises(DecodeError, match=reason):
            decode_clip(str(tmp_path / name), FEW)


def test_probe_decodes_nothing() -> None:
    facts = probe(make(30, rotation=90, width=96))
    assert (facts.duration, facts.fps, facts.width, facts.height) == (pytest.approx(3.0), 10, 96, 64)


# --- Real clips -----------------------------------------------------------------------------------------------------


def test_every_real_clip_gives_its_frames(media: Path) -> None:
    """All clips and variants: as many distinct frames as asked for, at increasing times, within the video."""
    import json

    with Decoder(FrameSettings(), quality=95) as decoder:
        for line in (media / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["width"] * row["height"] * row["frames"] > 60e6:
                continue  # a minute of HD: the same code, much time
            clip = decoder.decode(media / row["video"])
            assert len(clip.jpegs) == min(12, row["frames"]), row["id"]
            if row["container"] != "gif" and row["id"] != "syn_avsync_mpeg4":  # which do stand still at times
                assert len(set(clip.jpegs)) == len(clip.jpegs), row["id"]
            assert (np.diff(clip.timestamps) > 0).all(), row["id"]
            turned = row["rotation"] % 180 != 0
            size = (row["height"], row["width"]) if turned else (row["width"], row["height"])
            assert (clip.width, clip.height) == size, row["id"]
            assert clip.timestamps[-1] < clip.duration + 1e-6, row["id"]
            assert clip.duration == pytest.approx(row["duration_s"] or clip.duration, rel=0.25), row["id"]


SAMPLES = {
    "truncated_mkv.mkv",
    "corrupt_middle.mp4",
    "zeroed_middle.mp4",
    "huge_frame_count_stts.mp4",
    "huge_duration_headers.mp4",
    "zero_by_zero_headers.mp4",
    "one_by_one_pixel.mp4",
    "very_wide_4096x16.mp4",
    "single_frame.mp4",
    "resolution_change.ts",
    "wrong_extension_webm.mp4",
}


def test_every_hostile_file_gives_frames_or_a_reason(media: Path) -> None:
    reasons: dict[str, str] = {}
    with Decoder(FrameSettings(), clip_timeout=30, quality=95) as decoder:
        for path in sorted((media / "hostile").iterdir()):
            try:
                clip = decoder.decode(path)
                assert len(clip.jpegs) >= 1 and len(clip.jpegs) == len(clip.timestamps), path.name
            except DecodeError as error:
                reasons[path.name] = str(error)
    everything = {path.name for path in (media / "hostile").iterdir()}
    assert set(reasons) == everything - SAMPLES
    for name, reason in reasons.items():
        assert len(reason) < 200 and "\n" not in reason and "Error" not in reason, (name, reason)
    assert "8192x8192" in reasons["pixel_bomb_8192.mp4"]


def test_times_that_mean_nothing_are_counted_instead() -> None:
    """A header that claims a month for four frames: the frames are there, at the rate that players take."""
    clip = decode_clip(make(4, container="matroska", pts=[0, 10**9, 2 * 10**9, 3 * 10**9]), FEW)
    assert numbers(clip) == [0, 1, 2, 3]
    assert clip.timestamps[0] == 0 and clip.duration < 10 and 1 < clip.fps < 1000
