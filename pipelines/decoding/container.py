"""What a video file is, before anything of it is decoded: its container, its stream, and when its frames are shown.

Files are hostile until read: the first bytes are looked at before a demuxer sees them, playlists are refused, and a
demuxer can open nothing but the bytes it was given.
"""

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from hbi.pipelines.decoding.filetype import refusal, why_unreadable

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

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


@contextmanager
def video_file(data: bytes | Path | str) -> Iterator[BinaryIO]:
    """A video's bytes, or the file at a path, to read from; DecodeError for what is no regular file."""
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


# --- What the file is -----------------------------------------------------------------------------------------------

# What FFmpeg may take a file for. Absent on purpose: everything that opens other files (hls, dash, concat, sdp, image
# sequences) and everything that draws text (tty, subtitles).
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,"
    "mjpeg,mjpeg_2000,gif,apng,ogg,asf,mxf,nut,rm,yuv4mpegpipe,dv,h263,h261,vc1,cavsvideo,dirac,swf,wtv,nsv,smjpeg"
)


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
        check_size(stream.codec_context.width, stream.codec_context.height)
        yield cast("InputContainer", container), stream
    finally:
        container.close()


def check_size(width: int, height: int) -> None:
    """DecodeError for frames of more than MAX_PIXELS."""
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
    for packet in demuxed(container, stream):
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


def demuxed(container: "InputContainer", stream: "VideoStream") -> "Iterator[Packet]":
    """The stream's packets. A file that breaks off or turns to rubbish ends there."""
    import av

    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError, IndexError) as error:  # IndexError: PyAV, of a stream that appears later
        failed(error)


def packets_of(source: BinaryIO) -> "Iterator[Packet]":
    """The packets of a video's stream, from a container of its own."""
    with opened(source) as (container, stream):
        yield from demuxed(container, stream)


def stated_rate(stream: "VideoStream") -> float:
    """Frames per second by the headers; 0 where they say nothing that is believed."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and RATES[0] <= rate <= RATES[1]:
            return float(rate)
    return 0.0
