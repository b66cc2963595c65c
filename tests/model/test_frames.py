"""The one choice, resize and normalisation of frames, each against the slow and plain reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hbi.model.frames import CLIP_MEAN, CLIP_STD, FrameSettings, normalise, resize_crop, sample_indices

times_lists = st.lists(st.integers(0, 400), min_size=1, max_size=60, unique=True).map(
    lambda ticks: np.array(sorted(ticks)) / 40
)


@given(times_lists, st.integers(1, 20), st.sampled_from(["uniform", "segments", "fps"]))
def test_any_choice_is_increasing_within_the_range_and_as_many_as_there_are(
    times: np.ndarray, count: int, choice: str
) -> None:
    settings = FrameSettings(num_frames=count, sampling=choice, fps=3.0)  # type: ignore[arg-type]
    chosen = sample_indices(times, settings, 1.0, 8.5)
    inside = np.flatnonzero((times >= 1.0) & (times < 8.5))
    assert (np.diff(chosen) > 0).all() and set(chosen) <= set(inside)
    if choice != "fps":
        assert len(chosen) == min(count, len(inside))
    else:
        assert len(chosen) <= count and (len(chosen) > 0) == (len(inside) > 0)


def test_uniform_is_the_published_rule() -> None:
    times = np.arange(100) / 25
    chosen = sample_indices(times, FrameSettings(num_frames=12))
    assert chosen.tolist() == np.linspace(0, 99, 12, dtype=int).tolist()
    assert sample_indices(times, FrameSettings(num_frames=1)).tolist() == [0]


def test_segments_are_the_centres_of_equal_parts() -> None:
    times = np.arange(100) / 25
    assert sample_indices(times, FrameSettings(num_frames=4, sampling="segments")).tolist() == [
        12,
        37,
        62,
        87,
    ]
    assert sample_indices(times, FrameSettings(num_frames=1, sampling="segments")).tolist() == [50]


def test_fps_takes_what_is_shown_at_each_tick() -> None:
    settings = FrameSettings(num_frames=100, sampling="fps", fps=2.0)
    times = np.array([0.0, 0.3, 0.6, 2.4, 2.5, 3.0])
    ticks = np.arange(0, 3.01, 0.5)
    slow = sorted({max(i for i, time in enumerate(times) if time <= tick) for tick in ticks})
    assert sample_indices(times, settings).tolist() == slow == [0, 1, 2, 4, 5]
    dense = np.arange(2500) / 25
    capped = sample_indices(dense, FrameSettings(num_frames=12, sampling="fps", fps=1.0))
    assert capped.tolist() == [dense_second * 25 for dense_second in np.linspace(0, 99, 12).astype(int)]


def test_the_range_is_half_open_to_the_microsecond() -> None:
    times = np.array([0.0, 0.1 + 0.2, 0.6, 0.9])  # 0.30000000000000004
    settings = FrameSettings(num_frames=9)
    assert sample_indices(times, settings, 0.3, 0.6).tolist() == [1]
    assert sample_indices(times, settings, 0.0, 0.3).tolist() == [0]
    assert sample_indices(times, settings, 0.3000001, 0.9).tolist() == [1, 2]
    assert sample_indices(times, settings, 2.0).tolist() == []


@pytest.mark.parametrize(
    "shape", [(48, 64), (64, 48), (32, 32), (1, 1), (16, 1024), (333, 77), (20, 25), (500, 3)]
)
def test_fit_is_resize_then_crop(shape: tuple[int, int]) -> None:
    """CLIP's own preprocessing: the short side to `size`, antialiased bicubic, then the centre."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    size, (height, width) = 32, shape
    short = min(width, height)
    whole = Image.fromarray(image).resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC
    )
    left, top = round((whole.width - size) / 2), round((whole.height - size) / 2)
    expected = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
    assert np.abs(resize_crop(image, size) - expected).max() <= 2


def test_fit_of_pixels_that_are_not_square_is_fit_of_square_ones() -> None:
    coarse = np.random.default_rng(1).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((40, 60), Image.Resampling.BICUBIC))
    stretched = np.asarray(Image.fromarray(image).resize((80, 60), Image.Resampling.BICUBIC))
    assert (
        np.abs(resize_crop(image, 32, pixel_aspect=2.0).astype(int) - resize_crop(stretched, 32)).mean() < 3
    )


def test_normalise_is_the_formula() -> None:
    video = torch.randint(0, 256, (2, 3, 5, 4, 3), dtype=torch.uint8)
    slow = torch.stack([(video[..., c] / 255 - CLIP_MEAN[c]) / CLIP_STD[c] for c in range(3)], dim=-3)
    fast = normalise(video)
    assert fast.shape == (2, 3, 3, 5, 4) and fast.dtype == torch.float32
    assert fast.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"size": 0}, "size is 0"),
        ({"fps": 0.0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameSettings(**change)  # type: ignore[arg-type]
