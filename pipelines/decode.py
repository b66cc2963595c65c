"""Bytes to frames, in this process: decord where it is known to be right, PyAV everywhere else and as its second.

The only importer of a video decoder. Files are hostile until read: the container is looked at before any decoder
sees it, playlists are refused, and a demuxer can open nothing but the bytes it was given. What a decoder may still
do (hang, crash, eat memory) is contained by `Decoder`, the child process of `pipelines.child`.
"""

import io
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from model.frames import FrameSettings, choose, fit
from pipelines.sniff import refusal, why_unreadable

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


DECODERS = ("decord", "pyav")
MAX_PIXELS = 8192 * 4352
"""Pixels of the largest frame that is decoded (8K DCI and UHD fit): RGB of it is 107 MB."""
LONGEST_SECONDS = 10 * 24 * 3600
"""A file that claims to be longer has times that mean nothing."""
RATES = (0.01, 1000.0)
"""Frames per second that are believed of a header."""
KEPT_PACKETS_BYTES = 64 << 20
"""Up to so many compressed bytes are kept between the two passes over a file; beyond, it is read twice."""


class DecodeError(Exception):
    """A clip that gives no frames; the message is the reason, in words for the one who owns the video."""


def failed(error: BaseException) -> DecodeError:
    """The reason that a decoder gives, without Python's decoration. Want of memory passes through as it is."""
    if isinstance(error, MemoryError):
        raise error
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DecodeError(said.splitlines()[0])


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


# --- What the file is -----------------------------------------------------------------------------------------------

# What FFmpeg may take a file for. Absent on purpose: everything that opens other files (hls, dash, concat, sdp, image
# sequences) and everything that draws text (tty, subtitles).
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,"
    "mjpeg,mjpeg_2000,gif,apng,ogg,asf,mxf,nut,rm,yuv4mpegpipe,dv,h263,h261,vc1,cavsvideo,dirac,swf,wtv,nsv,smjpeg"
)
# Containers whose headers say everything: no need to decode frames while opening.
PLAIN = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv", "gif", "ogg")


