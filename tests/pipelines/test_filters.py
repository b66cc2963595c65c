"""Filters are pure: a reason or nothing; and what clips are recognised by."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.scale_loop import plain_duplicates
from hbi.pipelines.decoding.clip import Clip
from hbi.pipelines.manifest import Row
from hbi.pipelines.sharding.filters import (
    Candidate,
    FilterSettings,
    Fingerprint,
    FrameStats,
    digest,
    frame_stats,
    reject,
)


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def scene(seed: int, size: int = 96) -> np.ndarray:
    """A smooth picture of its own: a few random waves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = sum(np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-3, 3, (6, 3)))
    return np.repeat((128 + 20 * waves).clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def clip(seconds: float = 5.0, width: int = 640, height: int = 360) -> Clip:
    return Clip([0.0], 25.0, seconds, width, height, 0.0, seconds, "pyav")


ROW = Row("v.mp4", "v", ["a man walks", "a person in a red coat walks a street"])
BRIGHT = FrameStats(120.0, 9.0, "0" * 48)


def candidate(row: Row) -> Candidate:
    """A clip of the row whose pictures are bright and moving."""
    found = Candidate(row, clip())
    found.__dict__["stats"] = BRIGHT
    return found


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"min_seconds": 5.0, "max_seconds": 5.0}, None),
        ({"min_seconds": 5.1}, "too short: 5.00 s, less than 5.1 s"),
        ({"max_seconds": 4.9}, "too long: 5.00 s, more than 4.9 s"),
        ({"min_side": 360, "max_aspect": 1.8}, None),
        ({"min_side": 361}, "too small: 640x360, short side less than 361"),
        ({"max_aspect": 1.7}, "wrong aspect: 640x360, sides differ by more than a factor of 1.7"),
        ({"min_words": 3, "max_words": 3}, None),
        ({"min_words": 4, "max_words": 8}, "caption length: 3, 9 words, 4 to 8 words are asked for"),
        ({"min_words": 10}, "caption length: 3, 9 words, 10 to any number of words are asked for"),
        ({"black": 119.0, "still": 8.9}, None),
        ({"black": 120.0}, "black: no frame is brighter than 120.0 of 255"),
        ({"still": 9.0}, "still picture: frames differ by 9.00 of 255 at most"),
    ],
)
def test_each_filter(settings: dict[str, float], reason: str | None) -> None:
    assert reject(candidate(ROW), FilterSettings(**settings)) == reason  # type: ignore[arg-type]


def test_a_clip_without_captions() -> None:
    bare = Row("v.mp4", "v")
    assert reject(candidate(bare), FilterSettings(max_words=5)) is None
    assert reject(candidate(bare), FilterSettings(min_words=1)) is not None


def no_dogs(candidate: Candidate) -> str | None:
    """Somebody's own filter."""
    return "a dog" if any("dog" in caption for caption in candidate.row.captions) else None


def test_a_filter_of_ones_own_is_asked_after_ours() -> None:
    settings = FilterSettings(min_words=2, own=(no_dogs,))
    assert reject(candidate(Row("v.mp4", "v", ["a dog runs"])), settings) == "a dog"
    assert str(reject(candidate(Row("v.mp4", "v", ["dog"])), settings)).startswith("caption length: 1 words")
    assert reject(candidate(ROW), settings) is None
    assert settings.identity() == {"min_words": 2, "own": [f"{__name__}.no_dogs"]}


def test_what_is_asked_is_part_of_the_identity_down_to_zero() -> None:
    assert FilterSettings(near=0).identity() == {"near": 0}
    assert FilterSettings().identity() == {}


def test_look_sees_black_still_and_moving() -> None:
    dark = [jpeg(np.full((96, 96, 3), 2, np.uint8))] * 4
    assert frame_stats(dark).brightness < 4 and frame_stats(dark).change == 0
    moving = [jpeg(np.roll(scene(1), 12 * i, axis=1)) for i in range(4)]
    assert frame_stats(moving).change > 5 and 100 < frame_stats(moving).brightness < 160
    assert frame_stats(moving[:1]).change == 0
    assert frame_stats(moving) == frame_stats(moving) and len(frame_stats(moving).hash) == 48


def test_copies_are_near_and_other_scenes_are_not() -> None:
    """Re-encoded badly, or scaled: near. Another scene: not."""
    clips = [[jpeg(scene(10 * k + i)) for i in range(3)] for k in range(6)]
    again = [jpeg(scene(i), 30) for i in range(3)]
    smaller = [
        jpeg(np.asarray(Image.fromarray(scene(i)).resize((64, 64)).resize((96, 96)), dtype=np.uint8))
        for i in range(3)
    ]
    fingerprints = [
        (k, Fingerprint(str(k), frame_stats(some).hash)) for k, some in enumerate([*clips, again, smaller])
    ]
    assert plain_duplicates(fingerprints, FilterSettings(near=4)) == {
        6: "nearly the same pictures as row 1",
        7: "nearly the same pictures as row 1",
    }


def test_the_same_file_at_the_same_times(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"content")
    (tmp_path / "b.mp4").write_bytes(b"content")
    (tmp_path / "c.mp4").write_bytes(b"another")
    rows = [("a.mp4", None), ("b.mp4", None), ("b.mp4", 1.0), ("c.mp4", None), ("a.mp4", 1.0)]
    fingerprints = [
        (n, Fingerprint(digest(tmp_path / name, start, None), "0" * 48))
        for n, (name, start) in enumerate(rows)
    ]
    expected = {1: "the same bytes and times as row 1", 4: "the same bytes and times as row 3"}
    assert plain_duplicates(fingerprints, FilterSettings(same=True)) == expected
    assert plain_duplicates(fingerprints, FilterSettings()) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"min_seconds": -1.0},
        {"min_seconds": 3.0, "max_seconds": 2.0},
        {"max_aspect": 0.5},
        {"near": 99},
        {"black": -1.0},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^--filters\.[a-z-]+ [0-9.-]+: must be"):
        FilterSettings(**settings)  # type: ignore[arg-type]
