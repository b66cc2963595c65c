"""Videos whose frames carry their own number, so that a test can say exactly which frames came out."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

BITS = 8
SIDE = 64


def numbered(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """uint8 [height, width, 3]: the bits of the number as eight bars, the lowest on the left; the lower half of each
    bar is dimmed, so that the picture has an upside."""
    bars = np.array([number >> bit & 1 for bit in range(BITS)], dtype=np.uint8)
    row = bars.repeat(-(-width // BITS))[:width] * np.uint8(235)
    image = np.broadcast_to(row[None, :, None], (height, width, 3)).copy()
    image[height // 2 :] = image[height // 2 :] // 2 + 40
    return image


def number_of(image: np.ndarray) -> int:
    """The number that a square frame carries."""
    height, width = image.shape[:2]
    middle = image[height // 4, (np.arange(BITS) * 2 + 1) * width // (2 * BITS), 1]
    return sum(1 << bit for bit, level in enumerate(middle) if level > 120)


def make(  # noqa: PLR0913 (each is one property of a video)
    count: int = 30,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    fps: int = 10,
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    rotation: int = 0,
    width: int = SIDE,
    height: int = SIDE,
    pix_fmt: str = "yuv420p",
    aspect: Fraction | None = None,
    movflags: str = "",
) -> bytes:
    """A video of `count` numbered frames. pts: their times in milliseconds, where they are not regular."""
    buffer = io.BytesIO()
    given: dict[str, Any] = {"strict": "experimental"} if codec == "av1" else {}
    given |= {"movflags": movflags} if movflags else {}
    with av.open(buffer, "w", format=container, options=given) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number, width, height), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def noisy(container: str) -> bytes:
    """Five megabytes: a minute of noise at ten frames a second, a keyframe a second."""
    buffer, noise = io.BytesIO(), np.random.default_rng(0)
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("libx264", rate=10, options={"g": "10", "preset": "ultrafast", "qp": "20"})
        stream.width = stream.height = 96
        for _ in range(600):
            image = noise.integers(0, 255, (96, 96, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()
