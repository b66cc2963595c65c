"""Bytes to the frames of a clip, in this process: which frames, when, and what had to be done to show them.

What a decoder may do to a process (hang, crash, eat memory) is contained by `Decoder`, the decode worker of
`hbi.pipelines.decoding.decoder`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hbi.model.frames import FrameSettings, sample_indices
from hbi.pipelines.decoding import decord, pyav
from hbi.pipelines.decoding.container import DecodeError, failed, stated_rate
from hbi.pipelines.decoding.film import Film
from hbi.pipelines.decoding.index import IndexDistrusted
from hbi.pipelines.decoding.picture import Picture
from hbi.pipelines.decoding.timeline import Timeline

if TYPE_CHECKING:
    from av.video.stream import VideoStream

DECODERS = ("pyav", "decord")
STOOD = "the picture that stood there"
"""Said of a clip in which no frame begins."""


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
    """`pyav` or `decord`."""
    truncated: bool = False
    """The file breaks off before its end: `duration` is that of what is there."""
    picture: list[str] = field(default_factory=list)
    """What was done to show the pictures as a player does: turned, made square, tone-mapped, deinterlaced."""
    timing: list[str] = field(default_factory=list)
    """What was done about times that are not as the file has them."""
    frames: list[np.ndarray] = field(default_factory=list, repr=False)
    """uint8 [size, size, 3] each; empty where JPEGs were asked for."""
    jpegs: list[bytes] = field(default_factory=list, repr=False)
    """The frames as JPEG files, where asked for."""


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


def decode_clip(
    data: bytes | Path | str | Film,
    settings: FrameSettings,
    start: float | None = None,
    end: float | None = None,
    decoders: tuple[str, ...] = DECODERS[:1],
    trying: Callable[[str], None] = lambda decoder: None,
) -> Clip:
    """The chosen frames of start <= time < end (seconds), in this process; DecodeError with the reason.

    data: the file's bytes, its path, or a film that is open. decoders: which may be used, in order of preference;
    decord is used only where its answer is PyAV's. `trying` is told the decoder before each attempt. A file can hang
    or kill the process: `Decoder` contains that.
    """
    if start is not None and end is not None and not start < end:
        raise DecodeError(f"the clip ends ({end:g} s) before it starts ({start:g} s)")
    with film_of(data) as film:
        if "decord" in decoders and film.by_index:
            film.distrust(IndexDistrusted("decord reads all of it"))
        try:
            return _clip_of(film.part(start, end), settings, start, end, decoders, trying)
        except IndexDistrusted as reason:
            film.note_whole(reason)
            if film.lists_packets:
                film.distrust(reason)
        return _clip_of(film, settings, start, end, decoders, trying)


def _clip_of(
    film: Film,
    settings: FrameSettings,
    start: float | None,
    end: float | None,
    decoders: tuple[str, ...],
    trying: Callable[[str], None],
) -> Clip:
    """What `decode_clip` says; IndexDistrusted where a part of the film is not enough for it."""
    import av

    stream, timeline = film.stream, film.timeline
    error: DecodeError | None = None
    for name in dict.fromkeys((*decoders, "pyav") if "decord" in decoders else decoders):
        if name == "decord" and not decord.is_right(film):
            continue
        trying(name)
        wanted = Wanted(settings, start, end, stream, timeline)
        picture = Picture.of_stream(settings.size, stream)
        try:
            found = (decord if name == "decord" else pyav).chosen_frames(film, wanted, picture)
        except DecodeError as reason:
            error = reason
        except (av.FFmpegError, OSError) as reason:
            error = failed(reason)
        else:
            times, chosen, notes = found
            fps, duration = rate_and_length(stream, times, timeline)
            length = round(duration, 6)
            return Clip(
                timestamps=[round(time, 6) for time in times[chosen].tolist()],
                fps=round(fps, 6),
                duration=length,
                width=picture.width,
                height=picture.height,
                start=max(0.0, start or 0.0),
                end=length if end is None else min(float(end), length),
                decoder=name,
                truncated=timeline is not None and timeline.truncated,
                picture=picture.done,
                timing=notes + [STOOD] * wanted.stood,
                frames=picture.frames,
            )
    assert error is not None
    raise error


@contextmanager
def film_of(data: bytes | Path | str | Film) -> Iterator[Film]:
    """A film, opened and closed here unless it is open."""
    if isinstance(data, Film):
        yield data
        return
    film = Film(data)
    try:
        yield film
    finally:
        film.close()


class Wanted:
    """Which frames of a clip are wanted, given the times of all frames, or of those around it."""

    def __init__(
        self,
        settings: FrameSettings,
        start: float | None,
        end: float | None,
        stream: "VideoStream",
        timeline: Timeline | None,
    ) -> None:
        self.settings, self.start, self.end = settings, start, end
        self.stream, self.timeline = stream, timeline
        self.stood = False
        """Whether no frame begins inside the clip, and the one that stood there is taken."""

    def __call__(self, times: np.ndarray) -> np.ndarray:
        """Indices of the chosen frames; DecodeError where the clip lies outside the video."""
        chosen = sample_indices(times, self.settings, self.start, self.end)
        if len(chosen):
            return chosen
        start = self.start or 0.0
        before = int(np.searchsorted(times, start, side="right")) - 1
        # The last one stands to the end of the file, which may have sound after it.
        if before >= 0 and (
            before < len(times) - 1 or start < rate_and_length(self.stream, times, self.timeline)[1]
        ):
            self.stood = True
            return np.array([before])
        until = "the end" if self.end is None else f"{self.end:g} s"
        first, last = (self.timeline and self.timeline.span) or (times[0], times[-1])
        raise DecodeError(
            f"no frame between {start:g} s and {until}: the video's frames lie between {first:.2f} s "
            f"and {last:.2f} s"
        )


def probe(data: bytes | Path | str) -> VideoInfo:
    """What a video is; DecodeError with the reason. Nothing is decoded unless its packets carry no times."""
    with film_of(data) as film:
        timeline = film.timeline
        times = timeline.times if timeline is not None else pyav.decoded_times(film)[0]
        fps, duration = rate_and_length(film.stream, times, timeline)
        context = film.stream.codec_context
        return VideoInfo(round(duration, 6), round(fps, 6), context.width, context.height)


def rate_and_length(
    stream: "VideoStream", times: np.ndarray, timeline: Timeline | None
) -> tuple[float, float]:
    """Average frames per second, and length in seconds. Headers may lie: the frames' own times decide."""
    counted = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else 0.0
    fps = (timeline.rate if timeline else 0.0) or stated_rate(stream, near=counted) or counted
    tail = timeline.tail if timeline else 0.0
    last = timeline.span[1] if timeline and timeline.span else float(times[-1])
    length = timeline.length if timeline else 0.0
    stands = 0 < tail < 10 or (tail > 0 and abs(last + tail - length) < 1)
    end = last + (tail if stands else 1 / fps if fps else 0.0)
    # The file may be longer than its pictures (sound goes on), by as much as is believable.
    return fps, length if last < length <= 2 * end + 1 else end
