"""When the frames of a long film are shown, without a pass over it: by the index of the file.

    mp4, mov        The index in front of the pictures (or behind them) lists every packet. It is demuxed with nothing
                    where the pictures lie, which gives the very timeline that a pass over the file gives.
    Matroska, WebM  The cues list keyframes: a clip is read from the keyframe before it to where it ends. What a sample
                    says of the whole film is by its header, checked at both ends of it.

`IndexDistrusted` says why an index cannot be believed; the film is then read whole.
"""

import io
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from hbi.model.frames import TIME_EPSILON
from hbi.pipelines.decoding.container import demuxed, failed, opened, stated_rate
from hbi.pipelines.decoding.filetype import boxes
from hbi.pipelines.decoding.pieces import Seekable
from hbi.pipelines.decoding.timeline import (
    REORDERED,
    Packets,
    Timeline,
    breaks_off,
    of_stamps,
    origin,
    read_timeline,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
"""Formats with an index, as FFmpeg names them."""
LISTED_CODECS = ("h264", "hevc", "av1", "mpeg4", "h263", "mjpeg", "prores")
"""Codecs of which an mp4's index says all; a packet of VP8 or VP9 is looked into."""
ZEROS = bytes(1 << 18)


class IndexDistrusted(Exception):
    """The index of a file does not say when its frames are shown, or says it wrongly; the message is the reason."""


# --- mp4 ------------------------------------------------------------------------------------------------------------


class _WithoutPictures(Seekable):
    """An mp4 file in which zeros stand for what its media boxes hold, and nothing is read of them."""

    def __init__(self, source: BinaryIO, media: list[tuple[int, int]], size: int) -> None:
        super().__init__(size)
        self.source, self.media = source, media

    def read(self, length: int | None = -1, /) -> bytes:
        """Up to so many bytes, at most to where a media box begins or ends."""
        length = min(self.size if length is None or length < 0 else length, self.size - self.place)
        for begin, end in self.media:
            if begin <= self.place < end:
                content = ZEROS[: max(0, min(length, end - self.place))]
                break
            if self.place < begin:
                length = min(length, begin - self.place)
        else:
            self.source.seek(self.place)
            content = self.source.read(max(0, length))
        self.place += len(content)
        return content


def listed_timeline(container: "InputContainer", stream: "VideoStream", source: BinaryIO) -> Timeline:
    """The timeline of an mp4 by its index, the packets not kept; IndexDistrusted with the reason."""
    if container.format.name != MP4:
        raise IndexDistrusted(f"the index of {container.format.long_name} does not list every packet")
    if stream.codec_context.codec.canonical_name not in LISTED_CODECS:
        raise IndexDistrusted("whether a packet is shown stands in the packet")
    if breaks_off(source):
        raise IndexDistrusted("the file breaks off")
    size = source.seek(0, io.SEEK_END)
    found = list(boxes(source, size))
    if any(kind == b"moof" for kind, _, _ in found):
        raise IndexDistrusted("its index is in fragments")
    media = [(place + 16, place + length) for kind, place, length in found if kind == b"mdat"]
    # Without parsers, which would look for keyframes in the zeros.
    hollow = cast("BinaryIO", _WithoutPictures(source, media, size))
    with opened(hollow, parsed=False) as (listed, its_stream):
        timeline = read_timeline(listed, its_stream, hollow, keep=False)
        if timeline is None or its_stream.index != stream.index:
            raise IndexDistrusted("it lists no times")
    return replace(timeline, listed=True, leaps=False)


# --- Matroska -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """How a film begins and ends."""

    first: float
    """When its first frame is shown, in seconds by the file's clock."""
    last: float
    """When its last frame is shown."""
    tail: float
    """How long that is shown."""
    rate: float
    """Frames per second, as the header states it and both ends confirm it."""


def cued_ends(container: "InputContainer", stream: "VideoStream", source: BinaryIO) -> Ends:
    """Both ends of a film with cues; IndexDistrusted with the reason."""
    if container.format.name != MATROSKA:
        raise IndexDistrusted(f"{container.format.long_name} has no index")
    if breaks_off(source):
        raise IndexDistrusted("the file breaks off")
    if not container.duration:
        raise IndexDistrusted("its header states no length")
    length, base = container.duration / 1e6, float(stream.time_base or 0)
    first = _read(islice(_from(container, stream, 0.0), REORDERED + 1), stream)
    cues = stream.index_entries
    if not len(cues) or cues[len(cues) - 1].timestamp * base < length / 2:
        raise IndexDistrusted("it has no cues")
    last = _read(_from(container, stream, length), stream)
    shown = [np.array(read.pts)[np.array(read.shown, dtype=bool)] * base for read in (first, last)]
    for times in map(np.sort, shown):
        if len(times) < 2 or np.isnan(times).any() or not (np.diff(times) > 0).all():
            raise IndexDistrusted("not every frame has a time of its own")
        if not stated_rate(stream, near=(len(times) - 1) / float(times[-1] - times[0])):
            raise IndexDistrusted("its frames do not come at the rate that its header states")
    tail = last.durations[last.pts.index(max(last.pts))] * base
    return Ends(float(shown[0].min()), float(shown[1].max()), tail, stated_rate(stream))


def cued_timeline(
    container: "InputContainer", stream: "VideoStream", ends: Ends, start: float, end: float
) -> Timeline:
    """The timeline of start <= time < end and a little around it, its packets kept; IndexDistrusted."""
    begin, base, read, beyond = origin(container, ends.first), float(stream.time_base or 0), Packets(), 0
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
    for packet in _from(container, stream, start + begin):
        read.add(packet, codec, extradata)
        beyond = beyond + 1 if read.pts[-1] * base >= end + begin else 0
        if beyond > REORDERED:
            break
        if read.kept is None:
            raise IndexDistrusted("a clip of it is too large")
    if not read.pts or not read.keys[0] or read.pts[0] * base > max(start + begin, ends.first) + TIME_EPSILON:
        raise IndexDistrusted("its cues lead elsewhere")
    found = of_stamps(read, base, container, first=ends.first)
    if found is None or found.notes or not found.exact:
        raise IndexDistrusted("not every frame has a time of its own")
    return replace(
        found,
        rate=ends.rate,
        tail=ends.tail,
        length=(container.duration or 0) / 1e6,
        span=(ends.first - begin, ends.last - begin),
    )


def _from(container: "InputContainer", stream: "VideoStream", seconds: float) -> "Iterator[Packet]":
    """The packets from the keyframe on that is shown at or before a time by the file's clock."""
    import av

    try:
        container.seek(max(0, int(seconds / float(stream.time_base or 1))), stream=stream)
    except (av.FFmpegError, OSError) as error:
        raise IndexDistrusted(f"it cannot be sought: {failed(error)}") from error
    yield from demuxed(container, stream)


def _read(packets: "Iterable[Packet]", stream: "VideoStream") -> Packets:
    read, context = Packets(kept=None), stream.codec_context
    for packet in packets:
        read.add(packet, context.codec.canonical_name, context.extradata)
    return read