@contextmanager
def opened(source: BinaryIO) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """The container and its best video stream; DecodeError where there is none. `source` stays open."""
    import av
    from av.stream import Disposition

    source.seek(0, io.SEEK_END)
    size = source.tell()
    source.seek(0)
    head = source.read(4096)
    if reason := refusal(head, size):
        raise DecodeError(reason)
    source.seek(0)
    # No protocol at all: whatever a file asks for, there is nothing but its own bytes.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "fpsprobesize": "0"}
    if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3"):
        options["analyzeduration"] = "1"  # mp4 and Matroska say what is in them: decode nothing to find out
    try:
        container = av.open(source, options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        raise DecodeError(why_unreadable(source, head, size, str(failed(error)))) from error
    try:
        stream = cast("VideoStream | None", container.streams.best("video"))
        if stream is None:
            kinds = " and ".join(sorted({stream.type for stream in container.streams}))
            raise DecodeError(
                f"there is no video in it, {f'only {kinds}' if kinds else 'nor any other stream'}"
            )
        if stream.codec_context is None:
            raise DecodeError("its video is in a format for which there is no decoder")
        if stream.disposition & Disposition.attached_pic:
            raise DecodeError("there is no video in it, only a cover picture beside the audio")
        _check_size(stream.codec_context.width, stream.codec_context.height)
        yield cast("InputContainer", container), stream
    finally:
        container.close()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(
            f"frames of {width}x{height} pixels are more than is decoded ({MAX_PIXELS / 1e6:.1f} million pixels)"
        )


# --- When its frames are shown --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timeline:
    """What the packets of a video stream say before anything is decoded."""

    stamps: np.ndarray
    """Presentation time stamps of all shown packets, increasing and unique, int64 [frames], in time-base units."""
    times: np.ndarray
    """The same in seconds, from the start of the file's timeline."""
    order: np.ndarray
    """Presentation time stamp of each packet in the order of the file, int64 [packets]."""
    keys: np.ndarray
    """Whether each packet is a keyframe, bool [packets]."""
    tail: float
    """How long the last frame is shown, in seconds; 0 if nobody says."""
    length: float
    """Length of the file as its header states it, in seconds; 0 if it does not."""
    cut: bool
    """Some packets are not shown, and known: those that an edit list leaves out, and VP8's reference frames."""
    hidden: bool
    """Packets and frames do not match one by one: some packets share a time stamp, or frames have other stamps."""
    leaps: bool
    """Decoding may begin anew at each keyframe: nothing that is shown after it refers to what came before it."""
    packets: "list[Packet] | None"
    """The packets themselves, if they are few enough bytes."""


def read_timeline(container: "InputContainer", stream: "VideoStream") -> Timeline | None:
    """One pass over the packets; None if they carry no time stamps (raw elementary streams), or none that is true."""
    if container.format.name in ("obu", "av1"):
        return None
    order: list[int] = []
    keys: list[bool] = []
    shown: set[int] = set()
    kept: list[Packet] | None = []
    codec = stream.codec_context.codec.canonical_name
    # AVI has no presentation times. Of H.264 with reordered frames the demuxer's guesses are those of another order.
    hidden = (
        container.format.name == "avi" and codec in ("h264", "hevc") and stream.codec_context.has_b_frames
    )
    size, cut, leaps, key, longest = 0, False, True, -(1 << 62), (-(1 << 62), 0)
    for packet in _demuxed(container, stream):
        stamp = packet.pts
        if stamp is None:
            return None
        order.append(stamp)
        keys.append(packet.is_keyframe)
        # VP8 says in its first byte whether a frame is shown, or only referred to.
        if packet.is_discard or (codec == "vp8" and not memoryview(packet)[0] >> 4 & 1):
            cut = True
        else:
            hidden = hidden or stamp in shown
            shown.add(stamp)
            longest = max(longest, (stamp, packet.duration or 0))
        if packet.is_keyframe:
            key = stamp
            leaps = leaps and (codec != "h264" or _is_idr(packet, stream.codec_context.extradata))
        leaps = leaps and stamp >= key
        if kept is not None:
            size += packet.size
            kept.append(packet)
            if size > KEPT_PACKETS_BYTES:
                kept = None
    if not shown:
        raise DecodeError("there is no frame in it")
    time_base = stream.time_base or Fraction(1, 1000)
    stamps = np.array(sorted(shown), dtype=np.int64)
    # mp4, Matroska and their like count from zero; the clock of an MPEG stream, or of a piece of a live broadcast,
    # starts anywhere.
    begin = (container.start_time or 0) / 1e6
    anywhere = container.format.name in ("mpegts", "mpeg") or begin >= 1
    times = stamps * float(time_base)
    times -= min(begin if anywhere else 0.0, times[0])
    if container.format.name == "gif" and len(times) > 1:
        # As browsers and players show it: a delay below 0.02 s is one of 0.1 s.
        delays = np.diff(times)
        times[1:] = times[0] + np.cumsum(np.where(delays < 0.0199, 0.1, delays))
    if times[-1] > LONGEST_SECONDS or len(times) - 1 > RATES[1] * (times[-1] - times[0]):
        return None
    return Timeline(
        stamps,
        times,
        np.array(order, dtype=np.int64),
        np.array(keys, dtype=bool),
        float(longest[1] * time_base),
        max(0.0, (container.duration or 0) / 1e6),
        cut,
        hidden,
        leaps,
        kept,
    )


def _is_idr(packet: "Packet", extradata: bytes | None) -> bool:
    """Whether an H.264 packet of an mp4 or Matroska file holds an IDR picture: other keyframes are points from which a
    picture is whole after a while."""
    if not extradata or extradata[0] != 1:
        return False  # not in units with their length in front
    prefix, data, place = (extradata[4] & 3) + 1, memoryview(packet), 0
    while place + prefix < len(data):
        if data[place + prefix] & 31 == 5:
            return True
        place += prefix + int.from_bytes(data[place : place + prefix])
    return False


def _demuxed(container: "InputContainer", stream: "VideoStream") -> "Iterator[Packet]":
    """The stream's packets. A file that breaks off or turns to rubbish ends there."""
    import av

    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError, IndexError) as error:  # IndexError: PyAV, of a stream that appears later
        failed(error)


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
    with _source(data) as source, opened(source) as (container, stream):
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


