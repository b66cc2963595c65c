"""What a video file is, before anything of it is decoded: its container and its stream.

Files are hostile until read: the first bytes are looked at before a demuxer sees them, playlists are refused, and a
demuxer can open nothing but the bytes it was given.
"""

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from hbi.pipelines.decoding.filetype import refusal, why_unreadable
from hbi.pipelines.decoding.pieces import Pieces

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

MAX_PIXELS = 8192 * 4352
"""Pixels of the largest frame that is decoded (8K DCI and UHD fit): RGB of it is 107 MB."""
RATES = (0.01, 1000.0)
"""Frames per second that are believed of a header."""


class DecodeError(Exception):
    """A clip that gives no frames; the message is the reason, in words for the one who owns the video."""


def failed(error: BaseException) -> DecodeError:
    """The reason that a decoder gives, without Python's decoration. Want of memory passes through as it is."""
    if isinstance(error, MemoryError):
        raise error
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DecodeError(said.splitlines()[0])


@contextmanager
def video_file(data: bytes | Path | str | Pieces) -> Iterator[BinaryIO]:
    """A video's bytes, its pieces, or the file at a path, to read from; DecodeError for what is no regular file."""
    if isinstance(data, bytes):
        yield io.BytesIO(data)
        return
    if isinstance(data, Pieces):
        yield cast("BinaryIO", data.stream())
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
def opened(source: BinaryIO, parsed: bool = True) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """The container and its best video stream; DecodeError where there is none. `source` stays open.

    parsed: whether packets are looked into (some files call what is none a keyframe).
    """
    import av

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
    if not parsed:
        options["fflags"] = "noparse"
    try:
        container = av.open(source, options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        raise DecodeError(why_unreadable(source, head, size, str(failed(error)))) from error
    try:
        stream = default_stream(cast("InputContainer", container))
        check_size(stream.codec_context.width, stream.codec_context.height)
        yield cast("InputContainer", container), stream
    finally:
        container.close()


def default_stream(container: "InputContainer") -> "VideoStream":
    """The video stream that a player shows; DecodeError where there is none.

    Cover pictures are no videos. Of several the one that the file calls its default, else FFmpeg's best.
    """
    from av.stream import Disposition

    videos = list(container.streams.video)
    if not videos:
        kinds = " and ".join(sorted({stream.type for stream in container.streams}))
        raise DecodeError(f"there is no video in it, {f'only {kinds}' if kinds else 'nor any other stream'}")
    shown = [stream for stream in videos if not stream.disposition & Disposition.attached_pic]
    if not shown:
        raise DecodeError("there is no video in it, only a cover picture beside the audio")
    shown = [stream for stream in shown if stream.codec_context is not None]
    if not shown:
        raise DecodeError("its video is in a format for which there is no decoder")
    marked = [stream for stream in shown if stream.disposition & Disposition.default]
    if len(marked) == 1:
        return marked[0]
    best = container.streams.best("video")
    return next((stream for stream in marked or shown if stream is best), (marked or shown)[0])


def check_size(width: int, height: int) -> None:
    """DecodeError for frames of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise DecodeError(
            f"frames of {width}x{height} pixels are more than is decoded ({MAX_PIXELS / 1e6:.1f} million pixels)"
        )


def demuxed(container: "InputContainer", stream: "VideoStream") -> "Iterator[Packet]":
    """The stream's packets. A file that breaks off or turns to rubbish ends there."""
    import av

    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError, IndexError) as error:  # IndexError: PyAV, of a stream that appears later
        failed(error)


def stated_rate(stream: "VideoStream", near: float = 0.0) -> float:
    """Frames per second by the headers; 0 where they say nothing that is believed.

    near: what the frames' own times say, within 2 % of which the header must be; 0: anything.
    """
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and RATES[0] <= rate <= RATES[1] and (not near or abs(float(rate) / near - 1) < 0.02):
            return float(rate)
    return 0.0
