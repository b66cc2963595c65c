"""Bytes to frames, in this process: decord where it is known to be right, PyAV everywhere else and as its second.

The only importer of a video decoder. What a decoder may do to a process (hang, crash, eat memory) is contained by
`Decoder`, the child process of `hbi.pipelines.decoding.decoder`.
"""

import io
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from hbi.model.frames import FrameSettings, resize_crop, sample_indices
from hbi.pipelines.decoding.container import (
    KEPT_PACKETS_BYTES,
    DecodeError,
    Timeline,
    check_size,
    demuxed,
    failed,
    opened,
    packets_of,
    read_timeline,
    stated_rate,
    video_file,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DECODERS = ("decord", "pyav")


@dataclass(frozen=True)
class Clip:
    """The chosen frames of a clip. Times are presentation times in seconds, from the start of the file's timeline."""

    timestamps: list[float]
    """When each frame is shown, increasing."""
    fps: float
    """Frames per second of the source, its average."""
    duration: float
    """When the source's last frame ends, in seconds."""
    width: int
    """Width of the source in pixels, as shown (rotation applied)."""
    height: int
    """Height of the source in pixels, as shown."""
    start: float
    """Where the clip begins."""
    end: float
    """Where the clip ends, at most `duration`."""
    decoder: str
    """`decord` or `pyav`."""
    frames: list[np.ndarray] = field(default_factory=list, repr=False)
    """uint8 [size, size, 3] each; empty where JPEGs were asked for."""
    jpegs: list[bytes] = field(default_factory=list, repr=False)
    """The frames as JPEG files, where asked for."""


# --- Decoders -------------------------------------------------------------------------------------------------------


def decode_clip(
    data: bytes | Path | str,
    settings: FrameSettings,
    start: float | None = None,
    end: float | None = None,
    decoders: tuple[str, ...] = DECODERS,
    trying: Callable[[str], None] = lambda decoder: None,
) -> Clip:
    """The chosen frames of start <= time < end (seconds), in this process; DecodeError with the reason.

    data: the file's bytes, or its path. decoders: which may be used, in order of preference. `trying` is told the
    decoder before each attempt. A file can hang or kill the process: `Decoder` contains that.
    """
    import av

    if start is not None and end is not None and not start < end:
        raise DecodeError(f"the clip ends ({end:g} s) before it starts ({start:g} s)")
    with video_file(data) as source, opened(source) as (container, stream):
        timeline = read_timeline(container, stream)
        attempts = [
            name for name in decoders if name != "decord" or _decord_is_right(container, stream, timeline)
        ]
        error: DecodeError | None = None
        for name in attempts or ["pyav"]:
            trying(name)
            try:
                if name == "decord":
                    assert timeline is not None
                    return _by_decord(source, stream, timeline, settings, start, end)
                return _by_pyav(source, stream, timeline, settings, start, end)
            except DecodeError as reason:
                error = reason
            except (av.FFmpegError, OSError) as reason:
                error = failed(reason)
        assert error is not None
        raise error


# decord 0.6.0 carries an FFmpeg of 2019. Measured against a sequential decode of real and made clips: it opens no AV1,
# GIF or raw stream, misses frames when it seeks in HEVC, in AVI and FLV with reordered frames, and wherever a frame
# after a keyframe refers to one before it, and hangs for good on MPEG-TS with B-frames.
DECORD_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
DECORD_CODECS = {"h264", "vp8", "vp9", "mpeg4", "h263", "mjpeg"}


def _decord_is_right(container: "InputContainer", stream: "VideoStream", timeline: Timeline | None) -> bool:
    """Whether decord's frames can be trusted for this file."""
    context = stream.codec_context
    return (
        timeline is not None
        and not timeline.cut
        and not timeline.hidden
        and timeline.leaps
        and container.format.name in DECORD_FORMATS
        and context.codec.canonical_name in DECORD_CODECS
        and "10" not in (context.pix_fmt or "")
    )


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, without its frames."""

    duration: float
    """Its length in seconds."""
    fps: float
    """Frames per second, its average."""
    width: int
    """In pixels, as stored."""
    height: int
    """In pixels, as stored."""


def probe(data: bytes | Path | str) -> VideoInfo:
    """What a video is; DecodeError with the reason. Nothing is decoded unless its packets carry no times."""
    with video_file(data) as source, opened(source) as (container, stream):
        timeline = read_timeline(container, stream)
        times = timeline.times if timeline is not None else _decoded_times(source, timeline)
        fps, duration = _rate_and_length(stream, times, timeline)
        context = stream.codec_context
        return VideoInfo(round(duration, 6), round(fps, 6), context.width, context.height)


def small_frames(data: bytes | Path | str, side: int) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame of a video with its time in seconds, uint8 BGR, the long side at most `side`: to find shots in."""
    with video_file(data) as source:
        with opened(source) as (container, stream):
            timeline = read_timeline(container, stream)
            rate = stated_rate(stream) or 25.0
        for index, frame in enumerate(_decoded(source)):
            time = index / rate
            if timeline is not None and frame.pts is not None:
                place = int(np.searchsorted(timeline.stamps, frame.pts))
                time = float(timeline.times[min(place, len(timeline.times) - 1)])
            check_size(frame.width, frame.height)
            scale = min(1.0, side / max(frame.width, frame.height))
            width, height = (max(1, round(length * scale)) for length in (frame.width, frame.height))
            yield time, frame.to_ndarray(format="bgr24", width=width, height=height)


def _for_decord(source: BinaryIO) -> BinaryIO | str:
    """What decord is to open: the bytes, or for a large file a path, so that it is not copied into memory.

    By path decord would follow a playlist; that `source` is none was seen before. The path by descriptor has no
    extension that could mislead, and exists for names that are not UTF-8, which decord cannot open.
    """
    if isinstance(source, io.BytesIO) or os.fstat(source.fileno()).st_size <= KEPT_PACKETS_BYTES:
        return source
    return f"/dev/fd/{source.fileno()}"


def _by_decord(
    source: BinaryIO,
    stream: "VideoStream",
    timeline: Timeline,
    settings: FrameSettings,
    start: float | None,
    end: float | None,
) -> Clip:
    import decord

    times = timeline.times
    chosen = _chosen(times, settings, start, end)
    picture = _Picture(settings.size, stream)
    last = None
    shape = sorted((stream.codec_context.width, stream.codec_context.height, 3))
    try:
        source.seek(0)
        # VP9 fails after a few frames with other numbers of threads; one process per core needs no more than one.
        reader = decord.VideoReader(_for_decord(source), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(times):
            raise DecodeError(f"decord counts {len(reader)} frames, the file has {len(times)}")
        for index in chosen.tolist():
            image = reader[index].asnumpy()
            if last is not None and np.array_equal(image, last):
                # Where decord runs out of frames it repeats the last one in silence. Or the picture stands still:
                # the second decoder knows.
                raise DecodeError("decord gave the same frame twice")
            if sorted(image.shape) != shape:
                raise DecodeError(
                    f"decord gave a frame of shape {image.shape}"
                )  # as it does for 1, 2, 16, 48, 72 wide
            last = image
            picture.add(image)  # turned upright by decord
        reader.seek(0)  # else its threads decode ahead into memory
    except (decord.DECORDError, RuntimeError, ValueError, OSError, IndexError) as error:
        raise failed(error) from error
    return _clip(stream, times, timeline, chosen, picture, start, end, "decord")


def _by_pyav(
    source: BinaryIO,
    stream: "VideoStream",
    timeline: Timeline | None,
    settings: FrameSettings,
    start: float | None,
    end: float | None,
) -> Clip:
    if timeline is not None and not timeline.hidden:
        times = timeline.times
        chosen = _chosen(times, settings, start, end)
        wanted = timeline.stamps[chosen].tolist()
        picture = _Picture(settings.size, stream)
        if _pick(source, stream, timeline, wanted, picture.add_frame):
            return _clip(stream, times, timeline, chosen, picture, start, end, "pyav")
    # Not every packet became a frame (hidden ones, damage), or the packets say nothing of time: decode all of it
    # to learn which frames there are, then once more to keep the chosen ones.
    times = _decoded_times(source, timeline)
    chosen = _chosen(times, settings, start, end)
    picture = _Picture(settings.size, stream)
    left = set(chosen.tolist())
    for index, frame in enumerate(_decoded(source)):
        if index in left:
            picture.add_frame(frame)
            left.discard(index)
            if not left:
                break
    return _clip(stream, times, timeline, chosen, picture, start, end, "pyav")


def _pick(
    source: BinaryIO,
    stream: "VideoStream",
    timeline: Timeline,
    wanted: list[int],
    take: "Callable[[VideoFrame], None]",
) -> bool:
    """Hands the frames with the wanted time stamps (increasing) to `take`; False if one of them does not appear.

    Decodes forward from the last keyframe shown at or before each wanted frame, leaping over what nobody needs.
    """
    import av

    keys = np.flatnonzero(timeline.keys)
    key_stamps = timeline.order[keys]
    if not len(keys):
        return False
    # Packet at which decoding has to begin for each wanted frame. A frame shown before "its" keyframe (open group
    # of pictures) thereby begins at the one before. GIFs and the like flag what they must: their first picture.
    begins = []
    for stamp in wanted:
        before = keys[key_stamps <= stamp]
        begins.append(int(before[-1]) if len(before) else int(keys[0]))
    context = stream.codec_context
    context.thread_type = "NONE"
    context.thread_count = 1
    left = list(wanted)
    needed = set(wanted)

    done = 0  # so many packets are decoded or leapt over
    packets = timeline.packets if timeline.packets is not None else packets_of(source)
    for position, packet in enumerate(chain(packets, [None])):
        begin = begins[len(wanted) - len(left)]
        if packet is not None:
            if position < begin:
                continue
            if position > done:
                context.flush_buffers()
            done = position + 1
            # Frames that no other refers to are decoded only if they are wanted.
            context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        try:
            frames = context.decode(packet)
        except av.FFmpegError as error:
            failed(error)
            return False
        for frame in frames:
            if frame.pts is None or frame.pts < left[0]:
                continue
            if frame.pts > left[0] or frame.is_corrupt:
                return False  # frames come in order: this one will not
            take(frame)
            left.pop(0)
            if not left:
                return True
    return False


def _decoded(source: BinaryIO) -> "Iterator[VideoFrame]":
    """Every frame that decodes, in order of presentation, from a container of its own."""
    import av

    with opened(source) as (container, stream):
        context = stream.codec_context
        context.thread_type = "NONE"
        context.thread_count = 1
        for packet in chain(demuxed(container, stream), [None]):
            try:
                frames = context.decode(packet)
            except av.EOFError:
                return
            except av.FFmpegError as error:
                failed(error)
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    yield frame


class _Picture:
    """Collects the frames of a clip: upright, square, small."""

    def __init__(self, size: int, stream: "VideoStream") -> None:
        ratio = stream.sample_aspect_ratio
        self.aspect = float(ratio) if ratio and 0.1 <= ratio <= 10 else 1.0
        self.size = size
        self.frames: list[np.ndarray] = []
        self.shape = (0, 0)

    def add(self, image: np.ndarray, turned: bool = False) -> None:
        self.shape = image.shape[:2]
        self.frames.append(resize_crop(image, self.size, 1 / self.aspect if turned else self.aspect))

    def add_frame(self, frame: "VideoFrame") -> None:
        check_size(frame.width, frame.height)
        image, turned = apply_display_matrix(frame)
        self.add(image, turned)


def apply_display_matrix(frame: "VideoFrame") -> tuple[np.ndarray, bool]:
    """The frame as it is to be shown, uint8 [height, width, 3], and whether its sides are swapped.

    PyAV leaves the display matrix to us: x' = a x + c y, y' = b x + d y, in 16.16 fixed point, row (a, b, u).
    """
    image = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image, False
    a, b, _, c, d = struct.unpack("<9i", bytes(matrix))[:5]
    turned = abs(b) > abs(a)
    if turned:
        image = image.transpose(1, 0, 2)
    flip_x, flip_y = (c < 0, b < 0) if turned else (a < 0, d < 0)
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]), turned


