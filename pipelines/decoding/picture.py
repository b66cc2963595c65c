"""A decoded frame as a player shows it: deinterlaced, in true colours, upright, its pixels square; then cut to size."""

import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from hbi.model.frames import resize_crop
from hbi.pipelines.decoding.colour import to_rgb
from hbi.pipelines.decoding.container import check_size

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

TURNS = {
    (1, 0, 0, 1): "",
    (0, 1, -1, 0): "rotated by 90 degrees",
    (-1, 0, 0, -1): "rotated by 180 degrees",
    (0, -1, 1, 0): "rotated by 270 degrees",
    (-1, 0, 0, 1): "mirrored",
    (1, 0, 0, -1): "mirrored upside down",
    (0, 1, 1, 0): "transposed",
    (0, -1, -1, 0): "transposed the other way",
}
"""What a display matrix (a, b, c, d) does; rotations clockwise."""
BOTTOM_FIRST = (3, 5)
"""FFmpeg's numbers of the field orders in which the bottom field is shown first."""


@dataclass
class Picture:
    """Collects the frames of a clip, uint8 [size, size, 3] each."""

    size: int
    """Height and width of a frame."""
    aspect: float
    """Width of a stored pixel over its height."""
    bottom_first: bool = False
    """Which field of an interlaced frame is shown at its time."""
    frames: list[np.ndarray] = field(default_factory=list)
    width: int = 0
    """Of the source as shown, in stored pixels."""
    height: int = 0
    done: list[str] = field(default_factory=list)
    """What was done to show the pictures as a player does."""

    @staticmethod
    def of_stream(size: int, stream: "VideoStream") -> "Picture":
        """For the frames of a stream."""
        order: Any = stream.codec_context.field_order
        order = order if isinstance(order, int) else getattr(order, "value", 0)
        return Picture(size, pixel_aspect(stream.sample_aspect_ratio), order in BOTTOM_FIRST)

    def add(self, frame: "VideoFrame") -> None:
        """Takes a frame as PyAV gives it; DecodeError where it is too large."""
        check_size(frame.width, frame.height)
        height, aspect, done, turn = frame.height, self.aspect, [], display_turn(frame)
        if frame.interlaced_frame and height > 2:
            frame = one_field(frame, self.bottom_first)
            aspect *= frame.height / height
            done.append("deinterlaced")
        width = frame.width
        image, mapped = to_rgb(frame, self.size)
        if self.aspect != 1:
            done.append(f"pixels of {Fraction(self.aspect).limit_denominator(1000)} made square")
        self.add_image(image, turn, aspect, [*done, *mapped])
        self.width, self.height = (height, width) if turn[0] == 0 else (width, height)

    def add_image(
        self, image: np.ndarray, turn: tuple[int, int, int, int], aspect: float, done: list[str]
    ) -> None:
        """Takes an image, uint8 RGB, that is to be turned so, and of whose pixels this is the aspect."""
        image = apply_display_matrix(image, turn)
        self.height, self.width = image.shape[:2]
        self.frames.append(resize_crop(image, self.size, 1 / aspect if turn[0] == 0 else aspect))
        for what in (*done, TURNS[turn]):
            if what and what not in self.done:
                self.done.append(what)


def pixel_aspect(ratio: Fraction | None) -> float:
    """Width over height of a stored pixel; 1 where the file says nothing that is believed."""
    return float(ratio) if ratio and 0.1 <= ratio <= 10 else 1.0


def display_turn(frame: "VideoFrame") -> tuple[int, int, int, int]:
    """The display matrix (a, b, c, d) of a frame as the nearest of the eight turns and mirrors.

    A stored pixel (x, y) is shown at x' = a x + c y, y' = b x + d y; 16.16 fixed point, in rows (a, b, u).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("<9i", bytes(matrix))[:5]
    if abs(b) > abs(a):
        return 0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0
    return -1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1


def apply_display_matrix(image: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    """The image [height, width, 3] as it is to be shown. turn: `display_turn` of its frame."""
    a, b, c, d = turn
    if a == 0:
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def one_field(frame: "VideoFrame", bottom: bool) -> "VideoFrame":
    """The field of an interlaced frame that is shown at its time: every other line, of colour too.

    The other field is of another moment; a player draws the lines between from this one.
    """
    import av.filter

    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        ),
        graph.add("field", "bottom" if bottom else "top"),
        graph.add("buffersink"),
    ).configure()
    graph.vpush(frame)
    return graph.vpull()
