"""The picture is what a player shows: turned, mirrored, square, in true colours, without combs."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import decode_clip
from hbi.pipelines.decoding.colour import (
    HLG,
    PQ,
    hlg_light,
    matrix_of,
    pq_light,
    range_of,
    tone_map,
)
from hbi.pipelines.decoding.picture import apply_display_matrix
from tests.support.videos import make

PATCHES = np.array(
    [(200, 30, 30), (30, 180, 60), (40, 60, 200), (128, 128, 128), (235, 190, 160), (20, 20, 20)]
)


def test_each_display_matrix_moves_pixels_as_its_formula_says() -> None:
    """x' = a x + c y, y' = b x + d y, moved to begin at 0: the obvious loop."""
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    turns = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)]
    turns += [(0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)]
    for a, b, c, d in turns:
        places = {(x, y): (a * x + c * y, b * x + d * y) for x in range(3) for y in range(2)}
        left, top = (min(place[axis] for place in places.values()) for axis in (0, 1))
        height, width = (2, 3) if a else (3, 2)
        slow = np.zeros((height, width, 3), np.uint8)
        for (x, y), (across, down) in places.items():
            slow[down - top, across - left] = image[y, x]
        assert np.array_equal(apply_display_matrix(image, (a, b, c, d)), slow), (a, b, c, d)


def patches(width: int = 384, height: int = 64) -> np.ndarray:
    """Six stripes of PATCHES."""
    return np.broadcast_to(PATCHES.repeat(width // 6, axis=0), (height, width, 3)).astype(np.uint8).copy()


def middles(frame: np.ndarray) -> np.ndarray:
    """The colour in the middle of each stripe of a square crop that shows all of them."""
    width = frame.shape[1]
    return np.stack([frame[width // 2, (2 * i + 1) * width // 12] for i in range(6)]).astype(int)


def coloured(width: int, height: int, space: int, full: bool, *, tagged: bool = True) -> bytes:
    """An mp4 of PATCHES in a matrix and range. space: as swscale numbers it."""
    buffer = io.BytesIO()
    span = 2 if full else 1
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        if tagged:
            stream.codec_context.colorspace = {1: 1, 5: 6}[space]
            stream.codec_context.color_range = span
        image = av.VideoFrame.from_ndarray(patches(width, height), format="rgb24")
        for _ in range(3):
            frame = image.reformat(
                format="yuv444p", dst_colorspace=space, src_color_range=2, dst_color_range=span
            )
            if not tagged:
                frame.colorspace, frame.color_range = 2, 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(("space", "full"), [(1, False), (5, False), (1, True), (5, True)])
def test_matrix_and_range_by_tag(space: int, full: bool) -> None:
    clip = decode_clip(coloured(192, 192, space, full), FrameSettings(1, 192))
    assert np.abs(middles(clip.frames[0]) - PATCHES).max() <= 4
    assert ("full range" in clip.picture) == full


@pytest.mark.parametrize(("height", "space"), [(576, 5), (720, 1)])
def test_matrix_by_size_where_untagged(height: int, space: int) -> None:
    clip = decode_clip(coloured(768, height, space, False, tagged=False), FrameSettings(1, 224))
    # The crop shows the middle four patches or so: compared with the other matrix, which would be far off.
    wide = patches(768, height)[:, (768 - height) // 2 : (768 + height) // 2]
    row = wide[height // 2, (np.arange(224) * height / 224).astype(int)].astype(int)
    assert np.median(np.abs(clip.frames[0][112].astype(int) - row)) <= 4


def test_hlg_and_pq_curves_are_those_of_the_standards() -> None:
    assert hlg_light(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1 / 12, 1], abs=1e-4)
    assert pq_light(np.array([0.0, 0.508078, 0.580689, 1.0])) == pytest.approx([0, 100, 203, 10000], rel=2e-3)


def test_tone_mapping_keeps_what_lies_below_white() -> None:
    light = (PATCHES / 255) ** 2.4 * 203  # what a display of that white shows
    power = (light / 10000) ** (2610 / 16384)
    signal = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    assert np.abs(tone_map(signal[None], PQ, 1)[0].astype(int) - PATCHES).max() <= 2
    ramp = np.linspace(0, 1, 64)[None, :, None].repeat(3, axis=2)
    for transfer in (PQ, HLG):
        mapped = tone_map(ramp, transfer, 9)[0, :, 1].astype(int)
        assert (np.diff(mapped) >= 0).all() and mapped[0] == 0 and 245 <= mapped[-1] <= 255


def interlaced(height: int = 96) -> bytes:
    """An MPEG-2 video whose top fields are white and whose bottom fields are black."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as out:
        stream = out.add_stream("mpeg2video", rate=25, options={"flags": "+ildct+ilme", "top": "1", "q": "2"})
        stream.width, stream.height, stream.pix_fmt = 128, height, "yuv420p"
        comb = np.zeros((height, 128, 3), np.uint8)
        comb[::2] = 255
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(comb, format="rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def test_an_interlaced_frame_shows_one_moment() -> None:
    clip = decode_clip(interlaced(), FrameSettings(2, 64))
    assert clip.picture == ["deinterlaced"] and (clip.width, clip.height) == (128, 96)
    for frame in clip.frames:
        assert frame.std() < 8 and (frame.mean() > 200 or frame.mean() < 50)


def with_matrix(video: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An mp4 with the display matrix of its only track replaced, where it was the identity."""
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    new = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    place = video.index(unit, video.index(b"tkhd"))
    return video[:place] + new + video[place + len(unit) :]


@pytest.mark.parametrize(
    ("turn", "word"),
    [((-1, 0, 0, 1), "mirrored"), ((0, 1, 1, 0), "transposed"), ((0, 1, -1, 0), "rotated by 90 degrees")],
)
def test_what_was_done_is_said(turn: tuple[int, int, int, int], word: str) -> None:
    video = make(4, width=96, height=64)
    plain = decode_clip(video, FrameSettings(4, 64)).frames
    clip = decode_clip(with_matrix(video, *turn), FrameSettings(4, 64))
    assert clip.picture == [word]
    assert (clip.width, clip.height) == ((96, 64) if turn[0] else (64, 96))
    shown = np.stack([apply_display_matrix(frame, turn) for frame in plain])
    assert np.abs(np.stack(clip.frames).astype(int) - shown).mean() < 4


def test_pixels_made_square_are_said() -> None:
    clip = decode_clip(make(3, aspect=Fraction(2, 1)), FrameSettings(3, 64))
    assert clip.picture == ["pixels of 2 made square"]


def test_tags_that_say_nothing() -> None:
    frame = av.VideoFrame(1920, 1080, "yuvj420p")
    assert (matrix_of(frame), range_of(frame)) == (1, 2)
    frame = av.VideoFrame(720, 576, "yuv420p")
    assert (matrix_of(frame), range_of(frame)) == (5, 1)


# --- Files after bug reports ----------------------------------------------------------------------------------------


def quadrants(image: np.ndarray) -> str:
    def name(pixel: np.ndarray) -> str:
        red, green, blue = map(int, pixel)
        if red > 120 and green > 120 and blue < 120:
            return "Y"
        return "RGB"[int(np.argmax([red, green, blue]))]

    return "/".join("".join(name(image[y, x]) for x in (40, 184)) for y in (40, 184))


@pytest.mark.parametrize(("name", "right"), [("hflip", "GR/YB"), ("transpose", "RB/GY")])
def test_quadrants_lie_where_they_were_drawn(media: Path, name: str, right: str) -> None:
    clip = decode_clip(media / "cases" / f"q_h264_{name}.mp4", FrameSettings(4, 224))
    assert [quadrants(frame) for frame in clip.frames] == [right] * 4


def test_a_square_stays_square(media: Path) -> None:
    clip = decode_clip(media / "cases" / "s_h264_r90.mp4", FrameSettings(36, 224))
    down, across = np.nonzero(clip.frames[3].min(axis=2) > 180)
    assert (np.ptp(across) + 1, np.ptp(down) + 1) == (14, 13)


def test_high_dynamic_range_is_brought_down(media: Path) -> None:
    clip = decode_clip(media / "cases" / "c_bt2020_hlg.mp4", FrameSettings(2, 224))
    assert clip.picture == ["tone-mapped from HLG"]
    found = np.stack([clip.frames[0][172, (2 * i + 1) * 224 // 12] for i in range(6)]).astype(int)
    assert np.abs(found - PATCHES).max() <= 6 and np.abs(found - PATCHES).mean() < 2