@contextmanager
def _source(data: bytes | Path | str) -> Iterator[BinaryIO]:
    if isinstance(data, bytes):
        yield io.BytesIO(data)
        return
    try:
        mode = Path(data).stat().st_mode
        if stat.S_ISDIR(mode):
            raise DecodeError("it is a folder, not a video")
        if not stat.S_ISREG(mode):
            raise DecodeError("it is no regular file")  # a pipe or device would be read for ever
        stream = Path(data).open("rb")  # noqa: SIM115 (closed below)
    except (OSError, ValueError) as error:
        raise DecodeError(f"the file cannot be opened: {failed(error)}") from error
    with stream:
        yield stream


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
class Facts:
    """What a video is, without its frames."""

    duration: float
    """Its length in seconds."""
    fps: float
    """Frames per second, its average."""
    width: int
    """In pixels, as stored."""
    height: int
    """In pixels, as stored."""


def probe(data: bytes | Path | str) -> Facts:
    """What a video is; DecodeError with the reason. Nothing is decoded unless its packets carry no times."""
    with _source(data) as source, opened(source) as (container, stream):
        timeline = read_timeline(container, stream)
        times = timeline.times if timeline is not None else _decoded_times(source, timeline)
        fps, duration = _rate_and_length(stream, times, timeline)
        context = stream.codec_context
        return Facts(round(duration, 6), round(fps, 6), context.width, context.height)


def small_frames(data: bytes | Path | str, side: int) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame of a video with its time in seconds, uint8 BGR, the long side at most `side`: to find shots in."""
    with _source(data) as source:
        with opened(source) as (container, stream):
            timeline = read_timeline(container, stream)
            rate = _stated_rate(stream) or 25.0
        for index, frame in enumerate(_decoded(source)):
            time = index / rate
            if timeline is not None and frame.pts is not None:
                place = int(np.searchsorted(timeline.stamps, frame.pts))
                time = float(timeline.times[min(place, len(timeline.times) - 1)])
            _check_size(frame.width, frame.height)
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
    packets = timeline.packets if timeline.packets is not None else _packets_again(source)
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


def _packets_again(source: BinaryIO) -> "Iterator[Packet]":
    with opened(source) as (container, stream):
        yield from _demuxed(container, stream)


def _decoded(source: BinaryIO) -> "Iterator[VideoFrame]":
    """Every frame that decodes, in order of presentation, from a container of its own."""
    import av

    with opened(source) as (container, stream):
        context = stream.codec_context
        context.thread_type = "NONE"
        context.thread_count = 1
        for packet in chain(_demuxed(container, stream), [None]):
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
        self.frames.append(fit(image, self.size, 1 / self.aspect if turned else self.aspect))

    def add_frame(self, frame: "VideoFrame") -> None:
        _check_size(frame.width, frame.height)
        image, turned = upright(frame)
        self.add(image, turned)


def upright(frame: "VideoFrame") -> tuple[np.ndarray, bool]:
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
        rate = _stated_rate(stream) or 25.0
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
    chosen = choose(times, settings, start, end)
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


def _stated_rate(stream: "VideoStream") -> float:
    """Frames per second by the headers; 0 where they say nothing that is believed."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and RATES[0] <= rate <= RATES[1]:
            return float(rate)
    return 0.0


def _rate_and_length(
    stream: "VideoStream", times: np.ndarray, timeline: Timeline | None
) -> tuple[float, float]:
    """Average frames per second, and length in seconds. Headers may lie: the frames' own times decide."""
    stated = _stated_rate(stream)
    counted = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else 0.0
    fps = stated if stated and (not counted or abs(stated / counted - 1) < 0.02) else counted
    tail = timeline.tail if timeline else 0.0
    end = float(times[-1]) + (tail if 0 < tail < 10 else 1 / fps if fps else 0.0)
    # The file may be longer than its pictures (sound goes on), by as much as is believable.
    length = timeline.length if timeline else 0.0
    return fps, length if times[-1] < length <= 2 * end + 1 else end
