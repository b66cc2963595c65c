"""Which frames of a clip, how resized, how normalised: the only copy, used by pipelines, training and serving.

Light on purpose (numpy and Pillow): decode processes start from it. torch is imported where it is used.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hbi.model.config import FrameSettings

if TYPE_CHECKING:
    import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Presentation times come from rational time bases; a manifest's seconds are decimal. A microsecond joins the two.
TIME_EPSILON = 1e-6


def sample_indices(
    times: np.ndarray, settings: FrameSettings, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Indices of the chosen frames, increasing and without repetition.

    times: presentation times in seconds, increasing, [frames]. Only frames with start <= time < end count (both to
    the microsecond); the result is empty where there is none. With n frames in the range the choice is

        uniform   round down i (n - 1) / (num_frames - 1)   for i = 0 … num_frames - 1   (the published code's linspace)
        segments  round down (i + 1/2) n / num_frames       for i = 0 … num_frames - 1
        fps       the last frame at or before t_0 + k / fps, k = 0, 1, …; if more than num_frames, uniform among them
    """
    first = 0 if start is None else int(np.searchsorted(times, start - TIME_EPSILON, side="left"))
    last = len(times) if end is None else int(np.searchsorted(times, end - TIME_EPSILON, side="left"))
    frames = np.arange(first, max(first, last))
    if settings.sampling == "fps" and len(frames):
        begin = times[first] if start is None else max(float(start), float(times[first]))
        ticks = (
            begin + np.arange(int((times[last - 1] - begin) * settings.fps + TIME_EPSILON) + 1) / settings.fps
        )
        shown = np.searchsorted(times, ticks + TIME_EPSILON, side="right") - 1
        frames = np.unique(np.clip(shown, first, last - 1))
    if len(frames) <= settings.num_frames:
        return frames
    if settings.sampling == "segments":
        picks = (np.arange(settings.num_frames) * 2 + 1) * len(frames) // (2 * settings.num_frames)
    else:
        picks = np.linspace(0, len(frames) - 1, settings.num_frames).astype(int)
    return frames[picks]


def resize_crop(image: np.ndarray, size: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """One frame, short side to `size`, centre-cropped: uint8 [height, width, 3] -> uint8 [size, size, 3].

    Antialiased bicubic, the geometry and rounding of CLIP's own preprocessing (resize, then crop); only the crop is
    computed, so a frame of any aspect costs the same. pixel_aspect: width of a pixel over its height.
    """
    height, width = image.shape[:2]
    shown = width * pixel_aspect
    short = min(shown, height)
    # The size that the whole frame would be resized to, of which the crop is the middle.
    wide, tall = max(size, int(size * shown / short)), max(size, int(size * height / short))
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    box = (
        left * width / wide,
        top * height / tall,
        min(width, (left + size) * width / wide),
        min(height, (top + size) * height / tall),
    )
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def from_jpegs(jpegs: Sequence[bytes]) -> np.ndarray:
    """The frames of a sample as uint8 [frames, height, width, 3]; OSError for one that is no whole JPEG."""
    return np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])


def normalise(
    video: "torch.Tensor",
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
) -> "torch.Tensor":
    """uint8 [..., height, width, 3] -> float32 [..., 3, height, width]: (x / 255 - mean) / std, by default CLIP's.

    Colours stay next to each other in memory: convolutions are faster so, and nothing is copied.
    """
    import torch

    mean = torch.tensor(image_mean, device=video.device)
    std = torch.tensor(image_std, device=video.device)
    # One multiply-add per pixel: x * (1 / (255 std)) - mean / std.
    return video.float().mul_(1 / (255 * std)).sub_(mean / std).movedim(-1, -3)