def _decoded_times(source: BinaryIO, timeline: Timeline | None) -> np.ndarray:
    """Presentation times in seconds of every frame that decodes, increasing."""
    with opened(source) as (_, stream):
        rate = stated_rate(stream) or 25.0
    stamps = [frame.pts for frame in _decoded(source)]
    if not stamps:
        raise DecodeError(
            "no frame of it can be decoded: the video data are damaged, encrypted or incomplete"
        )
    if timeline is not None and None not in stamps:
        shown = np.array(stamps)
        if (np.diff(shown) > 0).all() and np.isin(shown, timeline.stamps).all():
            return timeline.times[np.searchsorted(timeline.stamps, shown)]
    return np.arange(len(stamps)) / rate  # an elementary stream: the frame rate is all there is


def _chosen(times: np.ndarray, settings: FrameSettings, start: float | None, end: float | None) -> np.ndarray:
    chosen = sample_indices(times, settings, start, end)
    if not len(chosen):
        until = "the end" if end is None else f"{end:g} s"
        raise DecodeError(
            f"no frame between {start or 0:g} s and {until}: the video's frames lie between {times[0]:.2f} s "
            f"and {times[-1]:.2f} s"
        )
    return chosen


def _clip(
    stream: "VideoStream",
    times: np.ndarray,
    timeline: Timeline | None,
    chosen: np.ndarray,
    picture: _Picture,
    start: float | None,
    end: float | None,
    decoder: str,
) -> Clip:
    fps, duration = _rate_and_length(stream, times, timeline)
    height, width = picture.shape
    return Clip(
        timestamps=[round(time, 6) for time in times[chosen].tolist()],
        fps=round(fps, 6),
        duration=round(duration, 6),
        width=width,
        height=height,
        start=max(0.0, start or 0.0),
        end=round(duration, 6) if end is None else min(float(end), round(duration, 6)),
        decoder=decoder,
        frames=picture.frames,
    )


def _rate_and_length(
    stream: "VideoStream", times: np.ndarray, timeline: Timeline | None
) -> tuple[float, float]:
    """Average frames per second, and length in seconds. Headers may lie: the frames' own times decide."""
    stated = stated_rate(stream)
    counted = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else 0.0
    fps = stated if stated and (not counted or abs(stated / counted - 1) < 0.02) else counted
    tail = timeline.tail if timeline else 0.0
    end = float(times[-1]) + (tail if 0 < tail < 10 else 1 / fps if fps else 0.0)
    # The file may be longer than its pictures (sound goes on), by as much as is believable.
    length = timeline.length if timeline else 0.0
    return fps, length if times[-1] < length <= 2 * end + 1 else end
